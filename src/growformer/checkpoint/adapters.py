"""Folders of PEFT's adapters: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growformer.checkpoint.folder import inside, read_json, target_errors
from growformer.errors import SourceError

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return os.path.lexists(folder / CONFIG) and not os.path.lexists(folder / "config.json")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors of an adapter's folder.

    Raises:
        SourceError: one of the files is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_json(inside(folder, CONFIG))
    path = inside(folder, WEIGHTS)
    if not path.is_file():
        raise SourceError(f"{folder}: has no {WEIGHTS}; pickled adapters (.bin) are not read: save it with safetensors")
    try:
        return config, load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{path}: cannot be read: {error}") from error


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter's two files as PEFT does.

    Raises:
        TargetError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    with target_errors(folder):
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file({name: x.contiguous() for name, x in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
