"""Block rates in distributed checkpoints, which are written by some number of ranks and read by another."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from growformer.distributed.shards import of_local
from growformer.optim.rates import rates_of

SAID = "blocks"
"""Where the blocks are, as JSON; beside it, by parameter name, which block each entry is of."""


def save_rates(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The block rates of an optimizer as `torch.distributed.checkpoint.save` takes them, beside model and optimizer.

    Args:
        model: says what the parameters are called.
        optimizer: of a class with a state rule.

    Raises:
        SourceError: a parameter has rates, but no name.
    """
    rates = rates_of(optimizer, model)
    state = rates.state_dict()
    homes = {name: parameter for parameter, name in rates.names.items()}
    out: dict[str, Any] = {}
    for name, saved in state["parameters"].items():
        index = saved.pop("index")
        saved["whole"] = index is None
        if index is not None:
            out[name] = of_local(index, homes[name])
    return {SAID: json.dumps(state), **out}


def load_rates(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Any, key: str = "rates") -> None:
    """Put the block rates of a distributed checkpoint into an optimizer; called by every rank at once.

    Args:
        model: sharded in any way, on any number of ranks; of the sizes that it had when it was saved.
        optimizer: over its parameters, of a class with a state rule.
        checkpoint: `checkpoint_id` of `torch.distributed.checkpoint.save`.
        key: under which what `save_rates` gave was saved.

    Raises:
        SourceError: there are rates of a parameter that the optimizer does not have, or of another format.
    """
    said: dict[str, Any] = {key: {SAID: ""}}
    dcp.load(said, checkpoint_id=checkpoint)
    state = json.loads(said[key][SAID])
    rates = rates_of(optimizer, model)
    homes = {name: parameter for parameter, name in rates.names.items()}
    held = {
        name: torch.zeros_like(homes[name].detach(), dtype=torch.uint8)
        for name, saved in state["parameters"].items()
        if not saved["whole"] and name in homes
    }
    if held:
        dcp.load({key: held}, checkpoint_id=checkpoint)
    for name, saved in state["parameters"].items():
        del saved["whole"]
        index = held.get(name)
        saved["index"] = index.to_local() if isinstance(index, DTensor) else index
    rates.load_state_dict(state)
