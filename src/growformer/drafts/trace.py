"""A forward pass watched: which channels each tensor's dims are, and what writes, reads, norms and attends to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from growformer.drafts.nodes import Dim, Node, align, fresh

_BENT = (
    "gelu",
    "silu",
    "tanh",
    "relu",
    "sigmoid",
    "hardswish",
    "elu",
    "leaky_relu",
    "silu_",
    "relu_",
    "mish",
    "softplus",
)


@dataclass(frozen=True)
class Info:
    """What is known of one tensor.

    Attributes:
        dims: its dims as products of nodes.
        param: the parameter that it is (a view of), or "".
        made: the nodes that the last weights before it wrote it by, with the cuts since.
        writers: those weights.
        scale: the product of the numbers that it was multiplied by since.
        scores: the dot products that it was made of since.
        probs: these are the weights of those dot products.
        normed: the norm that gave it, or "".
        stream: it is a residual stream.
        bent: an activation stands between its writers and it.
        past: every weight that anything it was computed from came through.
    """

    dims: tuple[Dim, ...]
    param: str = ""
    made: frozenset[Node] = frozenset()
    writers: frozenset[str] = frozenset()
    scale: float = 1.0
    scores: frozenset[int] = frozenset()
    probs: bool = False
    normed: str = ""
    stream: bool = False
    bent: bool = False
    past: frozenset[str] = frozenset()


@dataclass
class Score:
    """One dot product of queries and keys; `used` once a softmax was taken of it."""

    query: Info
    key: Info
    axis: Dim
    heads: Dim
    scale: float = 1.0
    used: bool = False
    value: Info | None = None
    queries: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass
class Added:
    """One sum of two tensors; `stream`: it is the residual stream."""

    left: Info
    right: Info
    stream: bool


@dataclass
class Normed:
    """One call of a norm module."""

    name: str
    before: Info
    dim: Dim
    shape: tuple[int, ...]


@dataclass
class Trace:
    """What a forward pass showed.

    Attributes:
        params: every parameter's dims.
        reads: by parameter, what it was multiplied with.
        outer: by weight, whether it is used as [in, out] (True) or [out, in].
        scores, adds, norms: in order.
        scales: by weight, what its output had been multiplied by when it met the stream.
        streams: the last dims of sums on the stream; residual: those to which what was computed from them was added.
        scaled: by weight, the vector that its output was multiplied by, channel by channel.
        touched: every parameter that some operation took.
        sides: of every sum on a stream, its last dim, and by which parameters each side came.
        guests: the parameters of other classes' own.
    """

    params: dict[str, tuple[Dim, ...]] = field(default_factory=dict)
    reads: dict[str, Info] = field(default_factory=dict)
    reading: dict[str, int] = field(default_factory=dict)
    writing: dict[str, int] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    adds: list[Added] = field(default_factory=list)
    norms: list[Normed] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=dict)
    streams: list[Dim] = field(default_factory=list)
    residual: list[Dim] = field(default_factory=list)
    scaled: dict[str, str] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    sides: list[tuple[Dim, frozenset[str], frozenset[str]]] = field(default_factory=list)
    used: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    guests: set[str] = field(default_factory=set)


@dataclass
class Guest:
    """A model that shares parameters with the one that is watched.

    Attributes:
        model, given: the model and its inputs.
        own: the parameters and buffers that it does not share, by name.
        lead: what names of its modules leave out.
        loose: shared tensors of heads, which may be called the same and yet read something else.
        ran: it could be run, and read each of those as the model does.
    """

    model: Any
    given: Mapping[str, Any]
    own: Mapping[str, torch.Tensor]
    lead: str = ""
    loose: frozenset[str] = frozenset()
    ran: bool = False


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every operation of a forward pass in `trace`."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.known: dict[int, tuple[torch.Tensor, Info]] = {}
        self.hooks: list[Any] = []
        self.loose = frozenset[str]()
        self.meet(dict([*model.named_parameters(), *model.named_buffers()]))
        self.hook(model)

    def meet(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give every dim of the tensors a node of its own."""
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                dims = tuple(fresh(n) for n in tensor.shape)
                self.trace.params[name] = dims
                self.keep(tensor, Info(dims, param=name))

    def hook(self, model: Any, lead: str = "") -> None:
        """Note calls of the norms of a model, whose names leave out `lead`."""
        for name, module in model.named_modules():
            if is_norm(name, module):
                self.hooks.append(module.register_forward_hook(self._norm(lead + name), with_kwargs=True))

    def host(self, guest: Guest) -> None:
        """Watch another model for its own parameters alone: what it shares was seen before."""
        trace = self.trace
        self.meet(guest.own)
        trace.guests |= set(guest.own)
        self.hook(guest.model, guest.lead)
        lists: list[list[Any]] = [
            trace.scores, trace.adds, trace.norms, trace.streams, trace.residual, trace.sides
        ]  # fmt: skip
        sizes = [len(seen) for seen in lists]
        self.loose = guest.loose
        try:
            with self:
                guest.model(**guest.given)
            guest.ran = True
        except Exception:  # whatever a class raises, it is a no
            guest.ran = False
        self.loose = frozenset()
        for seen, size in zip(lists, sizes, strict=True):
            del seen[size:]

    def _norm(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            if isinstance(given, torch.Tensor) and isinstance(out, torch.Tensor):
                before = self.of(given)
                # A norm may see (heads key) flattened or per head: the dims that it is over are the last.
                self.trace.norms.append(Normed(name, before, before.dims[-1], tuple(given.shape)))
                after = self.of(out)
                self.keep(
                    out,
                    replace(
                        after,
                        normed=name,
                        made=before.made,
                        writers=before.writers,
                        bent=before.bent,
                        stream=False,
                        scale=before.scale,
                        past=before.past | after.past,
                    ),
                )

        return hook

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def of(self, tensor: torch.Tensor) -> Info:
        found = self.known.get(id(tensor))
        if found is not None and len(found[1].dims) == tensor.dim():
            return found[1]
        return Info(tuple(fresh(n) for n in tensor.shape))

    def keep(self, tensor: torch.Tensor, info: Info) -> None:
        self.known[id(tensor)] = (tensor, info)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        outs = out if isinstance(out, (tuple, list)) else [out]
        tensors = [x for x in outs if isinstance(x, torch.Tensor)]
        if tensors:
            given = [self.of(x) for x in _tensors((*args, *(kwargs or {}).values()))]
            self.trace.touched |= {i.param for i in given}
            past = frozenset[str]().union(*(i.past | ({i.param} - {""}) for i in given))
            for tensor, info in zip(tensors, self.follow(name, args, kwargs or {}, tensors), strict=False):
                if len(info.dims) == tensor.dim():
                    self.keep(tensor, replace(info, past=frozenset() if info.param else past))
        return out

    def follow(self, name: str, args: Any, kwargs: Any, outs: Sequence[torch.Tensor]) -> list[Info]:
        """What is known of the results of one operation."""
        from growformer.drafts.ops import OPS

        rule = OPS.get(name)
        if rule is not None:
            found = rule(self, args, kwargs, outs)
            return found if isinstance(found, list) else [found]
        given = _tensors((*args, *kwargs.values()))
        return [self.pointwise(name, given, out, args) for out in outs]

    def pointwise(self, name: str, given: Sequence[torch.Tensor], out: torch.Tensor, args: Sequence[Any]) -> Info:
        """Dims that stand over each other are the same channels."""
        infos = [self.of(x) for x in given]
        fitting = [i for i, x in zip(infos, given, strict=True) if _broadcasts(x.shape, out.shape)]
        for i in infos:
            if i.param and len(infos) > 1:
                self.trace.used.setdefault(i.param, name.rstrip("_"))
        if not fitting:
            reduced = next((i for i, x in zip(infos, given, strict=True) if x.dim() == out.dim()), None)
            dims = tuple(
                d if reduced is not None and given[infos.index(reduced)].shape[k] == n else fresh(n)
                for k, (d, n) in enumerate(zip(reduced.dims if reduced else [()] * out.dim(), out.shape, strict=True))
            )
            return Info(dims)
        dims = self.over(fitting, out.shape)
        data = [i for i in fitting if not i.param] or fitting
        made = frozenset[Node]().union(*(i.made for i in data))
        first = data[0]
        info = Info(
            dims,
            made=made,
            writers=frozenset[str]().union(*(i.writers for i in data)),
            scale=first.scale,
            scores=frozenset[int]().union(*(i.scores for i in data)),
            normed=first.normed,
            bent=any(i.bent for i in data if i.dims and i.dims[-1])
            or name in _BENT
            or name.startswith(("gelu", "silu")),
            stream=any(i.stream for i in data) if len(data) == 1 else False,
            param=first.param if not [i for i in fitting if not i.param] and len(fitting) == 1 else "",
        )
        if name in ("mul", "mul_", "div", "div_"):
            info = replace(info, scale=first.scale * self.number(name, args), scores=info.scores)
            vectors = [i.param for i, x in zip(infos, given, strict=True) if i.param and x.dim() == 1 and x.numel() > 1]
            if len(vectors) == 1 and len(data) == 1 and not data[0].stream and not data[0].normed:
                for writer in data[0].writers:
                    self.trace.scaled.setdefault(writer, vectors[0])
            live = [i for i, x in zip(infos, given, strict=True) if x.numel() > 1]
            if len(live) == 1:
                info = replace(
                    info,
                    stream=live[0].stream,
                    normed=live[0].normed,
                    made=live[0].made,
                    bent=live[0].bent,
                    writers=live[0].writers,
                )
            elif len([i for i in live if not i.param]) > 1:
                # A table of angles was divided by what it likes; only what came of weights counts.
                scales = [i.scale for i in data if i.past or i.param] or [1.0]
                info = replace(info, scale=max(scales, key=lambda s: abs(s - 1)), stream=False)
        elif name in ("add", "add_", "sub", "index_add", "index_add_") and len(data) > 1:
            info = self.add(data, info)
        return info

    def over(self, infos: Sequence[Info], shape: Sequence[int]) -> tuple[Dim, ...]:
        dims: list[Dim] = []
        for k in range(1, len(shape) + 1):
            at = [i.dims[-k] for i in infos if len(i.dims) >= k and i.dims[-k]]
            for other in at[1:]:
                align(at[0], other)
            dims.append(at[0] if at else fresh(shape[-k]))
        return tuple(reversed(dims))

    def add(self, data: Sequence[Info], info: Info) -> Info:
        a, b = data[0], data[1]
        # x + f(x): one side was computed from the other.
        residual = bool(a.past and b.past) and (a.past < b.past or b.past < a.past) and not (a.scores or b.scores)
        stream = a.stream or b.stream or bool(a.normed and self.streamed(a)) or bool(b.normed and self.streamed(b))
        if residual and info.dims[-1]:
            self.trace.residual.append(info.dims[-1])
            stream = True
        self.trace.adds.append(Added(a, b, stream))
        if stream:
            for i in (a, b):
                for writer in i.writers:
                    if not i.stream or writer not in self.trace.scales:
                        self.trace.scales.setdefault(writer, i.scale)
            self.trace.streams.append(info.dims[-1])
            if a.dims[-1] and b.dims[-1]:
                self.trace.sides.append((info.dims[-1], a.past, b.past))
            return replace(info, stream=True, normed="", scale=1.0, writers=a.writers | b.writers)
        if bool(a.scores) != bool(b.scores):  # a bias on scores says nothing of their scale
            return replace(info, normed="", scale=(a if a.scores else b).scale)
        return replace(info, normed="", scale=max((a.scale, b.scale), key=lambda s: abs(s - 1)))

    def number(self, name: str, args: Sequence[Any]) -> float:
        """By what a product or quotient multiplies; 1 where that is computed from the data."""
        for x in args[:2]:
            value = 1.0
            if isinstance(x, (int, float)) and not isinstance(x, bool):
                value = float(x)
            elif isinstance(x, torch.Tensor) and x.numel() == 1 and not self.of(x).writers and x.dim() < 2:
                with torch.utils._python_dispatch._disable_current_modes():
                    value = float(x)
            else:
                continue
            return value if name.startswith("mul") else 1 / value if value else 1.0
        return 1.0

    def streamed(self, info: Info) -> bool:
        """The norm that gave it read the stream."""
        return any(n.name == info.normed and n.before.stream for n in self.trace.norms)


def _tensors(args: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among the arguments of an operation, and in the lists among them."""
    inner = [y for x in args if isinstance(x, (list, tuple)) for y in x]
    return [x for x in (*args, *inner) if isinstance(x, torch.Tensor)]


def _broadcasts(shape: Sequence[int], out: Sequence[int]) -> bool:
    if len(shape) > len(out):
        return False
    pairs = zip(reversed(shape), reversed(out), strict=False)
    return all(n in (1, m) for n, m in pairs)


def is_norm(name: str, module: Any) -> bool:
    """Whether a module normalises: by what it is called; that it does is measured later."""
    called = f"{type(module).__name__} {name.rpartition('.')[2]}".lower()
    return not list(module.children()) and ("norm" in called or "ln_" in called) and "identity" not in called


def watch(model: Any, inputs: Mapping[str, Any], guests: Iterable[Guest] = ()) -> Trace:
    """Run `model` once, then its guests (which may be made only then), and say what was seen."""
    mode = Watch(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), mode:
            model(**inputs)
        with torch.no_grad():
            for guest in guests:
                mode.host(guest)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        mode.close()
    return mode.trace
