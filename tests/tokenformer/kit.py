"""A tiny TokenFormer with every parameter random, and what its tests compare by."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from growformer.families import FAMILIES

FAMILY = FAMILIES["tokenformer"]
VOCAB = int(str(FAMILY.sample["vocab_size"]))

Module = TypeVar("Module", bound=nn.Module)


def tokens() -> Tensor:
    """Token ids [sequence, position]."""
    return torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(5))


def randomised(module: Module) -> Module:
    """The module with every parameter drawn, in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def loaded(folder: Path) -> Any:
    """The model of a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def relative(one: Tensor, other: Tensor) -> float:
    """max|a-b| / max|a|."""
    return float(((one - other).abs().max() / one.abs().max()).detach())
