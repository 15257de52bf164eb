"""What probes and modules say of a model: which fields count, which switches, what each norm is."""

from __future__ import annotations

import itertools
import re
from functools import cached_property
from typing import Any

from growformer.algebra import NamePattern, Norm
from growformer.drafts.modules import eps_fields, measure
from growformer.drafts.names import Named, name_patterns
from growformer.drafts.patterns import Patterns
from growformer.drafts.probe import Probe, changed, ends, integers, probe
from growformer.drafts.settled import JOINT
from growformer.drafts.sizes import Sizes
from growformer.drafts.trace import Normed, Trace

_NOT_SIZES = ("dropout", "_token_id", "sliding_window", "pad", "dtype", "torch", "pruned", "id2label", "label")


class Reading:
    """A tiny model and everything that was measured of it.

    Args:
        base: the unchanged tiny model, watched.
    """

    def __init__(self, base: Probe) -> None:
        assert base.trace is not None
        self.base, self.trace = base, base.trace
        self.guesses: list[str] = []
        self.follows: dict[str, str] = {}
        self.probes = self._probes()
        self.every: dict[str, Probe] = {"": base, **self.probes}
        self.sizes = Sizes(base, self.probes)
        self.patterns = Patterns(base, self.sizes)
        self.patterns.given = frozenset(n for n, p in self.probes.items() if p.given != base.given)
        self.switches = self._switches()
        self.modules: dict[str, Any] = dict(base.model.named_modules())
        self.eps = eps_fields(base)
        self.norm_names: dict[str, str] = {}
        self.norms: dict[str, Norm] = {}
        self.head = self._head()
        self.patterns.register(self.embedding)
        self.names = self._named()
        self._norms()

    def traces(self) -> dict[str, Trace]:
        """By the field that was changed ("" for none), what a forward pass showed."""
        return {name: probe.trace for name, probe in self.every.items() if probe.trace is not None}

    def _probes(self) -> dict[str, Probe]:
        full = self.base.full
        found: dict[str, Probe] = {}
        stuck: list[str] = []
        nones = [k for k, v in full.items() if v is None and not any(w in k for w in _NOT_SIZES)]
        if "head_dim" not in full:
            nones.append("head_dim")
        for name in [*sorted(integers(full), key=lambda k: k not in ("hidden_size", "d_model")), *nones]:
            if name in self.follows:
                continue
            got = changed(self.base, name)
            if got is None and name not in nones:
                stuck.append(name)
            if got is not None and _plains(got) != _plains(self.base):
                leader = next((n for n, p in found.items() if p.full.get(name) != full[name]), None)
                if leader is not None and re.search("dim|size", name):
                    self.follows[name] = leader
                    continue
                # Fields that repeat one another: changed alone, a projection comes between.
                equal = [k for k in integers(full) if full[k] == full[name] and k != name]
                joint = changed(self.base, name, equal) if equal else None
                if joint is not None and _plains(joint) == _plains(self.base) and joint.shapes != self.base.shapes:
                    got = joint
                    self.follows |= dict.fromkeys((k for k in equal if re.search("dim|size", k)), name)
            if got is not None and (got.shapes != self.base.shapes or self._moved(got)):
                found[name] = got
        return found | self._pairs([n for n in stuck if re.search("(dim|size|heads?|embd|model|width)$", n)][:5])

    def _pairs(self, stuck: list[str]) -> dict[str, Probe]:
        """Fields of which the class takes no other value alone, changed two at a time so that their ratio stays, or
        their product."""
        found: dict[str, Probe] = {}
        for a, b in itertools.combinations(stuck, 2):
            x, y = self.base.full[a], self.base.full[b]
            for new in ({a: 2 * x, b: 2 * y}, {a: 2 * x, b: y // 2}, {a: x // 2, b: 2 * y}):
                got = probe({**self.base.raw, **new}, classes=self.base.classes) if min(new.values()) > 0 else None
                if got is not None and (got.shapes != self.base.shapes or self._moved(got)):
                    found[f"{a}{JOINT}{b}"] = got
                    break
        return found

    def _moved(self, got: Probe) -> bool:
        """Heads that follow from the hidden size move no shape, and tensors of another class none of this one's; the
        trace shows them."""
        a, b = self.base.trace, got.trace
        if a is None or b is None:
            return False
        sizes = [[(s.axis[-1].size if s.axis else 1, [n.size for n in s.heads]) for s in t.scores] for t in (a, b)]
        ran = [p.param for cls in self.base.heads.keys() & got.heads.keys() for p in got.heads[cls].values()]
        widths = [[size_of(d) for p in ran if p in t.params for d in t.params[p]] for t in (a, b)]
        return sizes[0] != sizes[1] or widths[0] != widths[1]

    def _switches(self) -> dict[str, Probe]:
        """Every true-or-false field turned over, where its model builds and has other tensors."""
        out = {}
        for name, value in self.base.full.items():
            if isinstance(value, bool) and name not in ("tie_word_embeddings", "is_encoder_decoder"):
                got = probe({**self.base.raw, name: not value})
                if got is not None and (got.shapes != self.base.shapes):
                    out[name] = got
        return out

    def _head(self) -> tuple[str, str] | None:
        """(head, embedding) as parameters."""
        by_id = {id(x): n for n, x in self.base.model.named_parameters()}
        head, self.embedding = (by_id.get(id(getattr(m, "weight", None)), "") for m in ends(self.base.model))
        return (head, self.embedding) if head and self.embedding else None

    def _norms(self) -> None:
        assert self.base.trace is not None
        trace, seen = self.base.trace, set()
        reads = trace.reads.get(self.head[0]) if self.head else None
        final = reads.normed if reads is not None else ""
        for call in trace.norms:
            if call.name in seen:
                continue
            seen.add(call.name)
            found = measure(self.modules[call.name], call.shape)
            if not found.kind:
                self.guesses.append(f"{call.name}: neither an RMS norm nor a LayerNorm as far as measured")
                continue
            axis, role = self._norm_axis(call)
            over = (axis,) if isinstance(axis, str) else axis
            if not all(a in self.patterns.axes.sizes for a in over):
                self.guesses.append(f"{call.name}: what it is a norm over, {' '.join(over)}, is no product of axes")
                continue
            eps: str | float = self.eps.get(call.name, found.eps)
            output = self._output(call)
            feeds = self._feeds(call.name) if output == "stream" else ""
            norm = Norm(axis, found.kind, eps=eps, gain=found.gain, output=output, feeds=feeds)
            if final and plain(call.name) == plain(final):
                # In a layer (BART) it is a norm like those of the layers before.
                role = "final" if final == plain(final) else "last"
            self.norm_names[call.name] = self._role(role or norm.output, norm)
            if found.attribute.startswith("="):
                self.guesses.append(f"{call.name}: eps {found.eps:g} is a guess")

    def _role(self, want: str, norm: Norm) -> str:
        want = {"branch": "pre", "added": "post", "stream": "out"}.get(want, want)
        name, n = want, 2
        while name in self.norms and self.norms[name] != norm:
            name, n = f"{want}_{n}", n + 1
        self.norms[name] = norm
        return name

    def _norm_axis(self, call: Normed) -> tuple[Any, str]:
        made = call.before.made
        # What queries or keys alone are made of tells them apart where one weight writes both.
        roles = {self.patterns.role(node) for node in made} & {"q", "k"}
        score = [s for s in self.patterns.scores if made & s.query.made or made & s.key.made]
        role = ""
        if len(roles) == 1:
            role = roles.pop()
        elif score and (self._keyed(call) or self.patterns.attends(call.dim[0])):
            role = "q" if any(made & s.query.made for s in score) else "k"
        words = self.patterns.text(call.dim, role)[0].split()
        return (words[0] if len(words) == 1 else tuple(words)), role

    def _keyed(self, call: Normed) -> bool:
        keyed = {n.root for s in self.patterns.scores for n in s.axis}
        return any(n.root in keyed for n in call.dim)

    def _output(self, call: Normed) -> Any:
        assert self.base.trace is not None
        trace = self.base.trace
        alike = {n.name for n in trace.norms if plain(n.name) == plain(call.name)}
        for event in trace.adds:
            for info in (event.left, event.right):
                if info.normed in alike and event.stream:
                    on_stream = call.before.stream or any(
                        n.name == call.before.normed and n.before.stream for n in trace.norms
                    )
                    return "stream" if on_stream else "added"
        return "branch"

    def _feeds(self, name: str) -> str:
        """The axis of the layers that read a norm on the stream with nothing between: the next ones, or the first.

        A norm in a layer is as those of the other layers: the last one's readers are others. What reads a tower's last
        norm from another tower's layers is not fed by it. A norm before the first layer feeds the layers if each of
        them ends in one as well; else it is but what embeds.
        """
        own = {axis for param, (axis, _) in self._layers.items() if param.startswith(f"{name}.")}
        fed: set[str] = set()
        for param, (axis, index) in self._layers.items():
            read = self.trace.reads.get(param)
            if read is None or not read.normed or plain(read.normed) != plain(name):
                continue
            at = [i for p, (_, i) in self._layers.items() if p.startswith(f"{read.normed}.")]
            if (axis in own and at and index == at[0] + 1) or (not own and index == 0 and axis in self._ended):
                fed.add(axis)
        return fed.pop() if len(fed) == 1 else ""

    @cached_property
    def _ended(self) -> set[str]:
        """The axes of layers that each end in a norm on the stream."""
        inside = {param.rpartition(".")[0] for param in self._layers}
        calls = [c for c in self.trace.norms if c.name in inside and self._output(c) == "stream"]
        return {fed for call in calls if (fed := self._feeds(call.name))}

    @cached_property
    def _layers(self) -> dict[str, tuple[str, int]]:
        """By parameter of a layer, the axis of its layers and its number."""
        out = {}
        for text, disks in self.names.patterns.items():
            pattern = NamePattern(text)
            for axis in (a for a in self.names.layers if a in pattern.axes):
                for disk in disks:
                    index, place = pattern.match(disk), self.base.places.get(disk)
                    if index is not None and place is not None:
                        out[place.param] = (axis, index[axis])
        return out

    def _named(self) -> Named:
        extra = []
        if self.head and self.head[0] not in {p.param for p in self.base.places.values()}:
            extra.append(self.head[0])
        return name_patterns(self.base, self.probes, self.patterns.axes, extra)


def _plains(of: Probe) -> set[str]:
    return {plain(name) for name in of.shapes}


def plain(name: str) -> str:
    """A name with its numbers out of sight."""
    return re.sub(r"\d+", "#", name)


def size_of(dim: Any) -> int:
    """How many channels a dim has."""
    out = 1
    for node in dim:
        out *= node.size
    return out
