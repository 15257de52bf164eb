"""What every rank does in the tests of growth under torch.distributed."""

import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import growformer as gf
from growformer.distributed import growth, states
from growformer.distributed.shards import whole
from tests.distributed.kit import (
    ALL,
    KIND,
    Sharder,
    bytes_of,
    copy_state,
    differences,
    fsdp,
    fsdp_and_tp,
    groups_of,
    grow_beside,
    state_of,
    train,
    train_alike,
    twin,
)
from tests.training.live_kit import adamw, model, wide


def grows_as_one_process(shard: Sharder, shares: int, first: dict[str, int], then: dict[str, int]) -> None:
    with wide():
        of = shard(model(KIND))
        optimizer = adamw(of, foreach=False)  # foreach kernels refuse lists of tensors on different meshes
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        train(of, optimizer, range(3), shares, dist.get_rank() * shares // dist.get_world_size())
        of, alone, single = grow_beside(of, optimizer, shard, warmup=2, seed=5, **first)
        assert scheduler.optimizer is optimizer
        train_alike(of, optimizer, alone, single, range(3, 13), shares)
        # Once more: entries now have ages, which come along.
        of, alone, single = grow_beside(of, optimizer, shard, keep_dynamics=True, **then)
        train_alike(of, optimizer, alone, single, range(13, 15), shares)


def growth_fsdp(folder: Path) -> None:
    """FSDP2, every axis at once."""
    then = {"intermediate_size": 44, "num_hidden_layers": 6, "hidden_size": 42}
    grows_as_one_process(fsdp, dist.get_world_size(), ALL, then)


def growth_fsdp_and_tp(folder: Path) -> None:
    """The same on a mesh of two dims."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 40}  # two groups share them evenly
    then = {"intermediate_size": 44, "num_hidden_layers": 6, "hidden_size": 48}
    grows_as_one_process(fsdp_and_tp, 2, ALL | heads, then)


def other_optimizers(folder: Path) -> None:
    """Other optimizers; old entries held still; and a growth of layers alone, which moves shards as they are."""
    makers = {
        "sgd": lambda of: torch.optim.SGD(of.parameters(), 1e-2, momentum=0.9),
        "adagrad": lambda of: torch.optim.Adagrad(of.parameters(), 1e-2, initial_accumulator_value=0.1),
        "amsgrad": lambda of: torch.optim.AdamW(of.parameters(), 1e-2, amsgrad=True),
    }
    ranks, rank = dist.get_world_size(), dist.get_rank()
    with wide():
        for make in makers.values():
            of = fsdp(model(KIND))
            optimizer = make(of)
            train(of, optimizer, range(2), ranks, rank)
            of, alone, single = grow_beside(of, optimizer, fsdp, make, freeze_old=True, intermediate_size=33)
            train_alike(of, optimizer, alone, single, range(2, 4), ranks)
            of, alone, single = grow_beside(of, optimizer, fsdp, make, num_hidden_layers=4)
            train_alike(of, optimizer, alone, single, range(4, 6), ranks)


def two_optimizers(folder: Path) -> None:
    """Optimizers that share a model grow as one does."""
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def pair(of: Any) -> list[torch.optim.Optimizer]:
        wide, flat = ([x for x in of.parameters() if (x.dim() > 1) == matrix] for matrix in (True, False))
        return [torch.optim.SGD(wide, 1e-2, momentum=0.9), torch.optim.AdamW(flat, 1e-2)]

    with wide():
        of = fsdp(model(KIND))
        both = pair(of)
        for optimizer in both:
            train(of, optimizer, range(1), ranks, rank)
            of.zero_grad()
        alone, _ = twin(of, both[0], lambda of: pair(of)[0])
        single = pair(alone)
        for theirs, ours in zip(both, single, strict=True):
            copy_state(of, theirs, alone, ours)
        of, kept = gf.grow(of, both, shard=fsdp, **ALL)
        gf.grow(alone, single, **ALL)
        assert kept is both
        for theirs, ours in zip(both, single, strict=True):
            assert groups_of(of, theirs) == groups_of(alone, ours)
            assert not differences(state_of(alone, ours), state_of(of, theirs))


def one_whole_parameter_at_a_time(folder: Path) -> None:
    """No whole tensor outlives its parameter, and the small model's shards go one by one."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    of = fsdp(model(KIND))
    optimizer = adamw(of)
    train(of, optimizer, range(1), ranks, rank)
    old = list(of.parameters())
    alive: list[weakref.ref[torch.Tensor]] = []
    most, held = 0, []

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        found = whole(tensor)
        alive.append(weakref.ref(found))
        most = max(most, sum(found() is not None for found in alive))
        held.append(sum(bytes_of(x) for x in old))
        return found

    growth.whole = states.whole = counted
    try:
        gf.grow(of, optimizer, shard=fsdp, **ALL)
    finally:
        growth.whole = states.whole = whole
    assert most == 1 and len(alive) > len(old)
    assert held == sorted(held, reverse=True) and held[-1] < held[0] / 100
