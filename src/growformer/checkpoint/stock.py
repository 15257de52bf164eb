"""What transformers' own classes say of a config.json: its defaults, whether they take it, and the tensors it means."""

import copy
import gc
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from growformer.errors import RequestError


@contextmanager
def _importing() -> Iterator[None]:
    """No search for garbage meanwhile: imports make a million objects that stay, and it looks at them over and over."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


OWN = {"tokenformer": "growformer.models.tokenformer"}
"""Model types whose classes are this package's own: the module that makes them known to transformers."""


def known_type(kind: object) -> bool:
    """Whether transformers has classes for a model type, once this package's own are added to them."""
    from transformers import CONFIG_MAPPING

    if isinstance(kind, str) and kind in OWN:
        importlib.import_module(OWN[kind])
    return isinstance(kind, str) and kind in CONFIG_MAPPING


def class_named(architecture: str) -> Any | None:
    """The model class of a name, transformers' or this package's own; None where neither has one."""
    import transformers

    for module in ("transformers", *OWN.values()):
        found = getattr(importlib.import_module(module), architecture, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None


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
    with _importing():
        cls = _config_class(raw, where)
    return _config(raw, where).to_dict(), cls().to_dict()


def stock_tensors(raw: Mapping[str, Any], where: object = "config.json") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the stock model that a config means; built without memory for weights.

    Args:
        raw: what config.json holds.
        where: the file's name in messages.

    Raises:
        RequestError: transformers cannot build the model, in its own words.
    """
    model = bare_stock(raw, where)
    try:
        head = model.get_output_embeddings()
        at = next((f"{name}.weight" for name, module in model.named_modules() if module is head), "")
        # What is tied is not stored; the head is left in, for a file may hold one of its own.
        tied = set(model.all_tied_weights_keys) - {at}
        kept = {name: x for name, x in model.state_dict().items() if name not in tied}
        return {name: tuple(x.shape) for name, x in disk_names(model, kept).items()}
    except Exception as error:  # the way back through a class's renamings raises what it likes
        raise _unbuilt(error, where) from error


def bare_stock(raw: Mapping[str, Any], where: object = "config.json") -> Any:
    """The stock model that a config means, without memory for weights.

    Raises:
        RequestError: transformers cannot build it, in its own words.
    """
    import torch

    config = _config(raw, where)
    try:
        with _importing():
            cls = stock_class(config)
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # an activation or a rotary type that it does not have is a KeyError, and so on
        raise _unbuilt(error, where) from error


def _unbuilt(error: Exception, where: object) -> RequestError:
    said = f"{type(error).__name__}: {last_line(error)}"
    return RequestError(f"{where}: transformers cannot build the model that it describes: {said}")


def fields_read(raw: Mapping[str, Any]) -> frozenset[str]:
    """The names of config fields that the installed modelling code of a config's model type reads."""
    import importlib.util
    import re

    config = _config_class(raw, "config.json")
    spec = importlib.util.find_spec(config.__module__.replace(".configuration_", ".modeling_"))
    if spec is None or spec.origin is None:
        return frozenset()
    source = Path(spec.origin).read_text(encoding="utf-8")  # reading costs milliseconds, importing seconds
    found = re.findall(r"""config\.(\w+)|getattr\(\s*(?:self\.)?config,\s*["'](\w+)""", source)
    return frozenset(name for pair in found for name in pair if name)


def disk_names(model: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A stock model's tensors under the names, and in the shapes, in which its checkpoint holds them.

    Some classes rename or fuse tensors when they load; transformers knows the way back.
    """
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def stock_class(config: Any) -> Any:
    """The stock class that a config names.

    A checkpoint that names none is taken for the language model of its type: of a sequence from a sequence or from
    speech, masked, or causal; and for the bare backbone where there is none of these (an image model).

    Args:
        config: a config object of transformers.

    Raises:
        KeyError: transformers has no model for it.
    """
    import transformers

    for name in config.architectures or ():
        named = class_named(name)
        if named is not None:
            return named
    sequences = (
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    )
    # Encoders are in the causal table as well, for use as a decoder; only there do they not have to be masked.
    masked = () if getattr(config, "is_decoder", False) else (transformers.MODEL_FOR_MASKED_LM_MAPPING,)
    tables = (*(sequences if config.is_encoder_decoder else masked), transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    for table in tables:
        if type(config) in table:
            return table[type(config)]
    return transformers.MODEL_MAPPING[type(config)]


def _config_class(raw: Mapping[str, Any], where: object) -> Any:
    from transformers import CONFIG_MAPPING

    kind = raw.get("model_type")
    if not known_type(kind):
        raise RequestError(f"{where}: model_type {kind!r} is none that the installed transformers knows")
    return CONFIG_MAPPING[kind]


def _config(raw: Mapping[str, Any], where: object) -> Any:
    cls = _config_class(raw, where)
    for key in ("dtype", "torch_dtype"):
        if not isinstance(raw.get(key), (str, dict, type(None))):  # a dict: one for each part of a model
            raise RequestError(f"{where}: {key}={raw[key]!r} is no name of a dtype, such as 'bfloat16'")
    try:
        return cls.from_dict(copy.deepcopy(dict(raw)))  # some classes move entries of what they are given
    except Exception as error:  # each config class raises what it likes; the text is what a user needs
        raise RequestError(f"{where}: transformers' {cls.__name__} refuses it: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """The line of an error's text that says what is wrong (strict config classes put a heading before it)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1]
