"""Tiny recipes, and runs of them that stop where a test says."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from growformer import api
from growformer.training import saving
from growformer.training.place import Place

MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "tie_word_embeddings": True,
}
RECIPE: dict[str, Any] = {
    "model": MODEL,
    "data": {"train": "train.txt", "valid": "valid.txt"},
    "sequence_length": 16,
    "batch_tokens": 64,
    "budget": {"steps": 12},
    "optimizer": {"name": "AdamW", "lr": 0.01, "betas": [0.9, 0.95], "weight_decay": 0.1},
    "evaluate": {"every": 5, "tokens": 128},
    "checkpoint": {"every": 3, "keep": 2},
    "prove": False,
    "grow": [
        {"at": {"step": 4}, "to": {"intermediate_size": 28, "num_hidden_layers": 2}, "warmup": 3},
        {"at": {"share": 0.6}, "to": {"hidden_size": 24}, "learning_rate": 0.5, "freeze_old": 2},
    ],
}


class Cut(Exception):
    """Training is cut short here."""


class Watcher:
    """Keeps what is said; cuts training short after a step."""

    def __init__(self, cut_at: int | None = None) -> None:
        self.said: list[str] = []
        self.cut_at = cut_at

    def say(self, text: str) -> None:
        self.said.append(text)

    def tick(self, share: float, text: str) -> None:
        if self.cut_at is not None and text.startswith(f"step {self.cut_at:,},"):
            raise Cut


def text(folder: Path, name: str, size: int, seed: int) -> None:
    """Text with something to learn: words of a small vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(40, (size,), generator=generator).tolist()
    words = " ".join(f"w{pick * pick % 97}" for pick in picks)
    (folder / name).write_text(words[:size])


def recipe(folder: Path, changes: Mapping[str, Any] | None = None, **keys: Any) -> Path:
    """A recipe and its text in a folder.

    Args:
        folder: for both.
        changes: of the recipe's keys; None takes one out.
        keys: the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.txt").exists():
        text(folder, "train.txt", 8000, 0)
        text(folder, "valid.txt", 1500, 1)
    made = {**RECIPE, **(changes or {}), **keys}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in made.items() if value is not None}, sort_keys=False))
    return path


def train(path: Path, out: Path, cut_at: int | None = None, resume: bool = False) -> tuple[Place, Watcher]:
    """Train to the end, or to where it is cut."""
    watcher = Watcher(cut_at)
    with contextlib.suppress(Cut):
        api.train(path, out, resume=resume, watcher=watcher)
    return Place(out), watcher


def weights(folder: Path) -> bytes:
    """A model folder's weights, as they are on disk."""
    return (folder / "model.safetensors").read_bytes()


def training_state(place: Place) -> dict[str, Any]:
    """The last checkpoint's optimizers and random states, as plain data of tensors."""
    last = saving.checkpoints(place.checkpoints)[-1]
    found: dict[str, Any] = torch.load(last / "training.pt", weights_only=True)
    return found


def equal(one: Any, other: Any) -> bool:
    """Whether nested data with tensors in it is the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
