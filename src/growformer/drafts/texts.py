"""The pattern text of every tensor on disk, and powers of sizes that the code multiplies by."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import cached_property

from growformer.algebra import Field, Power, TensorPattern
from growformer.drafts.nodes import Node
from growformer.drafts.reading import Reading, size_of


class Texts(Reading):
    """Adds patterns; `texts` holds them by disk name, once they are made."""

    texts: dict[str, str]

    def _texts(self) -> dict[str, str]:
        """By disk name, its pattern (name indices apart)."""
        out = {}
        assert self.base.trace is not None
        streamed = {r for r, n in self.norms.items() if n.output == "branch" and n.axis == "hidden"}
        owned = {p.param for p in self.base.places.values()}
        for disk, place in self.base.places.items():
            out[disk] = self._text(disk, place.param, place.dims, bool(streamed) or bool(self.norms))
        if self.head and self.head[0] not in owned:
            dims = self.trace.params[self.head[0]]
            whole = tuple((k, 0, max(1, size_of(d))) for k, d in enumerate(dims))
            out[self.head[0]] = self._text(self.head[0], self.head[0], whole, True)
        return out

    def _dim(self, param: str, place: tuple[int, int, int], role: str = "") -> tuple[str, str, bool]:
        """Text, role, whether it is an index."""
        assert self.base.trace is not None
        k, start, stop = place
        if k < 0:
            return "_", "", False
        nodes = self.trace.params[param][k]
        weight = self._beside(param)
        beside = self.base.trace.writing.get(weight)
        if beside is not None and k == len(self.trace.params[param]) - 1:
            nodes = self.trace.params[weight][beside]  # a bias is as what its weight writes
        if nodes and len(nodes) == 1 and (start, stop) != (0, nodes[0].size):
            part = nodes[0].parts.get((start, stop)) or nodes[0].root.parts.get((start, stop))
            if part is None:
                return "_", "", False
            nodes = (part,)
        text, found = self.patterns.text(nodes, role)
        if re.search(r"(?<!\w)_(?!\w)", text) and text != "_":
            text, found = "_", ""  # what is not known of a part is not known of the whole
        if param not in self.trace.touched and len(nodes) == 1 and self._as_large(nodes[0]):
            self.guesses.append(f"{param}: nothing used it; that it holds `hidden` is a guess from its size alone")
            text = "hidden"
        return text, found, bool(nodes) and nodes[0].root.index

    def _beside(self, bias: str) -> str:
        """The weight that a bias stands beside; empty where it is no bias."""
        stem = re.sub(r"[._]bias$", "", bias)
        names = (f"{stem}.weight", f"{stem}_weight", stem) if stem != bias else ()
        return next((name for name in names if name in self.trace.writing), "")

    def _scale(self, vector: str) -> str:
        """The role of a vector that outputs are multiplied by before they join the stream; empty where it is none."""
        if not vector or vector.rpartition(".")[0] in self.norm_names or _unlayered(vector) not in self._vectors:
            return ""
        at = self._vectors.index(_unlayered(vector))
        return f"scale{at + 1}" if len(self._vectors) > 1 else "scale"

    @cached_property
    def _vectors(self) -> list[str]:
        names = (v for v in self.trace.scaled.values() if v.rpartition(".")[0] not in self.norm_names)
        return [*dict.fromkeys(_unlayered(name) for name in names)]

    def _as_large(self, node: Node) -> bool:
        """Whether a node's size moves as the stream's does."""
        size = self.patterns.axes.sizes.get("hidden")
        return size is not None and self.sizes.of(node) == size

    def _text(self, disk: str, param: str, places: tuple[tuple[int, int, int], ...], normed: bool) -> str:
        assert self.base.trace is not None
        trace = self.base.trace
        if not places:
            return "."
        norm, _, kind = param.rpartition(".")
        if norm in self.norm_names:
            role = self.norm_names[norm]
            side = "k" if role.startswith("k") else "q" if role.startswith("q") else ""
            dims = [self._dim(param, p, side if self.norms[role].axis != "hidden" else "")[0] for p in places]
            sign = "+" if kind == "bias" else "*"
            return f"{role}: {sign} {' '.join(f'({d})' if ' ' in d else d for d in dims)}"
        read = trace.reading.get(param)
        parts: list[tuple[str, bool, bool]] = []
        for p in places:
            text, role, index = self._dim(param, p)
            reading = p[0] == read
            if (
                len(places) > 2
                and not reading
                and not index
                and read is not None
                and p[0] not in (trace.writing.get(param), -1)
            ):
                text, reading = "_", True
            elif reading and len(places) > 2 and not trace.reads[param].writers and not index:
                text = "_"  # what the model is given: colours, frequencies
            if reading and trace.reads[param].stream and not trace.reads[param].normed and text == "hidden" and normed:
                text = f"(raw: {text})" if any(n.output != "stream" for n in self.norms.values()) else text
            elif reading and self.patterns.attends_text(text):
                text = f"({text})"
            elif not reading and not index:
                role = role or ("q" if self.patterns.axes.kinds.get(text) == "heads" else "")
                text = f"({role}: {text})" if role else f"({text})" if " " in text else text
            index |= read is None and len(places) > 1 and self.patterns.axes.kinds.get(text) == "experts"
            if index:
                text = f"[{text}]"
            parts.append((text, reading, index))
        writes = [t for t, reading, index in parts if not reading]
        reads = [t for t, reading, _ in parts if reading]
        used = trace.used.get(param, "")
        if not reads and not self._looked(param):
            solid = [t for t in writes if not t.startswith("[")]
            if used == "mul" and len(solid) == 1 and solid[0] == "hidden":
                return f"{self._scale(param) or 'scale'}: * hidden"
            scale = self._scale(trace.scaled.get(self._beside(param), ""))
            if scale and writes == ["hidden"]:
                return f"{scale}: -> hidden"
            return f"-> {' '.join(writes)}"
        if self._looked(param):
            rows = f"({writes[0]})" if "|" in writes[0] and writes[0][0] != "(" else writes[0]
            return f"{rows} -> {' '.join(self._powered(param, w) for w in writes[1:])}"
        scale = self._scale(trace.scaled.get(param, ""))
        if scale and writes == ["hidden"]:
            writes = [f"({scale}: hidden)"]
        first_reads = (
            parts[next(i for i, x in enumerate(parts) if not x[2])][1] if any(not x[2] for x in parts) else False
        )
        if first_reads:
            before = [t for t, reading, index in parts if reading or index]
            return f"{' '.join(before)} -> {' '.join(t for t, reading, index in parts if not reading and not index)}"
        return f"{' '.join(writes)} <- {' '.join(reads)}"

    def _looked(self, param: str) -> bool:
        assert self.base.trace is not None
        dims = self.trace.params[param]
        head = self.head is not None and param == self.head[0] and param not in (self.head[1],)
        return len(dims) == 2 and len(dims[0]) == 1 and bool(dims[0][0].root.looked) and not head

    def _powered(self, param: str, text: str) -> str:
        return (
            f"(embed: {text})"
            if self.powers.get("embed") and text == "hidden" and self.head and (param == self.head[1])
            else text
        )

    @cached_property
    def powers(self) -> dict[str, Power]:
        """By which powers of the hidden size the code multiplies the embedding and what the head reads."""
        found: dict[str, Power] = {}
        size = self.patterns.axes.sizes.get("hidden")
        if self.head is None or not isinstance(size, Field):
            return found
        head, embedding = self.head
        scales = {p: x.scales.get(embedding, 1.0) for p, x in self.traces().items()}
        logits = {p: x.reads[head].scale for p, x in self.traces().items() if head in x.reads}
        for role, seen in (("embed", scales), ("logits", logits)):
            if size.name in seen and "" in seen:
                ratio = self.probes[size.name].full[size.name] / self.base.full[size.name]
                change = seen[size.name] / seen[""]
                for exponent in (Fraction(1, 2), Fraction(-1, 2), Fraction(1), Fraction(-1)):
                    if abs(change - ratio**exponent) < 1e-3 * abs(change - 1):
                        found[role] = Power("hidden", exponent)
        return found

    def _indexed(self, name: str, text: str) -> str:
        for axis in re.findall(r"{(\w+)}", name):
            if self.patterns.axes.kinds.get(axis) in ("experts", "index") and f"[{axis}]" not in text:
                text = f"[{axis}] {text}"
        return text

    def _atoms(self, writers: Iterable[str], role: str) -> tuple[str, ...]:
        """The axes of a role in the weights that wrote something, heads apart."""
        out: list[str] = []
        for disk, place in self.base.places.items():
            if place.param in writers:
                for atom in TensorPattern.parse(self.texts[disk]).atoms():
                    kind = self.patterns.axes.kinds.get(str(atom.axis), "")
                    if atom.role == role and kind not in ("heads", "kv_heads", "") and atom.axis not in out:
                        out.append(str(atom.axis))
        return tuple(out)


def _unlayered(name: str) -> str:
    """A name without the numbers between dots; `scale1` and `scale2` stay two."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
