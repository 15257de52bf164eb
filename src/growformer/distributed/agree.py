"""Agreement: every rank grows the same model in the same way, or none grows at all."""

from __future__ import annotations

from collections.abc import Mapping

from growformer.errors import RequestError


def agree(facts: Mapping[str, str], error: Exception | None) -> None:
    """Compare what every rank is about to do; called by all ranks at once.

    Args:
        facts: what must be the same everywhere, by what it is called in messages.
        error: why this rank cannot go on.

    Raises:
        Exception: `error`, on the rank that has one.
        RequestError: another rank has an error, or two ranks have different facts; on every rank, naming both.
    """
    import torch.distributed as dist

    mine = (None if error is None else str(error) or type(error).__name__, dict(facts))
    everyone: list[tuple[str | None, dict[str, str]]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if error is not None:
        raise error
    for rank, (problem, _) in enumerate(everyone):
        if problem is not None:
            raise RequestError(f"rank {rank} cannot grow: {problem}")
    first = everyone[0][1]
    for rank, (_, said) in enumerate(everyone):
        for name in dict.fromkeys([*first, *said]):
            if said.get(name) != first.get(name):
                raise RequestError(
                    f"the ranks do not agree on the {name}: {said.get(name)} on rank {rank}, {first.get(name)} on rank "
                    f"0; call grow on every rank, at the same step, with the same arguments"
                )
