"""From words on the command line to a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from growformer.algebra import Becoming, Field
from growformer.errors import RequestError

# What says nothing of the function: never a reason to refuse a --to config.
_SILENT = {"transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures", "use_cache"}
_SILENT |= {"rope_theta", "rope_scaling"}  # the older spelling of rope_parameters, which counts
# What growth itself changes: a --to config may hold the source's value, or the one that growth arrives at.
_FOLLOWS = {"rope_parameters", "rms_norm_eps", "layer_norm_epsilon", "layer_types"}


def parse(words: Sequence[str]) -> dict[str, str]:
    """`hidden_size=96 head_dim=16` as a mapping.

    Raises:
        RequestError: a word without =, or a key given twice.
    """
    out: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key or not value:
            raise RequestError(f"{word!r}: a request is KEY=VALUE, such as hidden_size=1024")
        if key in out:
            raise RequestError(f"{key} is asked for twice: {out[key]} and {value}")
        out[key] = value
    return out


def places(text: str | None) -> list[int] | None:
    """`--layers-at 1,3,5` as numbers.

    Raises:
        RequestError: a part is no number.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"--layers-at {text}: the places of the new layers are numbers, such as 1,3,5") from None


def config_at(config: Path) -> dict[str, Any]:
    """A config.json, or that of a folder, with its class's defaults filled in."""
    from growformer.checkpoint import read_config
    from growformer.checkpoint.folder import read_json
    from growformer.checkpoint.stock import full_config

    return full_config(read_config(config) if config.is_dir() else read_json(config), config)[0]


def experts_of(becoming: Becoming | None, target: Mapping[str, Any]) -> dict[str, Any]:
    """What the config of a model with experts says of them, as a request to become one."""
    from growformer.families import FAMILIES

    family = None if becoming is None else FAMILIES[becoming.target]
    if family is None or family.experts is None:
        return {}
    size = family.axes[family.experts.axis]
    names = [size.name if isinstance(size, Field) else "", family.experts.chosen, *(family.experts.whole or ())]
    return {name: target[name] for name in names if name in target}


def towards(
    source: Mapping[str, Any], config: Path, target: Mapping[str, Any], sizes: Sequence[str]
) -> tuple[dict[str, int], dict[str, Any]]:
    """The request that takes a source config to the sizes of another config.json.

    Args:
        source: the source's config, the class's defaults filled in.
        config: where the other is, for messages.
        target: the other, from `config_at`.
        sizes: the fields that are sizes.

    Returns:
        (the request, the other fields that differ and that growth has to arrive at: see `require_reached`).

    Raises:
        RequestError: a field that differs and that growth cannot change, by name.
    """
    differ = {k: v for k, v in target.items() if k in source and source[k] != v and k not in _SILENT}
    for name, value in differ.items():
        if name not in sizes and name not in _FOLLOWS:
            raise RequestError(
                f"{config}: {name} is {value!r:.80} and the source's is {source[name]!r:.80}; it is no size, "
                "and growth cannot change it"
            )
    return {k: differ[k] for k in sizes if k in differ}, {k: v for k, v in differ.items() if k in _FOLLOWS}


def require_reached(config: Path, wanted: Mapping[str, Any], grown: Mapping[str, Any]) -> None:
    """Refuse a --to config whose fields, sizes apart, are neither the source's nor the grown model's.

    Args:
        config: the file, for the message.
        wanted: the second result of `towards`.
        grown: the grown model's config, the class's defaults filled in.

    Raises:
        RequestError: naming the field.
    """
    for name, value in wanted.items():
        if grown.get(name) != value:
            raise RequestError(
                f"{config}: {name} is {value!r:.80}, and growth to its sizes makes it {grown.get(name)!r:.80}; "
                "write that value, or the source's own"
            )
