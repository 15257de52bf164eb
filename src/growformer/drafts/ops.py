"""What each operation does to the dims of a tensor; every other one is taken to work entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from growformer.drafts.nodes import Dim, Node, align, fresh, regroup
from growformer.drafts.trace import Info, Score, Watch

Rule = Callable[[Watch, Sequence[Any], Any, Sequence[torch.Tensor]], Info | list[Info]]


def _dim(args: Sequence[Any], at: int, kwargs: Any, default: int = 0) -> int:
    return int(kwargs.get("dim", args[at] if len(args) > at else default))


def _view(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info = w.of(args[0])
    if tuple(args[0].shape) == tuple(outs[0].shape):
        return info
    return replace(info, dims=tuple(regroup(info.dims, outs[0].shape)))


def _same(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    return w.of(args[0])


def _permute(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info = w.of(args[0])
    return replace(info, dims=tuple(info.dims[i] for i in args[1]))


def _transpose(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info, dims = w.of(args[0]), list(w.of(args[0]).dims)
    if len(dims) > 1:
        a, b = (args[1], args[2]) if len(args) > 2 else (0, 1)
        dims[a], dims[b] = dims[b], dims[a]
    return replace(info, dims=tuple(dims))


def _unsqueeze(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info, dims = w.of(args[0]), list(w.of(args[0]).dims)
    dims.insert(args[1] % (len(dims) + 1), ())
    return replace(info, dims=tuple(dims))


def _squeeze(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    return _view(w, args, kwargs, outs)


def _expand(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info, shape = w.of(args[0]), outs[0].shape
    dims: list[Dim] = [() for _ in range(len(shape) - len(info.dims))] + list(info.dims)
    return replace(info, dims=tuple(d if d or n == 1 else fresh(n) for d, n in zip(dims, shape, strict=True)))


def _cut(w: Watch, info: Info, dim: int, start: int, stop: int) -> tuple[Dim, frozenset[Node]]:
    """The dim of a slice, and the nodes of the cut."""
    at = info.dims[dim]
    if not at:
        return (), frozenset()
    inner = 1
    for node in at[1:]:
        inner *= node.size
    if start % inner == 0 and stop % inner == 0 and (len(at) == 1 or stop - start >= inner):
        part = at[0].cut(start // inner, stop // inner)
        return (*((part,) if part.size > 1 else ()), *at[1:]), frozenset({part})
    return fresh(stop - start), frozenset()


def _slice(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info = w.of(args[0])
    dim = _dim(args, 1, kwargs) % args[0].dim()
    n = args[0].shape[dim]
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    step = args[4] if len(args) > 4 else 1
    start = max(0, start + n if start < 0 else start)
    size = outs[0].shape[dim]
    if size == n:
        return info
    dims = list(info.dims)
    if step != 1:
        # Every step-th channel: (outer, step), of which one.
        pair = regroup([dims[dim]], (n // step, step)) if n % step == 0 and size == n // step else [fresh(size), ()]
        dims[dim] = pair[0]
        cut = frozenset({pair[1][0].cut(start, start + 1)}) if len(pair[1]) == 1 else frozenset()
        return replace(info, dims=tuple(dims), made=info.made | cut)
    dims[dim], cut = _cut(w, info, dim, start, start + size)
    return replace(info, dims=tuple(dims), made=info.made | cut)


def _select(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info, dim, i = w.of(args[0]), args[1] % args[0].dim(), args[2]
    _, cut = _cut(w, info, dim, i % args[0].shape[dim], i % args[0].shape[dim] + 1)
    if info.param and len(info.dims) > 2:
        for node in info.dims[dim]:
            node.root.index = True
    return replace(info, dims=(*info.dims[:dim], *info.dims[dim + 1 :]), made=info.made | cut)


def _unbind(w: Watch, args: Any, kwargs: Any, outs: Any) -> list[Info]:
    dim = _dim(args, 1, kwargs)
    return [_select(w, (args[0], dim, i), {}, [out]) for i, out in enumerate(outs)]


def _split(w: Watch, args: Any, kwargs: Any, outs: Any) -> list[Info]:
    dim = _dim(args, 2, kwargs) % args[0].dim()
    at, found = 0, []
    for out in outs:
        found.append(_slice(w, (args[0], dim, at, at + out.shape[dim]), {}, [out]))
        at += out.shape[dim]
    return found


def _cat(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    given = [x for x in args[0] if x.numel()]
    infos = [w.of(x) for x in given]
    dim = _dim(args, 1, kwargs) % outs[0].dim()
    dims = list(w.over([replace(i, dims=(*i.dims[:dim], (), *i.dims[dim + 1 :])) for i in infos], outs[0].shape))
    node, at = Node(outs[0].shape[dim]), 0
    for info, x in zip(infos, given, strict=True):
        if len(info.dims[dim]) == 1 and len(given) > 1:
            node.parts[at, at + x.shape[dim]] = info.dims[dim][0]
        at += x.shape[dim]
    whole = {id(i.dims[dim][0].root) for i in infos if len(i.dims[dim]) == 1}
    dims[dim] = infos[0].dims[dim] if len(given) == 1 else (node,)
    data = [i for i in infos if not i.param] or infos
    return replace(
        data[0],
        dims=tuple(dims),
        param="",
        made=frozenset[Node]().union(*(i.made for i in data)),
        writers=frozenset[str]().union(*(i.writers for i in data)),
        scores=frozenset[int]().union(*(i.scores for i in data)),
        stream=any(i.stream for i in data) and len(whole) <= 1,
        normed=next((i.normed for i in data if i.normed), ""),
    )


def _stack(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info = w.of(args[0][0])
    dim = _dim(args, 1, kwargs) % outs[0].dim()
    made = frozenset[Node]().union(*(w.of(x).made for x in args[0]))
    return replace(info, dims=(*info.dims[:dim], fresh(len(args[0])), *info.dims[dim:]), made=made)


def _runs(ids: torch.Tensor) -> bool:
    """Whether ids count up by one."""
    with torch.utils._python_dispatch._disable_current_modes():
        values = ids.reshape(-1, ids.shape[-1] if ids.dim() else 1)[0].tolist()
    return len(values) > 2 and all(b - a == 1 for a, b in pairwise(values))


def _table(info: Info) -> Info:
    """A stored table that the model reads as it is: it writes what its rows hold."""
    if not info.param or not info.dims:
        return info
    if len(info.dims) == 2 and len(info.dims[0]) == 1:
        info.dims[0][0].root.looked = info.dims[0][0].root.looked or "ids"
    return replace(info, param="", writers=frozenset({info.param}), made=frozenset(info.dims[-1]))


def _embedding(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    table, ids = w.of(args[0]), w.of(args[1])
    if table.dims[0]:
        node = table.dims[0][0].root
        with torch.utils._python_dispatch._disable_current_modes():
            same = args[1].numel() > 1 and args[1].unique().numel() == 1
        node.looked = "positions" if _runs(args[1]) or args[1].dim() < 2 or args[1].shape[0] == 1 else "tokens"
        if same:
            node.looked = "ids"
    return Info(
        (*ids.dims, table.dims[1]), writers=frozenset({table.param}), made=frozenset(table.dims[1]), stream=True
    )


def _index(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info, places = w.of(args[0]), args[1]
    used = [k for k, x in enumerate(places) if x is not None]
    if len(used) == 1 and places[used[0]].dtype != torch.bool:
        k = used[0]
        if places[k].numel() == 1 and not info.param:
            with torch.utils._python_dispatch._disable_current_modes():
                i = int(places[k].reshape(())) % args[0].shape[k]
            one = _select(w, (args[0], k, i), {}, outs)
            return replace(one, dims=(*one.dims[:k], *(() for _ in places[k].shape), *one.dims[k:]))
        if info.param:
            for node in info.dims[k]:
                if len(info.dims) > 2:
                    node.root.index = True
                elif len(info.dims) == 2:
                    node.root.looked = node.root.looked or ("positions" if _runs(places[k]) else "ids")
        inner = tuple(fresh(n) for n in places[k].shape)
        made = frozenset(info.dims[1]) if info.param and len(info.dims) == 2 else info.made
        return replace(info, dims=(*info.dims[:k], *inner, *info.dims[k + 1 :]), made=made)
    keep = len(info.dims) - (max(used) + 1)
    head = tuple(fresh(n) for n in outs[0].shape[: outs[0].dim() - keep])
    return replace(info, dims=(*head, *info.dims[len(info.dims) - keep :]) if keep else head)


def _read(w: Watch, weight: Info, read: int, write: int, data: Info) -> None:
    if weight.param and not data.param:
        w.trace.reads.setdefault(weight.param, data)
        # Which of the weight's own dims these are, whatever views lie between.
        for own, node in enumerate(w.trace.params[weight.param]):
            inside = {x for n in node for x in (n, *n.parts.values(), *n.root.parts.values())}
            if inside & set(weight.dims[read]):
                w.trace.reading.setdefault(weight.param, own)
            elif inside & set(weight.dims[write]):
                w.trace.writing.setdefault(weight.param, own)


def _mm(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    a, b = w.of(args[0]), w.of(args[1])
    a = _table(a) if a.param and b.param else a
    if {a.param, b.param} & w.loose and {n.root for n in a.dims[-1]} != {n.root for n in b.dims[-2]}:
        raise ValueError(f"{a.param or b.param} reads something else here")
    align(a.dims[-1], b.dims[-2])
    batch = tuple(a.dims[:-2])
    for x, y in zip(a.dims[:-2], b.dims[:-2], strict=True):
        align(x, y)
    weight, data = (b, a) if b.param else (a, b)
    if b.param:
        _read(w, b, -2, -1, a)
    elif a.param:
        _read(w, a, -1, -2, b)
    dims = (*batch, a.dims[-2], b.dims[-1])
    if weight.param and not data.param:
        for node in (n for d in weight.dims[:-2] for n in d):
            node.root.index = True
        w.trace.outputs.setdefault(weight.param, outs[0])
        out = weight.dims[-1] if b.param else weight.dims[-2]
        made = frozenset(out)
        for k, own in enumerate(w.trace.params.get(weight.param, ())):
            if k != w.trace.reading.get(weight.param):
                made |= frozenset(own)
        return Info(dims, made=made, writers=frozenset({weight.param}))
    if a.param and b.param:
        return Info(dims)
    return _attend(w, a, b, dims, args[0])


def _attend(w: Watch, a: Info, b: Info, dims: tuple[Dim, ...], queries: torch.Tensor) -> Info:
    if a.probs:
        for i in a.scores:
            w.trace.scores[i].value = w.trace.scores[i].value or b
        return Info(dims)
    w.trace.scores.append(Score(a, b, a.dims[-1], tuple(n for d in a.dims[:-2] for n in d), queries=queries))
    return Info(dims, scores=frozenset({len(w.trace.scores) - 1}) | a.scores | b.scores, scale=a.scale * b.scale)


def _addmm(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info = _mm(w, args[1:], kwargs, outs)
    bias = w.of(args[0])
    if bias.param:
        align(info.dims[-1], bias.dims[-1])
    alpha = float(kwargs.get("alpha", 1))
    return replace(info, scale=info.scale * alpha)


def _softmax(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info = w.of(args[0])
    for i in info.scores:
        w.trace.scores[i].used = True
        w.trace.scores[i].scale = info.scale
        w.trace.scores[i].logits = args[0]
    return replace(info, probs=bool(info.scores), scale=1.0, writers=info.writers if not info.scores else frozenset())


def _conv(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    data, weight = w.of(args[0]), w.of(args[1])
    if args[1].shape[1] == args[0].shape[1]:
        align(data.dims[1], weight.dims[1])
    if len(args) > 2 and isinstance(args[2], torch.Tensor):
        align(weight.dims[0], w.of(args[2]).dims[0])
    if args[1].shape[1] == 1 and args[1].shape[0] == args[0].shape[1]:
        align(data.dims[1], weight.dims[0])
    _read(w, weight, 1, 0, data)
    space = tuple(fresh(n) for n in outs[0].shape[2:])
    return Info(
        (data.dims[0], weight.dims[0], *space),
        writers=frozenset({weight.param}),
        made=frozenset(weight.dims[0]),
        stream=True,
    )


def _layer_norm(w: Watch, args: Any, kwargs: Any, outs: Any) -> list[Info]:
    info = _table(w.of(args[0]))
    for x in args[2:4]:
        if isinstance(x, torch.Tensor):
            align(info.dims[-1], w.of(x).dims[-1])
    return [replace(info, stream=False), *(Info(tuple(fresh(n) for n in o.shape)) for o in outs[1:])]


def _repeat(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    info, shape = w.of(args[0]), outs[0].shape
    dims: list[Dim] = [() for _ in range(len(shape) - len(info.dims))] + list(info.dims)
    sizes = [1] * (len(shape) - args[0].dim()) + list(args[0].shape)
    new = []
    for d, old, n in zip(dims, sizes, shape, strict=True):
        new.append(d if old == n else (*fresh(n // old), *d))
    return replace(info, dims=tuple(new))


def _reduce(w: Watch, args: Any, kwargs: Any, outs: Any) -> list[Info]:
    info, x = w.of(args[0]), args[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    which = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim or range(x.dim()))} if x.dim() else set()
    found = []
    for out in outs:
        if out.dim() == x.dim():
            dims = tuple(d if out.shape[k] == x.shape[k] else fresh(out.shape[k]) for k, d in enumerate(info.dims))
        else:
            dims = tuple(d for k, d in enumerate(info.dims) if k not in which)
        found.append(replace(info, dims=dims, param="", normed=""))
    return found


def _pick(w: Watch, args: Any, kwargs: Any, outs: Any) -> list[Info]:
    """topk, gather, sort: one dim is new, the rest stays."""
    info, x = w.of(args[0]), args[0]
    return [
        replace(
            info,
            normed="",
            stream=False,
            dims=tuple(
                d if k < x.dim() and o.shape[k] == x.shape[k] else fresh(o.shape[k]) for k, d in enumerate(info.dims)
            ),
        )
        if o.dim() == x.dim()
        else Info(tuple(fresh(n) for n in o.shape))
        for o in outs
    ]


def _index_add(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    into, source = w.of(args[0]), w.of(args[3])
    for a, b in zip(into.dims[1:], source.dims[1:], strict=True):
        align(a, b)
    return replace(source, dims=into.dims, writers=source.writers | into.writers)


def _copy(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    """Written into a slice: the whole has it as a part."""
    into, source = w.of(args[0]), w.of(args[1])
    for a, b in zip(into.dims, source.dims, strict=False):
        if a and b:
            align(a, b)
    base = args[0]._base
    if base is not None and id(base) in w.known:
        old = w.of(base)
        w.keep(
            base, replace(old, made=old.made | source.made, writers=old.writers | source.writers, scale=source.scale)
        )
    return replace(source, dims=into.dims)


def _index_put(w: Watch, args: Any, kwargs: Any, outs: Any) -> Info:
    return w.of(args[0])


OPS: dict[str, Rule] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "as_strided"), _view),
    **dict.fromkeys(("clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh", "dropout"), _same),
    **dict.fromkeys(("squeeze", "squeeze_"), _squeeze),
    **dict.fromkeys(("transpose", "t"), _transpose),
    **dict.fromkeys(("mm", "bmm", "matmul"), _mm),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(("_softmax", "softmax"), _softmax),
    **dict.fromkeys(("convolution", "conv2d", "conv1d"), _conv),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "var", "any", "all", "argmax"), _reduce),
    "linalg_vector_norm": _reduce,
    **dict.fromkeys(("topk", "sort", "gather"), _pick),
    **dict.fromkeys(("index_add", "index_add_"), _index_add),
    **dict.fromkeys(("index_put", "index_put_"), _index_put),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "copy_": _copy,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
    "embedding": _embedding,
    "index": _index,
    "native_layer_norm": _layer_norm,
    "repeat": _repeat,
}  # fmt: skip
