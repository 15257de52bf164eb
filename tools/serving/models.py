"""The folders that are compared: stories260K itself, its noise floor, its growths, and growths with a rule broken."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import growformer as gf
from growformer.api.planned import family_of
from growformer.checkpoint import Receipt, TensorFiles, read_config
from growformer.checkpoint.stock import full_config
from growformer.planning import Plan, apply, pull_back
from growformer.proof.floor import Layout, orders, permuted

GROWTHS: Mapping[str, Mapping[str, int]] = {
    "hidden": {"hidden_size": 96},
    "mlp": {"intermediate_size": 256},
    "heads": {"num_attention_heads": 16},
    "kv_heads": {"num_key_value_heads": 8},
    "head_dim, twice": {"head_dim": 16},
    "head_dim, half more": {"head_dim": 12},
    "layers": {"num_hidden_layers": 8},
    "vocab": {"vocab_size": 520},
    "all together": {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_attention_heads": 12,
        "num_key_value_heads": 6,
        "head_dim": 16,
        "num_hidden_layers": 8,
    },
}
"""Requests, in the names of config.json."""

CONTROLS: Mapping[str, tuple[str, str]] = {
    "hidden, eps as it was": ("hidden", "rms_norm_eps"),
    "head_dim, theta as it was": ("head_dim, twice", "rope_theta"),
}
"""A growth, and the field of its config that is put back to the source's: what must be noticed."""


@dataclasses.dataclass(frozen=True)
class Grown:
    """A growth on disk.

    Attributes:
        folder: the grown model; where the vocabulary grew, its tokenizer has the new tokens.
        request: new sizes by config field.
        parameters: how many it has.
        rounded: the source with each tensor that the growth rounds multiplied by its factor, rounded and divided back;
            None where none is.
    """

    folder: Path
    request: Mapping[str, int]
    parameters: int
    rounded: Path | None


def _read(folder: Path) -> dict[str, torch.Tensor]:
    with TensorFiles.open(folder) as files:
        return {name: files.read(name) for name in files.names}


def variant(src: Path, out: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A copy of a folder with other weights."""
    shutil.copytree(src, out)
    whole = {name: x.contiguous() for name, x in tensors.items()}
    save_file(whole, out / "model.safetensors", metadata={"format": "pt"})
    return out


def draws(src: Path, root: Path, count: int) -> list[Path]:
    """The source with its residual and MLP channels in other orders: the same function, other sums."""
    raw, source = read_config(src), _read(src)
    layout = Layout(family_of(raw), full_config(raw)[0], {name: tuple(x.shape) for name, x in source.items()})
    found = permuted(layout, source, orders(layout, layout.groups(), count))
    return [variant(src, root / f"draw-{i}", tensors) for i, tensors in enumerate(found)]


def grow(src: Path, root: Path, say: Callable[[str], None]) -> dict[str, Grown]:
    """Every growth, proved by growformer as it is made, with what rounding alone does to the source."""
    found = {}
    for number, (name, request) in enumerate(GROWTHS.items()):
        say(f"growing: {name}")
        out = root / f"grown-{number}"
        gf.expand_checkpoint(src, out, **request)
        receipt = Receipt.read(out)
        plan = dataclasses.replace(Plan.from_json(receipt.plan), source_config=read_config(src))
        if plan.target_config["vocab_size"] != plan.source_config["vocab_size"]:
            shutil.copytree(out, root / "tokens-missing")
            _name_tokens(out, plan.target_config["vocab_size"])
        rounded = None
        if plan.fidelity["rounded"]:
            source = _read(src)
            back = pull_back(plan, apply(plan, source))
            rounded = variant(src, root / f"rounded-{number}", {n: x.to(source[n].dtype) for n, x in back.items()})
        found[name] = Grown(out, request, sum(x.numel() for x in _read(out).values()), rounded)
    return found


def _name_tokens(folder: Path, vocab: int) -> None:
    """Give a folder's tokenizer as many tokens as its model has, as whoever grows a vocabulary does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new_{i}>" for i in range(len(tokenizer), vocab)])
    tokenizer.save_pretrained(folder)


def broken(src: Path, grown: Mapping[str, Grown], root: Path) -> dict[str, Path]:
    """Each control: a grown folder in which one field of the config is the source's."""
    found = {}
    for number, (name, (growth, field)) in enumerate(CONTROLS.items()):
        out = root / f"broken-{number}"
        shutil.copytree(grown[growth].folder, out)
        path = out / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        _put_back(config, read_config(src), field)
        path.write_text(json.dumps(config), encoding="utf-8")
        found[name] = out
    return found


def _put_back(config: dict[str, Any], source: Mapping[str, Any], field: str) -> None:
    """Set a field to the source's value wherever the config has it (theta stands in two places)."""
    value = source.get(field, (source.get("rope_parameters") or {}).get(field))
    for place in (config, config.get("rope_parameters") or {}):
        if field in place:
            place[field] = value
