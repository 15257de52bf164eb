"""True float64 for models larger than memory: each module's weights are read when it runs, and dropped after.

The stock model is built with parameters on the meta device and real buffers (a rotary table is computed when it is
built). Linear layers run in blocks of rows and embeddings read the rows of their tokens, so that neither a vocabulary
nor a wide layer has to fit; any other module's parameters are held whole while it runs.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from growformer.checkpoint import TensorFiles
from growformer.checkpoint.stock import disk_names, stock_class
from growformer.errors import UncheckedError
from growformer.planning import Applier, Plan
from growformer.proof.certificate import FileTensors
from growformer.proof.equations import Tensors, pieces, read_rows, same
from growformer.proof.float64 import require_complete, require_float64, stock_config, true_float64
from growformer.proof.functional import Attach, wide
from growformer.proof.inputs import Inputs, as_batches
from growformer.proof.outputs import outputs

__all__ = ["BLOCK", "Planned", "key_report", "outputs64_from", "outputs64_offloaded"]

BLOCK = 256 << 20
"""Bytes of a linear layer's weights that are held at once in float64, where nothing smaller is asked for."""


class Planned:
    """The target's tensors as a plan makes them of a source upcast to float64, made when they are read."""

    def __init__(self, plan: Plan, source: Tensors) -> None:
        self._plan = plan
        self._applier = Applier(plan, lambda name, rows: source.read(name, rows).double(), torch.float64)

    @property
    def names(self) -> list[str]:
        return [tensor.name for tensor in self._plan.tensors]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._plan.by_name[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float64

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self._plan.by_name[name]
        start, stop = (0, tensor.shape[0] if tensor.shape else 1) if rows is None else (rows.start, rows.stop)
        return self._applier.piece(tensor, start, stop)


def outputs64_offloaded(
    folder: Path,
    inputs: Inputs,
    prefix: str = "",
    *,
    memory: int = BLOCK,
    attach: Attach | None = None,
) -> dict[str, Tensor]:
    """A folder's outputs in true float64, for models whose weights do not fit in memory.

    Args:
        folder: a Hugging Face folder with config.json and safetensors files.
        inputs: see `Inputs`; one forward pass for each batch, for each pass reads every weight.
        prefix: the part of the module's names that a bare backbone's tensors leave out; "" is the class's own.
        memory: bytes of a linear layer's weights that are held at once.
        attach: what is done to the model before it runs (hooks).

    Returns:
        Every output, by name.

    Raises:
        SourceError: the folder is not a stock checkpoint in safetensors.
        UncheckedError: as `build64`; or the model uses a weight in a way that cannot be loaded in time.
    """
    with TensorFiles.open(folder) as files:
        return outputs64_from(folder, FileTensors(files), inputs, prefix, memory=memory, attach=attach)


def outputs64_from(
    config: Path | Mapping[str, Any],
    tensors: Tensors,
    inputs: Inputs,
    prefix: str = "",
    *,
    memory: int = BLOCK,
    attach: Attach | None = None,
) -> dict[str, Tensor]:
    """`outputs64_offloaded` for any source of named tensors.

    Args:
        config: a folder with config.json, or what that holds.
        tensors: every tensor of the checkpoint by its name on disk; read by rows, many times.
        inputs, prefix, memory, attach: see `outputs64_offloaded`.
    """
    batches = wide(inputs)
    count = max(len(x) for batch in as_batches(batches) for x in batch.inputs.values())
    # Weights are read in a thread of their own, which the modes of true_float64 do not reach: there, a stored float32
    # is no leak (upcasting it is exact), and the draws of new weights are float32 on purpose.
    with ThreadPoolExecutor(1) as reader, true_float64():
        model, match = _matched(config, tensors, prefix)
        what = str(config) if isinstance(config, Path) else "The given tensors"
        require_complete(match.wrong, what)
        require_float64(model, what)
        loader = _Loader(tensors, reader, memory)
        for name, module in model.named_modules():
            full = {own: f"{name}.{own}".lstrip(".") for own, _ in module.named_parameters(recurse=False)}
            loader.attach(module, {own: match.fused.get(n) or match.disk[n] or "" for own, n in full.items()})
        for name, stored in match.buffers.items():
            model.get_buffer(name).copy_(loader.whole(stored))
        if attach is not None:
            attach(model)
        with _NoMeta(type(model).__name__):
            return outputs(model, batches, batch=count, device=torch.device("cpu"))


def key_report(folder: Path, prefix: str = "") -> dict[str, Any]:
    """`functional.load_report` by names and shapes alone: nothing is loaded.

    Returns:
        missing_keys, unexpected_keys, mismatched_keys, error_msgs (lists of text); `tied`: whether the output
        embeddings are the input embeddings (None without output embeddings).
    """
    with TensorFiles.open(folder) as files:
        tensors = FileTensors(files)
        with true_float64():
            model, match = _matched(folder, tensors, prefix)
        head, tied = model.get_output_embeddings(), None
        if head is not None:
            names = {id(module): name for name, module in model.named_modules()}
            embedding = model.get_input_embeddings()
            a, b = (match.disk.get(f"{names[id(m)]}.weight") for m in (head, embedding))
            # As stock loading has it: where both are on disk, tied only if they are equal.
            tied = a == b or bool(a and b and head.weight is embedding.weight and same(tensors, a, b))
    return {**match.wrong, "error_msgs": [], "tied": tied}


class _NoMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operations on weights that are not there.

    PyTorch refuses some itself, but a matrix product with a meta tensor gives whatever memory held.
    """

    def __init__(self, model: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs))):
            raise UncheckedError(
                f"{self._model} uses a weight outside the module that has it ({func}), so it cannot be run from disk: "
                "all its weights in float64 must fit in memory"
            )
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Match:
    """Parameters and stored buffers of a model, with their names on disk; and what does not belong together."""

    disk: Mapping[str, str | None]
    fused: Mapping[str, _Fused]
    buffers: Mapping[str, str]
    wrong: Mapping[str, list[str]]


@dataclass(frozen=True)
class _Fused:
    """A parameter that several tensors on disk make up, or one in another shape (experts).

    Attributes:
        model: the stock model, which knows how.
        name: of the parameter.
        shape: of the parameter.
        disk: for each name that transformers would save a part under, the name on disk.
    """

    model: transformers.PreTrainedModel
    name: str
    shape: tuple[int, ...]
    disk: Mapping[str, str]

    def parts(self) -> dict[str, Tensor]:
        """For each part, where its entries stand in the parameter laid out flat."""
        count = torch.Size(self.shape).numel()
        numbers = torch.arange(count, dtype=torch.float64).view(self.shape)  # whole numbers are exact up to 2^53
        return {self.disk[name]: x.long() for name, x in disk_names(self.model, {self.name: numbers}).items()}


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory, and buffers as ever."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # a shared one stays the one it is
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook: Callable[..., Any] = on_meta  # torch's own annotation forbids what its documentation offers: an answer
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _matched(
    config: Path | Mapping[str, Any], tensors: Tensors, prefix: str
) -> tuple[transformers.PreTrainedModel, _Match]:
    """The stock model without weights, and where they are; call it inside `true_float64`."""
    stock = stock_config(config)
    if getattr(stock, "quantization_config", None) is not None:
        raise UncheckedError(f"{config} is quantised: its function cannot be compared in float64. Dequantise it first.")
    with _parameters_on_meta():
        model = stock_class(stock)._from_config(
            stock, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
    model.eval()
    return model, _match(model, tensors, prefix or f"{model.base_model_prefix}.")


def _match(model: transformers.PreTrainedModel, tensors: Tensors, prefix: str) -> _Match:
    names, shapes, shared = set(tensors.names), dict[str, Tensor](), dict[int, list[str]]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = parameter
        shared.setdefault(id(parameter), []).append(name)

    def stored_as(name: str) -> str | None:
        """As stock loading has it: names with or without the prefix."""
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), None)

    own, fused = {}, {}
    for name, parameter in shapes.items():
        own[name] = stored_as(name)
        if own[name] is None:
            parts = {n: (stored_as(n), x.shape) for n, x in disk_names(model, {name: parameter}).items()}
            there = {n: at for n, (at, _) in parts.items() if at is not None}
            if len(there) == len(parts) == 1 and [shape for _, shape in parts.values()] == [parameter.shape]:
                own[name] = next(iter(there.values()))  # another name
            elif len(there) == len(parts):
                fused[name] = _Fused(model, name, tuple(parameter.shape), there)
    # A tied tensor that is there all the same counts.
    disk = {
        name: own[name] or next(filter(None, (own[other] for other in shared[id(parameter)])), None)
        for name, parameter in shapes.items()
    }
    kept = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    buffers = {name: found for name in kept if (found := stored_as(name)) is not None}
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    spare = names - set(disk.values()) - set(buffers.values())
    spare -= {part for one in fused.values() for part in one.disk.values()}
    wrong = {
        "missing_keys": sorted(
            [name for name, found in disk.items() if found is None and name not in fused] + list(kept - set(buffers))
        ),
        "unexpected_keys": sorted(name for name in spare if not any(re.search(text, name) for text in ignored)),
        "mismatched_keys": sorted(
            f"{name} ({list(tensors.shape(found))}, the class has {list(shapes[name].shape)})"
            for name, found in disk.items()
            if found is not None and tuple(tensors.shape(found)) != tuple(shapes[name].shape)
        ),
    }
    return _Match(disk, fused, buffers, wrong)


class _Loader:
    """Gives modules their weights while they run."""

    def __init__(self, tensors: Tensors, reader: ThreadPoolExecutor, memory: int) -> None:
        self._tensors, self._reader, self._memory = tensors, reader, memory

    def attach(self, module: nn.Module, named: Mapping[str, str | _Fused]) -> None:
        """Make a module read its own parameters, by these names on disk, whenever it runs."""
        if not named:
            return
        plain = {own: name for own, name in named.items() if isinstance(name, str)}
        # A subclass may do anything in its forward, so only the two classes themselves are run in parts.
        if type(module) is nn.Embedding and module.max_norm is None and plain == named:
            module.forward = partial(self._embedding, plain["weight"])  # type: ignore[method-assign]
        elif type(module) is nn.Linear and plain == named:
            module.forward = partial(self._linear, plain["weight"], plain.get("bias"))  # type: ignore[method-assign]
        else:
            empty = {own: getattr(module, own) for own in named}
            module.register_forward_pre_hook(lambda module, args: self._load(module, named))
            module.register_forward_hook(lambda module, args, output: _put(module, empty), always_call=True)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor in float64, of no more memory than they take and one piece as stored."""
        return self._reader.submit(_wide, self._tensors, name, start, stop).result()

    def whole(self, name: str | _Fused) -> Tensor:
        """A tensor in float64, put together where it is fused."""
        if isinstance(name, _Fused):
            out = torch.empty(torch.Size(name.shape).numel(), dtype=torch.float64)
            for part, at in name.parts().items():
                out[at.flatten()] = self.whole(part).flatten()
            return out.view(name.shape)
        shape = self._tensors.shape(name)
        return self._reader.submit(_scalar, self._tensors, name).result() if not shape else self.read(name, 0, shape[0])

    def _load(self, module: nn.Module, named: Mapping[str, str | _Fused]) -> None:
        for own, name in named.items():
            _put(module, {own: nn.Parameter(self.whole(name), requires_grad=False)})

    def _embedding(self, weight: str, input: Tensor) -> Tensor:
        ids, places = torch.unique(input, return_inverse=True)
        rows = self._reader.submit(lambda: read_rows(self._tensors, weight, ids).double()).result()
        return F.embedding(places, rows)

    def _linear(self, weight: str, bias: str | None, input: Tensor) -> Tensor:
        count, width = self._tensors.shape(weight)
        step = max(1, self._memory // (8 * max(width, 1)))
        out = input.new_empty((*input.shape[:-1], count))
        for start in range(0, count, step):
            stop = min(start + step, count)
            added = None if bias is None else self.read(bias, start, stop)
            out[..., start:stop] = F.linear(input, self.read(weight, start, stop), added)
        return out


def _put(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for own, parameter in parameters.items():
        setattr(module, own, parameter)


def _scalar(tensors: Tensors, name: str) -> Tensor:
    return tensors.read(name).double()


def _wide(tensors: Tensors, name: str, start: int, stop: int) -> Tensor:
    """Rows of a tensor in float64."""
    shape = (stop - start, *tensors.shape(name)[1:])
    out = torch.empty(shape, dtype=torch.float64)
    for rows in pieces(shape):
        out[rows] = tensors.read(name, slice(start + rows.start, start + rows.stop))
    return out
