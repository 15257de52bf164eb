"""What every rank does in the tests of what is refused, and of checks that must be able to fail."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import growformer as gf
from growformer.distributed import growth
from growformer.errors import RequestError
from tests.distributed.kit import ALL, KIND, differences, fsdp, rested_state, train, twin
from tests.training.live_kit import adamw, model, wide


def refused(call: Callable[[], Any], *words: str) -> None:
    """Hold that a call raises an error that says all of `words`."""
    try:
        call()
    except RequestError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"not refused: {words}")


def refusals(folder: Path) -> None:
    """Every refusal comes on every rank, and leaves model and optimizer as they were."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    of = fsdp(model(KIND))
    optimizer = adamw(of)
    train(of, optimizer, range(2), ranks, rank)
    before = rested_state(of, optimizer)

    def grow(shard: Any = fsdp, **request: Any) -> Callable[[], Any]:
        return lambda: gf.grow(of, optimizer, shard=shard, **{**ALL, **request})

    refused(grow(intermediate_size=40 + 2 * rank), "do not agree on the request", "'intermediate_size': 42")
    refused(grow(seed=rank), "do not agree on the seed: 1 on rank 1, 0 on rank 0")
    refused(grow(warmup=rank), "do not agree on the pace")
    refused(grow(intermediate_size=40 if rank == 0 else 2), "2" if rank else "rank 1 cannot grow")
    refused(grow(shard=lambda bare: bare), "shard(model) leaves", "whole")
    refused(grow(shard=lambda bare: torch.nn.Linear(1, 1)), "returned another model (Linear)")
    refused(grow(shard=lambda bare: fsdp(bare.float())), "is torch.float32 in the grown model")
    refused(lambda: gf.grow(of, optimizer, **ALL), "shard=function")
    refused(lambda: gf.grow(model(KIND), None, shard=fsdp, **ALL), "no parameter of LlamaForCausalLM is sharded")
    early = model(KIND)
    made = adamw(early)
    early = fsdp(early)
    refused(lambda: gf.grow(early, made, shard=fsdp, **ALL), "has none of the model's parameters")

    class FullyShardedDataParallel(torch.nn.Module):
        """What FSDP1 is called; the real one asks for an accelerator."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    class DeepSpeedEngine(FullyShardedDataParallel):
        pass

    refused(lambda: gf.grow(FullyShardedDataParallel(of), None, shard=fsdp, **ALL), "FSDP1", "fully_shard (FSDP2)")
    refused(lambda: gf.grow(DeepSpeedEngine(of), None, shard=fsdp, **ALL), "DeepSpeed", "expand_checkpoint")
    refused(lambda: gf.grow(of, optimizer, shard=fsdp, averages=[of], **ALL), "averages of sharded models")

    untied = model(KIND)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    refused(lambda: gf.grow(fsdp(untied), None, shard=fsdp, **ALL), "lm_head.weight")

    of.model.norm.weight.grad = torch.zeros_like(of.model.norm.weight)
    refused(grow(), "model.norm.weight has a gradient")
    of.zero_grad()
    assert not differences(before, rested_state(of, optimizer)), "a refusal has changed something"
    train(of, optimizer, range(2, 3), ranks, rank)


def control_another_seed_on_each_rank(folder: Path) -> None:
    """Without the agreement, ranks that draw with seeds of their own make a model that is nobody's."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with wide():
        of = fsdp(model(KIND))
        optimizer = adamw(of)
        train(of, optimizer, range(1), ranks, rank)
        alone, single = twin(of, optimizer)
        kept, growth.agree = growth.agree, lambda facts, error: None
        try:
            of, _ = gf.grow(of, optimizer, shard=fsdp, seed=rank, **ALL)
        finally:
            growth.agree = kept
        gf.grow(alone, single, seed=0, **ALL)
        apart = differences(rested_state(alone, single), rested_state(of, optimizer))
    assert max(apart.values()) > 0.1
