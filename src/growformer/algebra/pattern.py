"""The pattern language: which axes each dim of a tensor holds, and on which side of each axis the tensor stands.

Text order is the tensor's dim order and the arrow points from what is read to what is written::

    "mlp <- hidden"                                        linear weight [mlp, hidden]
    "(q: heads key) <- hidden"                             a query projection
    "hidden -> (q: heads key | k: heads key | v: heads value)"   GPT-2's Conv1D
    "-> mlp"                                               a bias
    "pre: * hidden"    "pre: + hidden"                     a norm's gain, a norm's shift
    "(q: heads key) <- (raw: hidden)"                      reads the stream as it is, before any norm
    "-> (odds: vocab)"                                     a bias of logits, before a softmax or a top-k over them
    "[experts] mlp <- hidden"                              one matrix an expert
    "_ <- hidden"                                          a dim that stays as the checkpoint has it
    "."                                                    a scalar

A side is a list of dims. A dim is an axis, a number, an index axis in brackets (independent slabs, one an index), or a
group in parentheses: a product, or with ``|`` a concatenation. A bracketed axis that the tensor's name holds in braces
(``experts.{experts}.down_proj.weight``: "hidden <- [experts] mlp") takes no dim.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

from growformer.algebra.lift import Lift, concat, product
from growformer.errors import PatternError

Stand = Literal["write", "read", "gain", "shift"]
"""How a tensor stands to an axis: it writes its channels, reads them, or is a norm's gain or shift over them."""


RAW = "raw"
"""The role of a reader of an axis that no norm stands before, though norms over the axis there are."""

ODDS = "odds"
"""The role of a bias on what channels are chosen by: a softmax or a top-k reads the axis there."""

GATE = "gate"
"""The role of a writer of MLP channels that multiplies what another writer writes there."""

WILD = "_"
"""In place of an axis: as many channels as the stored tensor has; they never grow."""


@dataclass(frozen=True, slots=True)
class Atom:
    """One axis (or a fixed number of channels) inside a dim, with the role of the part it stands in.

    `axis` is WILD for a dim that stays as the checkpoint has it. `index`: the dim holds independent slabs.
    """

    axis: str | int
    stand: Stand
    role: str | None
    index: bool = False


@dataclass(frozen=True, slots=True)
class Dim:
    """One dim of a tensor: an atom, a product of dims, or a concatenation of dims."""

    kind: Literal["atom", "product", "concat"]
    atom: Atom | None = None
    parts: tuple[Dim, ...] = ()

    def atoms(self) -> Iterator[Atom]:
        if self.atom is not None:
            yield self.atom
        for part in self.parts:
            yield from part.atoms()

    def lift(self, of: Callable[[Atom], Lift]) -> Lift:
        """The lift of this dim, put together from the lifts that `of` gives for its atoms."""
        if self.atom is not None:
            return of(self.atom)
        parts = [part.lift(of) for part in self.parts]
        if self.kind == "concat":
            return concat(parts)
        lift = parts[-1]
        for outer in reversed(parts[:-1]):
            lift = product(outer, lift)
        return lift

    def size(self, of: Callable[[Atom], int]) -> int:
        """How many entries the dim has, given the size of each atom."""
        if self.atom is not None:
            return of(self.atom)
        sizes = [part.size(of) for part in self.parts]
        total = sizes[0]
        for size in sizes[1:]:
            total = total + size if self.kind == "concat" else total * size
        return total


@dataclass(frozen=True, slots=True)
class TensorPattern:
    """A parsed pattern: the dims in the tensor's order."""

    text: str
    dims: tuple[Dim, ...]

    @classmethod
    @lru_cache(maxsize=4096)
    def parse(cls, text: str) -> TensorPattern:
        """Parse `text`.

        Raises:
            PatternError: where the text is no pattern; the message points at the place.
        """
        return _Parser(text).tensor()

    def atoms(self) -> Iterator[Atom]:
        for dim in self.dims:
            yield from dim.atoms()

    def indexed(self, streams: tuple[str, ...]) -> TensorPattern:
        """The pattern with every index axis standing where it counts.

        What writes the stream reads the index (the stream sums over it); all else writes it. The order of dims cannot
        say so.
        """
        reads = any(atom.axis in streams and atom.stand == "write" for atom in self.atoms())
        stand: Stand = "read" if reads else "write"
        dims = (
            replace(dim, atom=replace(dim.atom, stand=stand)) if dim.atom is not None and dim.atom.index else dim
            for dim in self.dims
        )
        return TensorPattern(self.text, tuple(dims))

    def written_as(self, role: str) -> TensorPattern:
        """The pattern with one role for every channel that it writes, index axes aside."""
        dims = (
            replace(dim, atom=replace(dim.atom, role=role))
            if dim.atom is not None and dim.atom.stand == "write" and not dim.atom.index
            else dim
            for dim in self.dims
        )
        return TensorPattern(self.text, tuple(dims))

    def axes(self) -> set[str]:
        """The axes it names."""
        return {atom.axis for atom in self.atoms() if isinstance(atom.axis, str) and atom.axis != WILD}


