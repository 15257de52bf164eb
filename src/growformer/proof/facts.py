"""What a receipt claims of each axis, and whether norms, heads and rotary positions allow it.

A receipt gives one pair (E, R) and one scale per axis. This module reads them by its own code, and works out what they
demand of the weights: the energy that a norm sees, the factor of gains and keys, where rotary pairs must sit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from growformer.algebra.factor import ONE, Factor
from growformer.algebra.family import Family, Norm

MEAN = -2
"""In `Axis.source`: this channel is the mean of all old ones."""
NONE = -1
"""In `Axis.source`: no old channel reaches this one."""


@dataclass(frozen=True)
class Axis:
    """One axis as the receipt tells it.

    Attributes:
        old, new: how many channels.
        source: [new] the old channel that reaches each new one, or NONE, or MEAN.
        factors: the distinct coefficients of E.
        factor: [new] which of `factors` each new channel carries.
        backs: [new] the coefficient in R of each new channel, None where R does not read it.
        scale: the scale c of every writer besides.
        closed: the side whose new entries are zero.
    """

    name: str
    old: int
    new: int
    source: Tensor
    factors: tuple[Factor, ...]
    factor: Tensor
    backs: tuple[Factor | None, ...]
    scale: Factor
    closed: str

    @property
    def reached(self) -> Tensor:
        return self.source >= 0

    @property
    def copied(self) -> bool:
        """Some old channel reaches several new ones."""
        reached = self.source[self.reached].tolist()
        return len(reached) > len(set(reached))

    @property
    def plain(self) -> bool:
        """Every coefficient is one and no channel is a mean, as anything between linear maps demands."""
        return self.scale == ONE and all(f == ONE for f in self.factors) and not bool((self.source == MEAN).any())

    @property
    def is_identity(self) -> bool:
        return self.old == self.new and self.plain and torch.equal(self.source, torch.arange(self.new))

    def read_at(self) -> list[list[int]]:
        """For each old channel, the new ones at which R reads it."""
        out: list[list[int]] = [[] for _ in range(self.old)]
        for j, (i, back) in enumerate(zip(self.source.tolist(), self.backs, strict=True)):
            if back is not None and i >= 0:
                out[i].append(j)
        return out

    def energy(self) -> Fraction | None:
        """The sum of squared coefficients of each old channel, where it is the same for all; None where it is not."""
        sums = [Fraction(0)] * self.old
        for i, k in zip(self.source.tolist(), self.factor.tolist(), strict=True):
            if i >= 0:
                sums[i] += self.factors[k].square
        return sums[0] if len(set(sums)) == 1 else None

    @classmethod
    def identity(cls, name: str, size: int) -> Axis:
        zeros = torch.zeros(size, dtype=torch.int64)
        return cls(name, size, size, torch.arange(size), (ONE,), zeros, (ONE,) * size, ONE, "writers")

    @classmethod
    def parse(cls, name: str, told: Mapping[str, Any]) -> Axis:
        """Read one axis of a receipt.

        Raises:
            ValueError: where it makes no sense, or R E is not the identity.
        """
        old, new, closed = int(told["old"]), int(told["new"]), str(told.get("closed", "writers"))
        scale = Fraction(told.get("scale", "1"))
        if scale <= 0 or closed not in ("writers", "readers"):
            raise ValueError(f"scale {scale} and closed side {closed!r} make no sense")
        source: list[int] = []
        squares: list[Fraction] = []
        backs: list[Factor | None] = []
        for run in told["lift"]:
            count, start = int(run[0]), run[1]
            square = Fraction(run[2]) if len(run) > 2 else Fraction(1)
            back = run[3] if len(run) > 3 else (None if start is None else "1")
            mean = int(run[4]) if len(run) > 4 else 0
            if start is None:
                source += [NONE] * count
                backs += [None] * count
            elif mean:
                if start != 0 or mean != old or back is not None:
                    raise ValueError(f"run {run}: a mean must be of all {old} old channels, and is not read back")
                source += [MEAN] * count
                backs += [None] * count
            else:
                if start < 0 or start + count > old:
                    raise ValueError(f"run {run}: reaches past the {old} old channels")
                source += range(start, start + count)
                backs += [None if back is None else Factor(Fraction(back))] * count
            if square <= 0 or (back is not None and Fraction(back) <= 0):
                raise ValueError(f"run {run}: coefficients must be positive")
            squares += [square] * count
        if len(source) != new:
            raise ValueError(f"its lift has {len(source)} channels; it says {new}")
        distinct = sorted(set(squares)) or [Fraction(1)]
        place = {square: k for k, square in enumerate(distinct)}
        axis = cls(
            name,
            old,
            new,
            torch.tensor(source, dtype=torch.int64),
            tuple(map(Factor, distinct)),
            torch.tensor([place[s] for s in squares], dtype=torch.int64),
            tuple(backs),
            Factor(scale),
            closed,
        )
        axis._check_inverse()
        return axis

    def _check_inverse(self) -> None:
        total = [Fraction(0)] * self.old
        for i, k, back in zip(self.source.tolist(), self.factor.tolist(), self.backs, strict=True):
            if back is not None and i >= 0:
                product = self.factors[k] * back
                try:
                    total[i] += Fraction(str(product))
                except ValueError:
                    raise ValueError(f"R E at old channel {i} holds {product}, which is not rational") from None
        for i, value in enumerate(total):
            if value != 1:
                raise ValueError(f"R E is {value} at old channel {i}; required 1")


@dataclass
class Facts:
    """What the receipt's axes demand, for one family. `problems` fills with what cannot hold.

    Attributes:
        axes: every axis of the family but the layer.
        rho: for each axis that a norm reads, by how much the mean square under the norm changes.
        tied: the head shares the embedding's tensor.
    """

    family: Family
    axes: dict[str, Axis]
    tied: bool
    problems: list[str] = field(default_factory=list)
    rho: dict[str, Fraction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.key = self._axis_of_role("q")
        self.value = self._axis_of_role("v")
        for norm in self.family.norms.values():
            self._norm(norm)
        self._coefficients()
        self._heads()

    def _axis_of_role(self, role: str) -> str | None:
        """The axis that tensors of an attention role write, heads aside."""
        heads = (self.family.attention.heads, self.family.attention.kv_heads)
        names = {
            atom.axis
            for _, pattern in self.family.patterns
            for atom in pattern.atoms()
            if atom.role == role and atom.stand == "write" and atom.axis not in heads and isinstance(atom.axis, str)
        }
        return min(names) if len(names) == 1 else None

    def normed(self, axis: str) -> bool:
        return self.family.norm_over(axis) is not None

    def _norm(self, norm: Norm) -> None:
        axis = self.axes[norm.axis]
        if axis.is_identity:
            self.rho[axis.name] = Fraction(1)
            return
        energy, means = axis.energy(), int((axis.source == MEAN).sum())
        if energy is None:
            self.problems.append(f"axis {axis.name}: old channels reach a norm with unequal energies")
            return
        if norm.kind == "rms" and means:
            self.problems.append(f"axis {axis.name}: an RMSNorm sees a carried mean")
        if norm.kind == "layer":
            empty = int((axis.source == NONE).sum())
            if empty:
                j = int((axis.source == NONE).nonzero()[0])
                self.problems.append(
                    f"axis {axis.name}: LayerNorm needs the mean of the old channels in new ones (or copies of them); "
                    f"found {empty} empty channels, the first at {j}"
                )
            if any(factor != ONE for factor in axis.factors):
                self.problems.append(f"axis {axis.name}: under LayerNorm every coefficient must be 1")
        if axis.name != self.key and axis.closed != "writers" and bool((axis.source == NONE).any()):
            self.problems.append(f"axis {axis.name}: a norm reads it, so it must be closed at its writers")
        self.rho[axis.name] = axis.scale.square * energy * Fraction(axis.old, axis.new)

    def _coefficients(self) -> None:
        """A factor may pass linear maps (and a norm that takes it back) only; outside axes may not move."""
        inside = self.family.layer
        for name, pattern in self.family.patterns:
            if inside in name.axes:
                continue
            for outside in sorted(pattern.axes() - {self.family.stream}):
                if not self.axes[outside].is_identity:
                    self.problems.append(f"axis {outside}: inputs or outputs of the model use it, so it may not grow")
        for axis in self.axes.values():
            if axis.name not in (self.family.stream, self.key, self.value) and not axis.plain:
                self.problems.append(f"axis {axis.name}: its channels pass what is not linear; coefficients must be 1")
            if bool((axis.source == MEAN).any()) and not self.normed(axis.name):
                self.problems.append(f"axis {axis.name}: a mean is carried past a reader that is no norm")
        if self.key is not None and self.normed(self.key):
            norms = [self.family.norms.get(role) for role in ("q", "k")]
            if any(norm is None or norm.axis != self.key for norm in norms):
                self.problems.append(f"axis {self.key}: only one of queries and keys is normed; not covered")
            key = self.axes[self.key]
            if any(len(at) != 1 for at in key.read_at()):
                self.problems.append(f"axis {key.name}: under its norms each old channel must be read at one place")
            elif len({int(key.factor[at[0]]) for at in key.read_at()}) > 1:
                self.problems.append(f"axis {key.name}: the channels that are read carry unequal coefficients")

    def _heads(self) -> None:
        """Every old query head must read (a copy of) its old key/value head."""
        attention = self.family.attention
        if attention.kv_heads is None:
            return
        heads, groups = self.axes[attention.heads], self.axes[attention.kv_heads]
        if heads.old % groups.old or heads.new % groups.new:
            self.problems.append(
                f"axis {heads.name}: {heads.old} over {groups.old} and {heads.new} over {groups.new} "
                f"key/value heads must divide"
            )
            return
        old, new = heads.old // groups.old, heads.new // groups.new
        for j, h in enumerate(heads.source.tolist()):
            found = int(groups.source[j // new])
            if h >= 0 and found != h // old:
                self.problems.append(
                    f"axis {heads.name}: q heads appended across groups: old head {h} sits at {j} and reads "
                    f"{'a new' if found < 0 else f'old key/value head {found} as its'} key/value head; "
                    f"required old key/value head {h // old}"
                )
                break
        if heads.closed != "readers" and bool((heads.source == NONE).any()):
            self.problems.append(f"axis {heads.name}: new heads may read old values, so they must be closed at readers")

    @property
    def key_growth(self) -> Factor:
        """sqrt(key'/key), for scores are divided by sqrt(key') (arXiv 2308.06103, eq. 19); 1 where they are not."""
        if self.key is None or not self.family.attention.scaled:
            return ONE
        return Factor.sqrt(self.axes[self.key].new, self.axes[self.key].old)

    def gain(self, role: str | None, axis: Axis) -> Factor:
        """What old gains over `axis` are multiplied by.

        The norm divides c E a by sqrt(rho) more than a; the gain takes back c / sqrt(rho). A tied head reads the
        embedding's columns, which carry c E too, so the norm before it takes back c and the energy of E once more.
        """
        factor = Factor(self.rho[axis.name]) / axis.scale
        return factor * self.shift(role, axis)

    def shift(self, role: str | None, axis: Axis) -> Factor:
        """What old shifts over `axis` are multiplied by: 1, but for a tied head."""
        tied = self.family.tied
        if not self.tied or tied is None or role != tied.norm:
            return ONE
        energy = axis.energy()
        return ONE / axis.scale / Factor(energy**2 if energy else Fraction(1))

    def qk_gain(self) -> Factor:
        """The product that the factors of q's and k's gains must have."""
        assert self.key is not None
        axis = self.axes[self.key]
        at = axis.read_at()[0][0]
        carried = axis.scale * axis.factors[int(axis.factor[at])]
        return self.key_growth * Factor(self.rho[axis.name] ** 2) / (carried * carried)

    def rotary_positions(self) -> list[int] | None:
        """For each old rotary pair, the pair of the new head that it moved to; None where pairs were torn."""
        rotary = self.family.attention.rotary
        if rotary is None or self.key is None:
            return None
        axis = self.axes[self.key]
        if axis.copied and not self.normed(axis.name):
            self.problems.append(f"axis {axis.name}: copies would turn with other frequencies than their old channels")
            return None
        if axis.old % 2 or axis.new % 2:
            self.problems.append(f"axis {axis.name}: rotary positions need even sizes; found {axis.old} -> {axis.new}")
            return None
        at, half, new_half = [place[0] if place else NONE for place in axis.read_at()], axis.old // 2, axis.new // 2
        for i in range(half):
            if not 0 <= at[i] < new_half or at[i + half] != at[i] + new_half:
                self.problems.append(
                    f"axis {axis.name}: rotary pair {i} = channels ({i}, {i + half}) sits at "
                    f"({at[i]}, {at[i + half]}); required (i', i' + {new_half})"
                )
                return None
        return at[:half]


def read_axes(
    family: Family, told: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int], layers: Sequence[int | None]
) -> tuple[dict[str, Axis], list[str]]:
    """The receipt's axes, the layer's aside; an axis it leaves out stays as it is. Returns them with what is wrong."""
    axes: dict[str, Axis] = {}
    problems = [f"axis {name}: family {family.name} has none such" for name in told if name not in family.axes]
    for name in family.axes:
        try:
            axis = Axis.parse(name, told[name]) if name in told else Axis.identity(name, sizes.get(name, 0))
        except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
            problems.append(f"axis {name}: {error}")
            continue
        if name != family.layer:
            axes[name] = axis
        elif name in told and [None if i < 0 else i for i in axis.source.tolist()] != list(layers):
            problems.append(f"axis {name}: its lift and the layer map {list(layers)} disagree")
    return axes, problems
