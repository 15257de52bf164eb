"""What a folder says of how it was made: its receipt, its card's text, and the dtype in its config.json."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from growformer.checkpoint import Receipt, sha256
from growformer.errors import RequestError
from growformer.planning import Plan
from growformer.proof.claims import Proof

_NAMES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16"}
_PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def version() -> str:
    """Of this package."""
    return importlib.metadata.version("growformer")


def storage_named(dtype: str | None) -> str | None:
    """A storage dtype as the format of files names it.

    Raises:
        RequestError: there is none of that name.
    """
    if dtype is not None and dtype not in _NAMES:
        raise RequestError(f"dtype={dtype!r} is unknown; there are {', '.join(_NAMES)}")
    return None if dtype is None else _NAMES[dtype]


def config_stored(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config.json that says in which dtype the tensors beside it are stored; None: in that of the source."""
    if dtype is None:
        return dict(config)
    return {**config, **{key: dtype for key in ("dtype", "torch_dtype") if key in config or key == "dtype"}}


def card_of(folder: Path) -> str | None:
    """The text of a source's model card, if it has one."""
    card = folder / "README.md"
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None


def source_of(folder: Path, read: Iterable[Path], known: Mapping[Path, str] | None = None) -> dict[str, Any]:
    """What a receipt says of a folder that was read.

    Args:
        folder: it.
        read: its files that count.
        known: hashes that are there already.
    """
    hashes = known or {}
    return {"path": str(folder), "files": {path.name: hashes.get(path) or sha256(path) for path in read}}


def receipt_of(
    made: Plan,
    source: Mapping[str, Any],
    out: Path,
    proof: Proof,
    *,
    dtype: str | None = None,
    stds: Mapping[str, float] | None = None,
    known: Mapping[Path, str] | None = None,
    **other: Any,
) -> Receipt:
    """The receipt of a folder that holds all of its files but this one.

    Args:
        made: the plan that was run.
        source: see `source_of`.
        out: the folder.
        proof: of it.
        dtype: storage dtype that was asked for.
        stds: of tensors whose new entries are drawn like them.
        known: hashes that are there already.
        other: fields in which it differs from what the plan says.
    """
    hashes = known or {}
    written = sorted(path for path in out.rglob("*") if path.is_file())
    fields: dict[str, Any] = {
        "growformer": version(),
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in _PACKAGES},
        "family": made.family,
        "source_family": made.source_family,
        "method": made.method,
        "seed": made.seed,
        "dtype": dtype,
        "request": dict(made.request),
        "moved": list(made.moved),
        "source": dict(source),
        "target": {"files": {str(path.relative_to(out)): hashes.get(path) or sha256(path) for path in written}},
        "axes": dict(made.axes),
        "layers": {axis: list(sources) for axis, sources in made.layers.items()},
        "plan": made.to_json(),
        "fidelity": made.fidelity,
        "dead": list(made.dead),
        "stds": dict(stds or {}),
        "within_eps": list(made.within_eps),
        "measured": proof.to_json(),
    }
    return Receipt(**{**fields, **other})


__all__ = ["card_of", "config_stored", "receipt_of", "source_of", "storage_named", "version"]
