"""Sharded runs and their twins in one process, for the tests of growth under torch.distributed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import growformer as gf
from growformer.distributed.shards import of_local, whole
from growformer.optim.rates import Table, local, rates_of
from growformer.proof.bar import BAR
from tests.training.live_kit import GROWTHS, adamw, batch, relative

KIND = "llama-tied-bias"
ALL = GROWTHS[KIND]["all"]
SEQUENCES = 12
Sharder = Callable[[Any], Any]


def fsdp(of: Any) -> Any:
    """FSDP2 over all ranks: each layer, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in of.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(of, mesh=mesh)


def fsdp_and_tp(of: Any) -> Any:
    """FSDP2 over two groups, tensor parallelism within them."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    styles = {name: ColwiseParallel() for name in columns}
    rows = {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    for layer in of.model.layers:
        parallelize_module(layer, mesh["tp"], {**styles, **rows})
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(of, mesh=mesh["dp"])


def train(of: Any, optimizer: Any, steps: range, shares: int = 1, share: int = 0) -> list[float]:
    """Steps on the batch of each number, of which a rank takes its share; the losses of all of it."""
    losses = []
    for number in steps:
        tokens = batch(number, SEQUENCES).chunk(shares)[share]
        loss = of(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    found = torch.stack(losses)
    if shares > 1:
        dist.all_reduce(found)
        found /= dist.get_world_size()
    return found.tolist()


def logits(of: Any) -> torch.Tensor:
    """Of a forward pass without a backward pass, after which FSDP2 leaves the root's parameters whole."""
    with torch.no_grad():
        return whole(of(input_ids=batch(99), use_cache=False).logits)


def state_of(of: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """All that a run is, as whole tensors: weights, buffers, moments, counts, and the ages of entries."""
    rates = rates_of(optimizer)
    out = {}
    for name, parameter in of.named_parameters():
        out[name] = whole(parameter)
        out |= {f"{name} {key}": whole(x) for key, x in optimizer.state.get(parameter, {}).items()}
        table = rates.tables.get(parameter, Table(()))
        out[f"{name} blocks"] = torch.tensor([[x.born, x.warmup] for x in table.blocks])
        if table.index is not None:
            out[f"{name} index"] = whole(of_local(table.index, parameter))
    return out | dict(of.named_buffers())


def groups_of(of: Any, optimizer: Any) -> list[list[str]]:
    """The names in an optimizer's groups."""
    names = {x: name for name, x in of.named_parameters()}
    return [[names[x] for x in group["params"]] for group in optimizer.param_groups]


def twin(of: Any, optimizer: Any, make: Callable[[Any], Any] = adamw) -> tuple[Any, Any]:
    """A model and an optimizer of this process alone, in the state of a sharded run."""
    alone = type(of.config).from_dict(of.config.to_dict())
    made = transformers.AutoModelForCausalLM.from_config(alone).double().train()
    single = make(made)
    for name, parameter in of.named_parameters():
        dict(made.named_parameters())[name].data.copy_(whole(parameter))
    copy_state(of, optimizer, made, single)
    return made, single


def copy_state(of: Any, optimizer: Any, alone: Any, single: Any) -> None:
    """Give a process's own optimizer the state and the rates of a sharded run's."""
    theirs, rates = dict(of.named_parameters()), rates_of(single, alone)
    for name, parameter in alone.named_parameters():
        sharded = theirs[name]
        state = optimizer.state.get(sharded, {})
        if state:
            single.state[parameter] = {key: whole(x).clone() for key, x in state.items()}
        table = rates_of(optimizer).tables.get(sharded)
        if table is not None:
            index = None if table.index is None else whole(of_local(table.index, sharded)).clone()
            rates.tables[parameter] = Table(table.blocks, index, table.taken)


def rested_state(of: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """The state of a run whose last pass was forward only, after which some parameters are whole ones."""
    for module in of.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return state_of(of, optimizer)


def bytes_of(tensor: torch.Tensor) -> int:
    """What this rank holds of a tensor."""
    return int(local(tensor).untyped_storage().nbytes())


def differences(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """What is not the same, to the bit, with its relative difference; by name."""
    assert list(one) == list(other), set(one) ^ set(other)
    return {name: relative(one[name], other[name]) for name in one if not torch.equal(one[name], other[name])}


def grow_beside(
    of: Any, optimizer: Any, shard: Sharder, make: Callable[[Any], Any] = adamw, **request: Any
) -> tuple[Any, Any, Any]:
    """Grow a sharded run and its twin, and hold that all they are is the same to the bit; the grown ones."""
    alone, single = twin(of, optimizer, make)
    assert not differences(state_of(alone, single), state_of(of, optimizer))
    before = logits(of)
    lists = [group["params"] for group in optimizer.param_groups]
    grown, kept = gf.grow(of, optimizer, shard=shard, **request)
    gf.grow(alone, single, **request)
    assert kept is optimizer
    assert all(group["params"] is params for group, params in zip(optimizer.param_groups, lists, strict=True))
    assert groups_of(grown, optimizer) == groups_of(alone, single)
    assert not differences(state_of(alone, single), state_of(grown, optimizer))
    assert grown.lm_head.weight is grown.model.embed_tokens.weight
    assert all(bytes_of(x) == 0 for x in of.parameters()), "the small model's memory is given back"
    assert relative(before, logits(grown)) < BAR
    return grown, alone, single


def train_alike(
    of: Any,
    optimizer: Any,
    alone: Any,
    single: Any,
    steps: range,
    shares: int,
    wrap: Callable[[Any], Any] = lambda of: of,
) -> None:
    """Train a run of several processes and its twin, and hold that they do the same."""
    share = dist.get_rank() * shares // dist.get_world_size()
    ours = torch.tensor(train(wrap(of), optimizer, steps, shares, share))
    theirs = torch.tensor(train(alone, single, steps))
    assert relative(theirs, ours) < BAR
    assert relative(logits(alone), logits(of)) < BAR
    # Keys' biases hardly matter, and rounding moves them farther; but not as far as float32 could tell.
    apart = differences(state_of(alone, single), rested_state(of, optimizer))
    assert max(apart.values()) < torch.finfo(torch.float32).eps, apart
