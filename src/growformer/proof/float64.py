"""True float64: stock models built and run with every inner float32 cast turned into float64, and proof that it was.

`model.double()` is not enough: stock norms, softmax and rotary tables cast to float32 inside, which leaves differences
of 1e-7 between two models that compute the same function. Here a function mode widens every cast and creation, and a
dispatch mode beneath it counts each operation that still read or gave a narrow tensor, so that a clean run is measured
and not assumed (design, section 6).
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from growformer.checkpoint.folder import read_json
from growformer.checkpoint.stock import known_type, stock_class
from growformer.errors import SourceError, UncheckedError

__all__ = [
    "Float64",
    "build64",
    "build64_from",
    "require_complete",
    "require_float64",
    "stock_config",
    "stock_model",
    "true_float64",
]

# These give old bytes a new meaning; widening their dtype would corrupt the values instead of sharpening them.
_REINTERPRET: frozenset[Callable[..., Any]] = frozenset({torch.Tensor.view, torch.frombuffer, torch.from_file})

_CAST_NAMES = {"float": "double", "half": "double", "bfloat16": "double", "cfloat": "cdouble", "chalf": "cdouble"}
_CASTS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch.Tensor, narrow): getattr(torch.Tensor, wide) for narrow, wide in _CAST_NAMES.items()
}

_LEGACY_TYPES = ("FloatTensor", "HalfTensor", "BFloat16Tensor")


def _is_narrow(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point and dtype.itemsize < 8) or (dtype.is_complex and dtype.itemsize < 16)


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype) and _is_narrow(value):
        return torch.complex128 if value.is_complex else torch.float64
    return value


class _Widen(TorchFunctionMode):
    """Turns every cast to, and creation in, a dtype narrower than float64 into the same call in float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _REINTERPRET:
            return func(*args, **kwargs)
        if func in _CASTS:
            return _CASTS[func](*args, **kwargs)
        if func in (torch.Tensor.to, torch.Tensor.type_as):
            args, kwargs = _as_device_and_dtype(args, kwargs)
            func = torch.Tensor.to
        elif func is torch.Tensor.type:
            args = tuple(_widen_legacy_type(value) for value in args)
            kwargs = {name: _widen_legacy_type(value) for name, value in kwargs.items()}
        args = tuple(_widen(value) for value in args)
        kwargs = {name: _widen(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _as_device_and_dtype(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Spell `x.to(other)` and `x.type_as(other)` by other's device and dtype, which can then be widened."""
    # The keyword is `tensor` for `to` and `other` for `type_as`.
    other = args[1] if len(args) > 1 else kwargs.get("tensor", kwargs.get("other"))
    if not isinstance(other, torch.Tensor):
        return args, kwargs
    rest = {name: value for name, value in kwargs.items() if name not in ("tensor", "other")}
    return (args[0], other.device, other.dtype, *args[2:]), rest


def _widen_legacy_type(value: Any) -> Any:
    """Widen what `Tensor.type` takes beside a dtype: a name such as 'torch.FloatTensor', or that class itself."""
    if isinstance(value, str) and value.rpartition(".")[2] in _LEGACY_TYPES:
        return torch.float64
    dtype = getattr(value, "dtype", None) if isinstance(value, type) else None
    return _widen(dtype) if isinstance(dtype, torch.dtype) and _is_narrow(dtype) else value


def _any_narrow(tree: Any) -> bool:
    return any(isinstance(x, torch.Tensor) and _is_narrow(x.dtype) for x in tree_leaves(tree))


class Float64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that read or gave a tensor narrower than float64.

    Inputs count as well as results: a float32 table multiplied into a float64 activation gives a float64 result with
    float32 errors in it.

    Attributes:
        leaks: number of calls by operation name; empty when the run was truly float64.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.leaks: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Inputs first: a float32 weight that meets a float64 activation ends the call before it has a result.
        narrow_input = _any_narrow((args, kwargs))
        if narrow_input:
            self.leaks[str(func)] += 1
        result = func(*args, **(kwargs or {}))
        if not narrow_input and _any_narrow(result):
            self.leaks[str(func)] += 1
        return result

    def require_clean(self) -> None:
        """Raise unless every operation so far was float64.

        Raises:
            UncheckedError: some operation read or gave a narrower tensor; the message names each, with its count.
        """
        if self.leaks:
            found = ", ".join(f"{name} ({count}x)" for name, count in sorted(self.leaks.items()))
            raise UncheckedError(
                f"The float64 check is not in float64: these operations read or gave narrower numbers: {found}. "
                "A module outside PyTorch's function overrides (TorchScript, a custom kernel, a table built outside "
                "the check) is the usual cause; build the model with build64 and use eager kernels."
            )


@contextlib.contextmanager
def true_float64(*, strict: bool = True) -> Iterator[Float64]:
    """Inside this context every cast to float32, float16 or bfloat16 (and narrower) gives float64 instead.

    Build the model inside (rotary tables are computed when it is built) and run it inside. The default dtype is float64
    and CPU autocast is off meanwhile.

    Args:
        strict: raise on exit if any operation was narrower; False leaves the judgement to the caller.

    Yields:
        The counter of narrow operations; see `Float64.leaks`.

    Raises:
        UncheckedError: on exit, if strict and anything narrower than float64 appeared; also in place of a RuntimeError
            that PyTorch raised after it appeared.
    """
    counter = Float64()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", enabled=False), counter, _Widen():
            yield counter
    except RuntimeError:
        # PyTorch refuses to mix dtypes; what mixed them is the news.
        if strict:
            counter.require_clean()
        raise
    finally:
        torch.set_default_dtype(default)
    if strict:
        counter.require_clean()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars while a model loads: several are loaded per check, each in a moment."""
    logging = transformers.utils.logging
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def stock_config(source: Path | Mapping[str, Any]) -> transformers.PreTrainedConfig:
    """The stock config object of a checkpoint folder, or of the contents of its config.json.

    Raises:
        SourceError: no config.json, or its model_type is not one that transformers knows.
    """
    name = source if isinstance(source, Path) else "the given config"
    try:
        if isinstance(source, Path):
            # A path that is not there must not be taken for the name of a model on the hub.
            if not (source / "config.json").is_file():
                raise FileNotFoundError("there is no config.json")
            known_type(read_json(source / "config.json").get("model_type"))
            return transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        fields = dict(source)
        known_type(fields["model_type"])
        return transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"No stock model config can be read from {name}: {error}") from error


def stock_model(
    folder: Path | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | str = "auto",
    fields: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """Load a checkpoint with its stock class, from a folder or from tensors under their on-disk names.

    Args:
        folder: a Hugging Face folder with config.json and safetensors files. Left out when `config` and `tensors` are
            given.
        config: what config.json holds.
        tensors: every tensor of the checkpoint, by on-disk name. Those that have the model's dtype already may share
            memory with it, so copy them first if the model's weights will change.
        dtype: dtype of the model; "auto" is the stored one.
        fields: of the (text) config, to be other than config.json has them.
        options: further keywords of `from_pretrained`.

    Returns:
        The model in eval mode, and transformers' loading report (missing_keys, unexpected_keys, mismatched_keys,
        error_msgs).

    Raises:
        SourceError: the folder does not hold a stock checkpoint in safetensors, or a tensor has the wrong shape.
        UncheckedError: the checkpoint is quantised, so its weights cannot be read as numbers.
    """
    stock = stock_config(folder if folder is not None else (config or {}))
    for name, value in (fields or {}).items():
        setattr(stock.get_text_config(), name, value)
    if getattr(stock, "quantization_config", None) is not None:
        raise UncheckedError(
            f"{folder or 'The given config'} is quantised ({stock.quantization_config}): its function cannot be "
            "compared in float64. Dequantise it first (load with transformers, .dequantize(), save_pretrained)."
        )
    state = None if tensors is None else dict(tensors)
    try:
        with _quiet():
            model, report = stock_class(stock).from_pretrained(
                folder if state is None else None,
                config=stock,
                state_dict=state,
                dtype=dtype,
                use_safetensors=None if folder is None else True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, RuntimeError) as error:
        raise SourceError(f"{folder or 'The given tensors'} cannot be loaded by transformers: {error}") from error
    model.eval()
    return model, report


def require_complete(report: Mapping[str, Any], what: str) -> None:
    """Raise unless a loading report names no key.

    Raises:
        UncheckedError: naming the keys that are missing, unexpected or of another shape.
    """
    found = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if found:
        details = "; ".join(f"{kind}: {', '.join(keys[:8])} ({len(keys)} in all)" for kind, keys in found.items())
        raise UncheckedError(
            f"{what} does not hold exactly the tensors that its config.json asks for, so part of the model would be "
            f"random or left out: {details}."
        )


def require_float64(model: torch.nn.Module, what: str) -> None:
    """Raise unless every floating-point parameter and buffer of a model is float64 (or complex128).

    Raises:
        UncheckedError: naming those that are narrower.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    narrow = [name for name, tensor in named if _is_narrow(tensor.dtype)]
    if narrow:
        raise UncheckedError(
            f"{what} is not in float64: {', '.join(narrow[:8])} ({len(narrow)} in all) are narrower; use build64."
        )


def build64(folder: Path, fields: Mapping[str, Any] | None = None) -> transformers.PreTrainedModel:
    """Build a folder's stock model in true float64: weights, buffers and rotary tables.

    Attention and experts are eager, which every stock model has and which alone is transparent to the check. Upcasting
    stored weights to float64 is exact.

    Args:
        folder: a Hugging Face folder with config.json and safetensors files.
        fields: of its (text) config, to be other than config.json has them (a shorter window).

    Returns:
        The model in eval mode. Run it inside `true_float64` as well: its forward pass casts too.

    Raises:
        SourceError: the folder is not a stock checkpoint in safetensors.
        UncheckedError: tensors are missing, unexpected, quantised, or were not read or computed in float64.
    """
    return _build64(str(folder), folder=folder, fields=fields)


def build64_from(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> transformers.PreTrainedModel:
    """Build a stock model in true float64 from tensors in memory (weights pulled back to the source, for one).

    Args:
        config: what config.json holds.
        tensors: every tensor of the checkpoint, by on-disk name; copied, never aliased.

    Returns:
        The model in eval mode.

    Raises:
        SourceError: the config is unknown, or a tensor has the wrong shape.
        UncheckedError: as for `build64`.
    """
    # Upcast outside the mode, where a float32 input is no leak: the upcast itself is exact.
    wide = {name: x.to(torch.float64 if x.is_floating_point() else x.dtype, copy=True) for name, x in tensors.items()}
    return _build64("The given tensors", config=config, tensors=wide)


def _build64(what: str, **source: Any) -> transformers.PreTrainedModel:
    with true_float64():
        model, report = stock_model(
            dtype=torch.float64, attn_implementation="eager", experts_implementation="eager", **source
        )
    require_complete(report, what)
    require_float64(model, what)
    return model
