"""Channels of tensor dims and which are the same: nodes that are united, split into products, and cut into parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod


class Node:
    """A set of channels. Every dim of every tensor is a product of nodes.

    Attributes:
        size: how many channels.
        factors: the nodes whose product it is, outer first, where a reshape split it.
        parts: (start, stop) to the node of that cut.
        index: single ones of it were selected (experts of a stacked weight).
        looked: rows of it were looked up by "tokens", "positions" or other ids.
    """

    __slots__ = ("_up", "factors", "index", "looked", "parts", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._up: Node | None = None
        self.factors: list[Node] = []
        self.parts: dict[tuple[int, int], Node] = {}
        self.index = False
        self.looked = ""

    @property
    def root(self) -> Node:
        node = self
        while node._up is not None:
            node = node._up
        return node

    def unite(self, other: Node) -> None:
        """From here on both are the same channels; what one is made of, the other is made of."""
        a, b = self.root, other.root
        if a is b or a.size != b.size:
            return
        b._up = a
        a.index |= b.index
        a.looked = a.looked or b.looked
        if a.factors and b.factors:
            align(a.factors, b.factors)
        a.factors = a.factors or b.factors
        if set(a.parts) == set(b.parts):
            mine = {part.root for part in a.parts.values()}
            # The halves that rotary positions swap are not each other.
            if not any(part.root in mine for part in b.parts.values()):
                for cut, part in a.parts.items():
                    part.unite(b.parts[cut])
        elif not a.parts:
            a.parts = dict(b.parts)

    def split(self, outer: int) -> tuple[Node, Node]:
        """As (outer, rest)."""
        a, b = Node(outer), Node(self.size // outer)
        self.root.factors = [a, b]
        return a, b

    def cut(self, start: int, stop: int) -> Node:
        """The node of the channels from start to stop."""
        if (start, stop) == (0, self.size):
            return self
        if (start, stop) not in self.parts:
            self.parts[start, stop] = Node(stop - start)
            if self.root is not self:
                theirs = self.root.parts.setdefault((start, stop), self.parts[start, stop])
                theirs.unite(self.parts[start, stop])
        return self.parts[start, stop]


Dim = tuple[Node, ...]


def flat(nodes: Sequence[Node]) -> Iterator[Node]:
    """The nodes, with every one that was split replaced by its factors."""
    for node in nodes:
        if node.root.factors:
            yield from flat(node.root.factors)
        elif node.size != 1:
            yield node


def align(first: Sequence[Node], second: Sequence[Node]) -> bool:
    """Unite two products, splitting nodes where one side is coarser; False where they do not fit."""
    if len(first) == len(second) == 1:
        first[0].unite(second[0])
        return True
    if [node.size for node in first] == [node.size for node in second]:
        for a, b in zip(first, second, strict=True):
            a.unite(b)
        return True
    left, right = list(flat(first)), list(flat(second))
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if a.size == b.size:
            a.unite(b)
        elif a.size > b.size and a.size % b.size == 0:
            one, rest = a.split(b.size)
            one.unite(b)
            left.insert(0, rest)
        elif b.size > a.size and b.size % a.size == 0:
            one, rest = b.split(a.size)
            one.unite(a)
            right.insert(0, rest)
        else:
            return False
    return not left and not right


def fresh(size: int) -> Dim:
    return (Node(size),) if size != 1 else ()


def total(dim: Dim) -> int:
    return prod(node.size for node in dim)


def regroup(dims: Sequence[Dim], shape: Sequence[int]) -> list[Dim]:
    """The dims of a reshaped tensor; fresh ones where the reshape mixes them."""
    pending = [node for dim in dims for node in dim if node.size != 1]
    out: list[Dim] = []
    for size in shape:
        taken: list[Node] = []
        have = 1
        while have < size:
            if not pending:
                return [fresh(n) for n in shape]
            node = pending.pop(0)
            left = size // have
            if size % have or (node.size > left and node.root.factors):
                pending = [*node.root.factors, *pending]
                if size % have or not node.root.factors:
                    return [fresh(n) for n in shape]
                continue
            if node.size <= left:
                taken.append(node)
                have *= node.size
            elif node.size % left == 0:
                one, rest = node.split(left)
                taken.append(one)
                have *= left
                pending.insert(0, rest)
            else:
                return [fresh(n) for n in shape]
        if have != size:
            return [fresh(n) for n in shape]
        out.append(tuple(taken))
    return out
