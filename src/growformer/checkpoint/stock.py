"""What transformers' own classes say of a config.json: its defaults, whether they take it, and the tensors it means."""

from collections.abc import Mapping
from typing import Any

from growformer.errors import RequestError


def full_config(raw: Mapping[str, Any], where: object = "config.json") -> tuple[dict[str, Any], dict[str, Any]]:
    """A config with the class's defaults filled in, and the defaults alone.

    Args:
        raw: what config.json holds.
        where: the file's name in messages.

    Returns:
        (the whole config, the class's config without arguments), as plain data.

    Raises:
        RequestError: transformers does not know the model type, or its class refuses the config, in its own words.
    """
    cls = _config_class(raw, where)
    return _config(raw, where).to_dict(), cls().to_dict()


def stock_tensors(raw: Mapping[str, Any], where: object = "config.json") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the stock model that a config means; built without memory for weights.

    Args:
        raw: what config.json holds; where it names no architecture, a causal language model is meant.
        where: the file's name in messages.

    Raises:
        RequestError: transformers cannot build the model, in its own words.
    """
    import torch
    import transformers

    config = _config(raw, where)
    named = [getattr(transformers, name, None) for name in raw.get("architectures") or ()]
    try:
        cls = next(filter(None, named), None) or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            return {name: tuple(x.shape) for name, x in cls(config).state_dict().items()}
    except Exception as error:  # an activation or a rotary type that it does not have is a KeyError, and so on
        said = f"{type(error).__name__}: {last_line(error)}"
        raise RequestError(f"{where}: transformers cannot build the model that it describes: {said}") from error


def _config_class(raw: Mapping[str, Any], where: object) -> Any:
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise RequestError(f"{where}: model_type {kind!r} is none that the installed transformers knows")
    return CONFIG_MAPPING[kind]


def _config(raw: Mapping[str, Any], where: object) -> Any:
    cls = _config_class(raw, where)
    for key in ("dtype", "torch_dtype"):
        if not isinstance(raw.get(key), (str, dict, type(None))):  # a dict: one for each part of a model
            raise RequestError(f"{where}: {key}={raw[key]!r} is no name of a dtype, such as 'bfloat16'")
    try:
        return cls.from_dict(dict(raw))
    except Exception as error:  # each config class raises what it likes; the text is what a user needs
        raise RequestError(f"{where}: transformers' {cls.__name__} refuses it: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """The line of an error's text that says what is wrong (strict config classes put a heading before it)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1]
