"""The pattern of every tensor, read off the nodes of its dims."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from growformer.algebra import Field, Ratio, Size, Times
from growformer.algebra.sizes import fields_of
from growformer.drafts.nodes import Node
from growformer.drafts.probe import Probe
from growformer.drafts.sizes import Sizes, fit, tiles
from growformer.drafts.trace import Score, Trace

_NAMES = {
    "intermediate_size": "mlp", "n_inner": "mlp", "ffn_dim": "mlp", "d_ff": "mlp", "ffn_hidden_size": "mlp",
    "moe_intermediate_size": "expert_mlp", "shared_expert_intermediate_size": "shared_mlp",
    "kv_lora_rank": "kv_rank", "q_lora_rank": "q_rank", "embedding_size": "embedding",
    "qk_nope_head_dim": "nope", "qk_rope_head_dim": "rope",
}  # fmt: skip

_OWN = ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "q_lora_rank")
"""Fields whose axes are the same wherever they are met."""


@dataclass
class Axes:
    """Names given to sizes, and what they mean.

    Attributes:
        sizes: by axis.
        kinds: by axis, what the trace said it is ("hidden", "heads", "inner", ...).
        guesses: what could not be told, in words.
    """

    sizes: dict[str, Size] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    guesses: list[str] = field(default_factory=list)

    def name(self, kind: str, size: Size) -> str:
        for axis, other in self.sizes.items():
            if self.kinds[axis] == kind and other == size:
                return axis
        axis = kind
        if kind == "inner":
            axis = _NAMES.get(size.name, "") if isinstance(size, Field) else "mlp" if isinstance(size, Times) else ""
            if isinstance(size, Times) and isinstance(size.times, str):
                axis = "shared_mlp"
            axis = axis or (re.sub(r"_(size|dim)$", "", size.name) if isinstance(size, Field) else "inner")
            if any(k == "hidden" and s == size for s, k in zip(self.sizes.values(), self.kinds.values(), strict=True)):
                axis = "inner"
        n = 2
        while axis in self.sizes:
            axis = f"{re.sub(r'_?[0-9]+$', '', axis)}_{n}"
            n += 1
        self.sizes[axis], self.kinds[axis] = size, kind
        return axis


class Patterns:
    """Texts of dims.

    Args:
        base: the tiny model, watched.
        sizes: of every node.
    """

    def __init__(self, base: Probe, sizes: Sizes) -> None:
        assert base.trace is not None
        self.trace: Trace = base.trace
        self.sizes, self.axes = sizes, Axes()
        # Sums of embeddings are streams as well; where x + f(x) is another size, that is the one.
        residual = Counter(n.root for dim in self.trace.residual for n in dim if len(dim) == 1)
        counted = Counter(n.root for dim in self.trace.streams for n in dim if len(dim) == 1)
        if residual:
            most = residual.most_common(1)[0][1]
            counted.update({n: len(self.trace.streams) for n, count in residual.items() if count == most})
        main = sizes.of(counted.most_common(1)[0][0]) if counted else None
        # A sum of embeddings of another size is no stream.
        self.streams = {n: None for n, _ in counted.most_common() if sizes.of(n) == main}
        self.scores = [s for s in self.trace.scores if s.used]
        queries, keys = set[str](), set[str]()
        for s in self.scores:  # a product may be taken the other way round: keys with what positions ask
            if s.query.writers and s.query.writers <= keys - queries:
                s.query, s.key = s.key, s.query
            queries |= s.query.writers
            keys |= s.key.writers
        self.made: dict[str, set[Node]] = {
            "q": {n for s in self.scores for n in s.query.made},
            "k": {n for s in self.scores for n in s.key.made},
            "v": {n for s in self.scores if s.value for n in s.value.made},
        }
        guests = self.trace.guests
        mine = {n.root for p, dims in self.trace.params.items() if p not in guests for d in dims for n in d}
        self.apart = {n.root for p in guests for d in self.trace.params[p] for n in d} - mine
        self.heads: set[Node] = set()
        self.kv: dict[Node, Node] = {}
        for score in self.scores:
            self._heads(score)

    given: frozenset[str] = frozenset()
    """Fields that size what the model is given (an image, a sound)."""

    def register(self, embedding: str) -> None:
        """Name what is plain before the rest: the stream, the vocabulary, heads, stacked experts."""
        dims = self.trace.params.get(embedding)
        if self.streams:
            self._leaf("hidden", next(iter(self.streams)))
        if dims is not None and len(dims) == 2 and len(dims[0]) == 1:
            self._leaf("vocab", dims[0][0].root)
        for node in self.heads:
            self._leaf("heads", node)
        for node in self.kv:
            if node not in self.heads:
                self._leaf("kv_heads", node)
        for every in self.trace.params.values():
            for node in (n.root for d in every for n in d if n.root.index):
                self._leaf("experts", node)

    def _heads(self, score: Score) -> None:
        nodes = [n for n in score.heads if n.size > 1]
        batch = {n.root for n in score.heads[:1]}
        mine = [n.root for n in nodes if n.root not in batch]
        if len(mine) == 1:
            self.heads.add(mine[0])
            if len(mine[0].factors) == 2:
                self.kv[mine[0].factors[0].root] = mine[0]
        elif len(mine) == 2:
            whole = Node(mine[0].size * mine[1].size)
            whole.factors = [mine[0], mine[1]]
            self.kv[mine[0]] = whole
            self.heads.add(whole)
            for seen in ("",):
                self.sizes.seen.setdefault(whole, {})[seen] = whole.size
            known = [self.sizes.seen.get(n, {}) for n in mine]
            for probe in set(known[0]) & set(known[1]):
                self.sizes.seen[whole][probe] = known[0][probe] * known[1][probe]

    def attends(self, node: Node) -> bool:
        """Whether heads are inside."""
        return any(n.root in self.heads or n.root in self.kv for n in self._inside(node))

    def _inside(self, node: Node) -> Iterable[Node]:
        yield node
        for part in (*node.root.factors, *tiles(node)):
            yield from self._inside(part)

    def role(self, node: Node) -> str:
        found = [role for role, made in self.made.items() if node in made]
        return found[0] if len(found) == 1 else ""

    def text(self, nodes: Sequence[Node], role: str = "") -> tuple[str, str]:
        """A dim's text without parentheses, and the role that all of it has."""
        if not nodes:
            return "1", ""
        if len(nodes) == 1:
            return self._one(nodes[0], role)
        nodes = self._merged(nodes)
        texts = []
        for i, node in enumerate(nodes):
            # So many of q, of k, of v before or amid the rest: a concatenation of what follows.
            parts = tiles(node)
            if len({self.role(p) for p in parts}) > 1:
                inner = []
                for part in parts:
                    own = self.role(part) or role
                    lead = [part] if part.size > 1 else []
                    said, _ = self.text([*lead, *nodes[i + 1 :]], own)
                    inner.append(f"{own}: {said}" if own else said)
                texts.append(f"({' | '.join(inner)})" if i else " | ".join(inner))
                return " ".join(texts), role
            said, _ = self._one(node, role)
            texts.append(f"({said})" if "|" in said else said)
        return " ".join(texts), role

    def _merged(self, nodes: Sequence[Node]) -> list[Node]:
        """Key heads and the queries of each, side by side, are the query heads."""
        out: list[Node] = []
        flat = list(nodes)
        while flat:
            node = flat.pop(0)
            whole = self.kv.get(node.root)
            if whole is not None and flat:
                following = flat[0].root
                if following is whole.factors[1].root:
                    out.append(whole)
                    flat.pop(0)
                    continue
                if following.factors and following.factors[0].root is whole.factors[1].root:
                    out.append(whole)
                    flat = [*following.factors[1:], *flat[1:]]
                    continue
            out.append(node)
        return out

    def _one(self, node: Node, role: str) -> tuple[str, str]:
        root = node.root
        if root in self.heads or root in self.kv:
            kind = "heads" if root in self.heads else "kv_heads"
            size = self.sizes.of(root)
            if isinstance(size, int):
                return str(size), role
            return self._leaf(kind, root), role
        if root in self.streams:
            return self._leaf("hidden", root), role
        if root in self.apart and not isinstance(self.sizes.of(root), Size):
            return "_", role  # labels and pixels: as many as a checkpoint has
        parts = tiles(node)
        role = role or self._whole_role(node, parts)
        size = self.sizes.of(root)
        if not self.attends(node) and isinstance(size, (Field, Ratio)) and not self._shared(parts):
            return self._leaf(self._kind(root, role), root), role
        if len(parts) > 1 and not self._rotary(node, parts, role, size):
            return self._concat(parts, role), role
        if root.factors:
            return self.text(root.factors, role)[0], role
        return self._leaf(self._kind(root, role), root), role

    def _whole_role(self, node: Node, parts: Sequence[Node]) -> str:
        role = self.role(node)
        if role and parts and any(not any(p in made for made in self.made.values()) for p in parts):
            return ""  # only some of it
        return role

    def _shared(self, parts: Sequence[Node]) -> bool:
        """Parts that go different ways (a latent, and keys)."""
        roles = {self.role(part) for part in parts}
        return len(roles) > 1

    def _rotary(self, node: Node, parts: Sequence[Node], role: str, size: object) -> bool:
        return role in ("q", "k") and not self.attends(node) and isinstance(size, (Field, Ratio))

    def _concat(self, parts: Sequence[Node], role: str) -> str:
        texts = []
        for part in parts:
            own = self.role(part) if not role else ""
            said, _ = self._one(part, own or role)
            # A part that is a concatenation itself, and nothing more, is some of these parts.
            said = f"({said})" if "|" in said and own else said
            texts.append(f"{own}: {said}" if own else said)
        return " | ".join(texts)

    def _kind(self, root: Node, role: str) -> str:
        if root.index:
            return "experts"
        if root.looked:
            return "positions" if root.looked == "positions" else "_"
        if role in ("q", "k"):
            return "key"
        if role == "v" or any(root is n.root for s in self.scores if s.value for n in s.value.dims[-1]):
            return "value"
        return "pooled" if root in self.apart else "inner"

    def _leaf(self, kind: str, root: Node) -> str:
        size = self.sizes.of(root)
        if isinstance(size, int):
            return str(size)
        if size is not None and fields_of(size) & self.given:
            return "_"  # as large as what the model is given
        known = next(
            (a for a, s in self.axes.sizes.items() if s == size and self.axes.kinds[a] in ("vocab", "experts")), ""
        )
        if known and kind in ("inner", "pooled", "_", "vocab", "experts"):
            return known
        if kind == "_":
            return "_"
        for extra in (1, 2, 3, 4) if size is None and kind == "positions" else ():
            seen = {p: n - extra for p, n in self.sizes.seen.get(root, {}).items()}
            rest = fit(seen, self.sizes.fulls)
            if isinstance(rest, Field):
                return f"{extra} | {self.axes.name(kind, rest)}"
        if size is None:
            self.axes.guesses.append(f"a size of {root.size} that no field, ratio or product explains ({kind})")
            return "_"
        if kind in ("key", "value", "inner") and isinstance(size, Field) and size.name in _OWN:
            return self.axes.name(_NAMES[size.name], size)
        return self.axes.name(kind, size)

    @staticmethod
    def attends_text(text: str) -> bool:
        """Whether a dim's text needs parentheses."""
        return " " in text
