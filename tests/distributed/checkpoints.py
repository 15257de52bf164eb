"""What every rank does in the tests of distributed checkpoints, and of DistributedDataParallel."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

import growformer as gf
from growformer.distributed import load_rates, save_rates
from growformer.optim.rates import rates_of
from tests.distributed.kit import ALL, KIND, differences, fsdp, grow_beside, rested_state, train, train_alike
from tests.distributed.refusals import refused
from tests.training.live_kit import adamw, model, wide


def small(config: Any) -> tuple[Any, Any]:
    """A sharded model of a config, and its optimizer, with other values than were saved."""
    with wide():
        of = fsdp(transformers.AutoModelForCausalLM.from_config(config).double().train())
    return of, adamw(of)


def save(folder: Path) -> None:
    """Train, grow, train, and save: the run has ages by then."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    of = fsdp(model(KIND))
    optimizer = adamw(of)
    with wide():
        train(of, optimizer, range(2), ranks, rank)
        of, _ = gf.grow(of, optimizer, shard=fsdp, warmup=3, intermediate_size=34, num_hidden_layers=4)
        train(of, optimizer, range(2, 4), ranks, rank)
    assert rates_of(optimizer).tables
    weights, moments = get_state_dict(of, optimizer)
    state = {"model": weights, "optimizer": moments, "rates": save_rates(of, optimizer)}
    dcp.save(state, checkpoint_id=folder / "saved")
    whole = rested_state(of, optimizer)
    if rank == 0:
        of.config.save_pretrained(folder / "config")
        torch.save(whole, folder / "whole.pt")


def load_and_grow(folder: Path) -> None:
    """Load what another number of ranks has saved, grow it, and go on as one process would."""
    of, optimizer = small(transformers.AutoConfig.from_pretrained(folder / "config"))
    weights, moments = get_state_dict(of, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "saved")
    set_state_dict(of, optimizer, model_state_dict=weights, optim_state_dict=moments)
    load_rates(of, optimizer, folder / "saved")
    assert rates_of(optimizer).tables
    assert not differences(torch.load(folder / "whole.pt"), rested_state(of, optimizer))
    with wide():
        of, alone, single = grow_beside(of, optimizer, fsdp, warmup=2, **{**ALL, "num_hidden_layers": 6})
        train_alike(of, optimizer, alone, single, range(4, 7), dist.get_world_size())


def load_into_a_larger_model(folder: Path) -> None:
    """What was saved is not loaded into a model of other sizes, nor are its rates."""
    config = transformers.AutoConfig.from_pretrained(folder / "config")
    of, optimizer = small(type(config).from_dict(config.to_dict() | {"intermediate_size": 40}))
    weights, _ = get_state_dict(of, optimizer)
    for load in (
        lambda: dcp.load({"model": weights}, checkpoint_id=folder / "saved"),
        lambda: load_rates(of, optimizer, folder / "saved"),
    ):
        try:
            load()
        except dcp.api.CheckpointException as error:
            assert "Size mismatch" in str(error)
        else:
            raise AssertionError("loaded into a larger model")


def ddp(folder: Path) -> None:
    """Grow what is within DistributedDataParallel, and wrap it again."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    of, alone = model(KIND), model(KIND)
    optimizer, single = adamw(of), adamw(alone)
    with wide():
        first_steps(of, optimizer, range(2), ranks, rank)
        train(alone, single, range(2))
        gf.grow(of, optimizer, warmup=2, **ALL)
        gf.grow(alone, single, warmup=2, **ALL)
        train_alike(of, optimizer, alone, single, range(2, 6), ranks, DistributedDataParallel)


def first_steps(of: Any, optimizer: Any, steps: range, ranks: int, rank: int) -> None:
    """In a wrapper that ends with this function: its reducer holds the parameters that are to grow."""
    wrapped = DistributedDataParallel(of)
    train(wrapped, optimizer, steps, ranks, rank)
    refused(lambda: gf.grow(wrapped, optimizer, **ALL), "grow model.module, and wrap it again")
    refused(lambda: gf.grow(wrapped, optimizer, shard=fsdp, **ALL), "without shard=, and wrap it again")
