"""The Method type: for each kind of axis, which lift, which side is closed, and what the open side starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from growformer.algebra.split import Split

Side = Literal["writers", "readers", "pairs"]
"""The side of an axis whose new entries are zero, so that what the other side does cannot be seen; or neither: new
channels stand in pairs that are written alike and read with opposite signs."""

Kind = Literal["mlp", "heads", "value", "key", "hidden", "layer"]
"""What a method tells apart: the six expansions. Key/value heads and groups are heads, expert widths are mlp."""

KINDS: tuple[Kind, ...] = ("mlp", "heads", "value", "key", "hidden", "layer")

Order = Literal["cycle", "random", "stack", "each", "middle", "overlap"]
"""Which old channels, or layers, the copies are of.

cycle: from the first on, over and over. random: drawn, each as likely. Of layers: stack: the whole model again, on top;
each: every layer again, behind itself; middle: the middle ones; overlap: the model again with the ends that meet left
out.
"""


@dataclass(frozen=True)
class Way:
    """How one kind of axis grows.

    Attributes:
        lift: "new": new channels, closed on one side; "copies": copies of old channels, whose readers share their
            weights. Of layers, "copies" are whole layers again: the function changes.
        closed: of "new": the side that is closed. Axes that a norm reads can only be closed at their writers.
        fill: of "new": what the open side holds: "normal" draws, a "copy" of what stands at an old channel, or
            directions of a "gradient", for which a closure computes a loss. Of "copies" with a "gradient": the lift
            starts as copies, and is learned on a loss. The function changes.
        order: of copies: which.
        split: of "copies": how readers share their weights.
        ahead: of "copies": what writes them comes from the next layer's tensors. The function changes.
        behind: of "new" that is closed at its readers: what the closed side becomes, little by little, while the grown
            model trains: a "normal" draw, or a "copy" of what stands at the old channels that the open side copies.
    """

    lift: Literal["new", "copies"] = "new"
    closed: Side = "readers"
    fill: Literal["normal", "copy", "gradient"] = "normal"
    order: Order = "cycle"
    split: Split = field(default_factory=Split)
    ahead: bool = False
    behind: Literal["", "normal", "copy"] = ""

    def __post_init__(self) -> None:
        if self.behind and (self.lift, self.closed, self.fill) != ("new", "readers", self.behind):
            raise ValueError("only what is closed at its readers fades in, to what the open side starts from")

    @property
    def preserving(self) -> bool:
        """Whether the grown model computes the same function, where the way is open at all; not so for layers."""
        told = self.order in ("cycle", "random") and not self.ahead and self.fill != "gradient"
        return self.lift == "new" or told


@dataclass(frozen=True)
class Method:
    """A way of growing, as data.

    Attributes:
        name: the word a user types.
        source: the paper.
        about: what it does, in one sentence.
        ways: by kind of axis. What it does not say, it cannot grow.
        cannot: by kind of axis, why it cannot grow it, where there is more to say.
    """

    name: str
    source: str
    about: str
    ways: Mapping[Kind, Way]
    cannot: Mapping[Kind, str] = field(default_factory=dict)

    @property
    def preserving(self) -> bool:
        """Whether the grown model computes the same function, on every axis it grows."""
        return all(way.preserving for way in self.ways.values())