_TOKEN = re.compile(r"\s*(<-|->|[A-Za-z_]\w*|\d+|[():|*+.\[\]])")


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, int]] = []
        at = 0
        while text[at:].strip():
            match = _TOKEN.match(text, at)
            if match is None:
                raise self.error(at, "a name, a number, an arrow or one of ( ) | : * +")
            self.tokens.append((match[1], match.start(1)))
            at = match.end()
        self.at = 0

    def error(self, at: int, wanted: str) -> PatternError:
        return PatternError(f"pattern {self.text!r}: expected {wanted} at {self.text[at:].strip() or 'the end'!r}")

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead][0] if self.at + ahead < len(self.tokens) else ""

    def take(self, token: str | None = None) -> str:
        at = self.tokens[self.at][1] if self.at < len(self.tokens) else len(self.text)
        if not self.peek() or (token is not None and self.peek() != token):
            raise self.error(at, token or "a dim")
        self.at += 1
        return self.tokens[self.at - 1][0]

    def tensor(self) -> TensorPattern:
        if self.text.strip() == ".":
            return TensorPattern(self.text, ())
        role = self.role()
        if self.peek() in ("*", "+"):
            dims = self.side("gain" if self.take() == "*" else "shift", role)
        elif self.peek() == "->":
            self.take()
            dims = self.side("write", role)
        else:
            arrow = next((token for token, _ in self.tokens if token in ("<-", "->")), "")
            if not arrow:
                raise self.error(len(self.text), "an arrow")
            first: Stand = "write" if arrow == "<-" else "read"
            dims = self.side(first, role)
            self.take(arrow)
            dims += self.side("read" if first == "write" else "write", role)
        if self.peek():
            raise self.error(self.tokens[self.at][1], "the end")
        return TensorPattern(self.text, tuple(dims))

    def role(self) -> str | None:
        if self.peek(1) == ":" and re.match(r"[A-Za-z_]", self.peek()):
            name = self.take()
            self.take(":")
            return name
        return None

    def side(self, stand: Stand, role: str | None) -> list[Dim]:
        dims = []
        while self.peek() not in ("", "<-", "->", ")", "|"):
            dims.append(self.dim(stand, role))
        if not dims:
            raise self.error(self.tokens[self.at][1] if self.at < len(self.tokens) else len(self.text), "a dim")
        return dims

    def dim(self, stand: Stand, role: str | None) -> Dim:
        if self.peek() == "(":
            self.take()
            parts = [self.part(stand, role)]
            while self.peek() == "|":
                self.take()
                parts.append(self.part(stand, role))
            self.take(")")
            return parts[0] if len(parts) == 1 else Dim("concat", None, tuple(parts))
        index = self.peek() == "["
        if index:
            self.take()
        token = self.take()
        if not re.match(r"\w", token):
            raise self.error(self.tokens[self.at - 1][1], "an axis, a number or (")
        if index:
            self.take("]")
        return Dim("atom", Atom(int(token) if token.isdigit() else token, stand, role, index))

    def part(self, stand: Stand, role: str | None) -> Dim:
        own = self.role()
        dims = self.side(stand, own or role)
        return dims[0] if len(dims) == 1 else Dim("product", None, tuple(dims))


_INDEX = re.compile(r"{([A-Za-z_]\w*)(?::([A-Za-z_]\w*))?}")


@dataclass(frozen=True)
class NamePattern:
    """A tensor's name with index axes in braces: ``model.layers.{layer}.mlp.up_proj.weight``.

    ``{layer:sliding}`` stands for the layers of one kind only (see `Family.kinds`).

    Attributes:
        text: the name.
        only: the numbers of the layers of that kind in the source; None: all.
    """

    text: str
    only: frozenset[int] | None = None

    def __post_init__(self) -> None:
        if "{" in _INDEX.sub("", self.text):
            raise PatternError(f"tensor name {self.text!r}: an index axis is a name in braces, such as {{layer}}")

    @cached_property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for axis, _ in _INDEX.findall(self.text))

    @cached_property
    def kind(self) -> str:
        """The kind of layers that the name speaks of; empty: all."""
        return next((kind for _, kind in _INDEX.findall(self.text) if kind), "")

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        pieces = re.split(r"{\w+}", self._plain)
        return re.compile(r"(0|[1-9]\d*)".join(re.escape(piece) for piece in pieces))

    @cached_property
    def _plain(self) -> str:
        return _INDEX.sub(r"{\1}", self.text)

    @cached_property
    def _pinned(self) -> int:
        return next((i for i, (_, kind) in enumerate(_INDEX.findall(self.text)) if kind), 0)

    def has(self, index: Sequence[int]) -> bool:
        """Whether the source may have the tensor of this name at these values of its index axes."""
        return self.only is None or index[self._pinned] in self.only

    def match(self, name: str) -> dict[str, int] | None:
        """The value of each index axis in `name`, or None where the name is another; of whatever kind the layer is."""
        found = self._regex.fullmatch(name)
        return None if found is None else dict(zip(self.axes, map(int, found.groups()), strict=True))

    def format(self, index: Mapping[str, int]) -> str:
        return self._plain.format(**index)
