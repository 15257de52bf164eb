"""Where new parameters go among an optimizer's groups."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Member = TypeVar("Member", bound=Hashable)


def joined(members: Sequence[Member], rank: Mapping[Member, int], joining: Mapping[Member, Member]) -> list[Member]:
    """A group with its new members.

    Where the group has the order of the model, it keeps it, so that an optimizer made anew for the grown model loads
    this one's state; otherwise each comes behind the one that it is like.

    Args:
        members: of the group.
        rank: the order of the grown model; members that it does not have stay where they are.
        joining: the new ones, each with the member that it is like.
    """
    out = list(members)
    held = [rank[m] for m in members if m in rank]
    ordered = held == sorted(held)
    for new in sorted(joining, key=rank.__getitem__):
        if ordered:
            earlier = [i for i, m in enumerate(out) if m in rank and rank[m] < rank[new]]
            later = [i for i, m in enumerate(out) if m in rank and rank[m] > rank[new]]
            at = earlier[-1] + 1 if earlier else later[0]
        else:
            at = next(i for i, m in enumerate(out) if m is joining[new]) + 1
        out.insert(at, new)
    return out


def renamed(
    members: Sequence[Member],
    said: Sequence[str],
    olds: Mapping[Member, str],
    grown: Sequence[Member],
    names: Mapping[Member, str],
) -> list[str]:
    """A group's `param_names` after a growth; what a wrapper has put before the names stays before them.

    Args:
        members, said: the group as it was, and its `param_names`.
        olds: names of the members that have grown.
        grown: the group as it is.
        names: names of its members in the grown model.
    """
    called = dict(zip(members, said, strict=False))
    fronts = {text.removesuffix(olds[m]) for m, text in called.items() if m in olds and text.endswith(olds[m])}
    front = fronts.pop() if len(fronts) == 1 else ""
    return [front + names[m] if m in names else called.get(m, "") for m in grown]
