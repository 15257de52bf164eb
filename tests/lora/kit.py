"""Adapters for tests: tiny models with trained LoRA pairs on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.tiny import build

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.randint(0, 37, (3, 12), generator=torch.Generator().manual_seed(0))


def loss(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return found


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


def trainable(model: Any) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int, ids: torch.Tensor = IDS) -> None:
    model.train()
    for _ in range(steps):
        loss(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def adapted(
    base: Any = None, targets: Sequence[str] | str = ("q_proj", "down_proj"), steps: int = 3, **config: Any
) -> tuple[Any, torch.optim.Optimizer]:
    """A base with a trained adapter of rank 4 and alpha 8, and the optimizer that has trained it."""
    torch.manual_seed(1)
    targets = targets if isinstance(targets, str) else list(targets)
    asked = {"r": 4, "lora_alpha": 8, "target_modules": targets} | config
    model = get_peft_model(build("llama") if base is None else base, LoraConfig(**asked))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    ids = IDS if base is None else IDS % base.config.vocab_size
    train(model, optimizer, steps, ids)
    return model, optimizer


def saved(folder: Path, **asked: Any) -> tuple[Any, Path]:
    """The same, saved."""
    model, _ = adapted(**asked)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model, folder


def loaded(base: Any, folder: Path) -> Any:
    """A base with a saved adapter, as PEFT loads it; a key that is missing or unexpected warns, which is an error."""
    return PeftModel.from_pretrained(base, str(folder)).eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())
