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
from growformer.errors import UncheckedError
from growformer.planning import Applier, Plan
from growformer.proof.certificate import FileTensors
from growformer.proof.equations import Tensors, pieces, read_rows
from growformer.proof.float64 import model_class, require_complete, require_float64, stock_config, true_float64
from growformer.proof.functional import Inputs, logits

__all__ = ["BLOCK", "Planned", "key_report", "logits64_from", "logits64_offloaded"]

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
        start, stop = (0, tensor.shape[0]) if rows is None else (rows.start, rows.stop)
        return self._applier.piece(tensor, start, stop)


def logits64_offloaded(folder: Path, tokens: Inputs, prefix: str = "", *, memory: int = BLOCK) -> Tensor:
    """A folder's output in true float64, for models whose weights do not fit in memory.

    Args:
        folder: a Hugging Face folder with config.json and safetensors files.
        tokens: [sequence, position] token ids, or other inputs by keyword; one forward pass for all of them, for each
            pass reads every weight.
        prefix: the part of the module's names that a bare backbone's tensors leave out; "" is the class's own.
        memory: bytes of a linear layer's weights that are held at once.

    Returns:
        [sequence, position, vocab] logits in float64; the last hidden states of a model without a head.

    Raises:
        SourceError: the folder is not a stock checkpoint in safetensors.
        UncheckedError: as `build64`; or the model uses a weight in a way that cannot be loaded in time.
    """
    with TensorFiles.open(folder) as files:
        return logits64_from(folder, FileTensors(files), tokens, prefix, memory=memory)


def logits64_from(
    config: Path | Mapping[str, Any], tensors: Tensors, tokens: Inputs, prefix: str = "", *, memory: int = BLOCK
) -> Tensor:
    """`logits64_offloaded` for any source of named tensors.

    Args:
        config: a folder with config.json, or what that holds.
        tensors: every tensor of the checkpoint by its name on disk; read by rows, many times.
        tokens, prefix, memory: see `logits64_offloaded`.
    """
    if not isinstance(tokens, Tensor):
        tokens = {name: x.double() if x.is_floating_point() else x for name, x in tokens.items()}
    count = len(tokens if isinstance(tokens, Tensor) else next(iter(tokens.values())))
    # Weights are read in a thread of their own, which the modes of true_float64 do not reach: there, a stored float32
    # is no leak (upcasting it is exact), and the draws of new weights are float32 on purpose.
    with ThreadPoolExecutor(1) as reader, true_float64():
        model, match = _matched(config, tensors, prefix)
        what = str(config) if isinstance(config, Path) else "The given tensors"
        require_complete(match.wrong, what)
        require_float64(model, what)
        loader = _Loader(tensors, reader, memory)
        for name, module in model.named_modules():
            names = [own for own, _ in module.named_parameters(recurse=False)]
            loader.attach(module, {own: match.disk[f"{name}.{own}".lstrip(".")] or "" for own in names})
        with _NoMeta(type(model).__name__):
            return logits(model, tokens, batch=count, device=torch.device("cpu"))


def key_report(folder: Path, prefix: str = "") -> dict[str, Any]:
    """`functional.load_report` by names and shapes alone: nothing is loaded.

    Returns:
        missing_keys, unexpected_keys, mismatched_keys, error_msgs (lists of text); `tied`: whether the output
        embeddings are the input embeddings (None without output embeddings).
    """
    with TensorFiles.open(folder) as files, true_float64():
        model, match = _matched(folder, FileTensors(files), prefix)
    head, tied = model.get_output_embeddings(), None
    if head is not None:
        names = {id(module): name for name, module in model.named_modules()}
        both = [match.disk.get(f"{names[id(m)]}.weight") for m in (head, model.get_input_embeddings())]
        tied = both[0] == both[1]
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
    """Parameters of a model, with the names of tensors on disk; and what does not belong together."""

    disk: Mapping[str, str | None]
    wrong: Mapping[str, list[str]]


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
        model = model_class(stock)._from_config(
            stock, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
    model.eval()
    return model, _match(model, tensors, prefix or f"{model.base_model_prefix}.")


def _match(model: transformers.PreTrainedModel, tensors: Tensors, prefix: str) -> _Match:
    names, shapes, shared = set(tensors.names), dict[str, Tensor](), dict[int, list[str]]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = parameter
        shared.setdefault(id(parameter), []).append(name)
    # As stock loading has it: names with or without the prefix; a tied tensor that is there all the same counts.
    own = {
        name: next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), None) for name in shapes
    }
    disk = {
        name: own[name] or next(filter(None, (own[other] for other in shared[id(parameter)])), None)
        for name, parameter in shapes.items()
    }
    stored = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    spare = names - set(disk.values())
    wrong = {
        "missing_keys": sorted([name for name, found in disk.items() if found is None] + list(stored)),
        "unexpected_keys": sorted(name for name in spare if not any(re.search(text, name) for text in ignored)),
        "mismatched_keys": sorted(
            f"{name} ({list(tensors.shape(found))}, the class has {list(shapes[name].shape)})"
            for name, found in disk.items()
            if found is not None and tuple(tensors.shape(found)) != tuple(shapes[name].shape)
        ),
    }
    return _Match(disk, wrong)


class _Loader:
    """Gives modules their weights while they run."""

    def __init__(self, tensors: Tensors, reader: ThreadPoolExecutor, memory: int) -> None:
        self._tensors, self._reader, self._memory = tensors, reader, memory

    def attach(self, module: nn.Module, named: Mapping[str, str]) -> None:
        """Make a module read its own parameters, by these names on disk, whenever it runs."""
        if not named:
            return
        # A subclass may do anything in its forward, so only the two classes themselves are run in parts.
        if type(module) is nn.Embedding and module.max_norm is None:
            module.forward = partial(self._embedding, named["weight"])  # type: ignore[method-assign]
        elif type(module) is nn.Linear:
            module.forward = partial(self._linear, named["weight"], named.get("bias"))  # type: ignore[method-assign]
        else:
            empty = {own: getattr(module, own) for own in named}
            module.register_forward_pre_hook(lambda module, args: self._load(module, named))
            module.register_forward_hook(lambda module, args, output: _put(module, empty), always_call=True)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor in float64, of no more memory than they take and one piece as stored."""
        return self._reader.submit(_wide, self._tensors, name, start, stop).result()

    def _load(self, module: nn.Module, named: Mapping[str, str]) -> None:
        for own, name in named.items():
            _put(module, {own: nn.Parameter(self.read(name, 0, self._tensors.shape(name)[0]), requires_grad=False)})

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


def _wide(tensors: Tensors, name: str, start: int, stop: int) -> Tensor:
    """Rows of a tensor in float64."""
    shape = (stop - start, *tensors.shape(name)[1:])
    out = torch.empty(shape, dtype=torch.float64)
    for rows in pieces(shape):
        out[rows] = tensors.read(name, slice(start + rows.start, start + rows.stop))
    return out
