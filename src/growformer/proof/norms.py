"""What norms see of the lifts, and what their gains, shifts and readers must take back for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from growformer.algebra.factor import ONE, Factor
from growformer.algebra.facts import Norm
from growformer.algebra.family import OUTSIDE, Family
from growformer.algebra.pattern import Atom, NamePattern
from growformer.proof.axes import Axis


@dataclass
class Norms:
    """The norms of a family under the receipt's axes. `problems` fills with what cannot hold.

    Attributes:
        tied: the head reads through the embedding's own tensor.
        seen: by role, by how much the mean square changes that the norm would see if nothing but the lifts and scales
            acted. Roles are left out whose norm sees what it cannot.
    """

    family: Family
    axes: Mapping[str, Axis]
    tied: bool
    problems: list[str] = field(default_factory=list)
    seen: dict[str, Fraction] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role, norm in self.family.norms.items():
            self._look(role, norm)
        atoms = [atom for _, pattern in self.family.patterns for atom in pattern.atoms()]
        for axis in self.axes:
            branches = self._branches(axis)
            said = all(a.role in branches for a in atoms if a.stand == "read" and a.axis == axis)
            if not said and len({self._taken(norm, role) for role, norm in branches.items() if role in self.seen}) > 1:
                self.problems.append(f"axis {axis}: what reads it follows norms with and without a gain; not covered")
        for role, norm in self.family.norms.items():
            if norm.output != "branch" and norm.gain is None and self.rho(role) != 1:
                self.problems.append(f"axis {norm.axis}: norm {role} has no gain to make up for its mean square")
        self._powers()
        self._head()

    def rho(self, role: str) -> Fraction:
        """By how much the mean square under a norm changes, and so its eps must.

        A norm across axes shares its eps with others, so what it reads is rescaled until nothing changes.
        """
        return Fraction(1) if len(self.family.norms[role].axes) > 1 else self.seen.get(role, Fraction(1))

    def spread(self, role: str | None, axis: str) -> Factor:
        """What writers of `axis` are multiplied by for the norm across it and others to see the mean square it saw."""
        norm = self.family.norms.get(role or "")
        if norm is None or len(norm.axes) == 1 or norm.axes[-1] != axis:
            return ONE
        return Factor(1 / self.seen.get(role or "", Fraction(1)))

    def reads(self, role: str | None, axis: str) -> bool:
        """Whether a norm reads what tensors of this role write on `axis`."""
        across = self.family.norms.get(role or "")
        return self.family.norm_over(axis) is not None or (across is not None and axis in across.axes)

    def gain(self, role: str, at: NamePattern, last: bool) -> Factor:
        """What old gains are multiplied by.

        The norm divides c E a by sqrt(rho) more than a. Before a branch the gain takes back c / sqrt(rho); what goes
        back to the stream carries c there, so the gain takes back 1 / sqrt(rho) only.

        Args:
            role: of the norm; queries and keys aside.
            at: the tensor's name.
            last: it stands in the last layer, or in none.
        """
        norm = self.family.norms[role]
        back = Factor(self.rho(role))
        if norm.output == "branch":
            back = back / self.axes[norm.axes[0]].scale
        return back * self.demand(role, at, last) * self.power(role)

    def shift(self, role: str, at: NamePattern, last: bool) -> Factor:
        """What old shifts are multiplied by: what is added to the stream carries its scale."""
        norm = self.family.norms[role]
        scale = ONE if norm.output == "branch" else self.axes[norm.axes[0]].scale
        return scale * self.demand(role, at, last)

    def taken(self, axis: str, at: NamePattern, role: str | None) -> Factor:
        """What readers of `axis` are multiplied by: what the norm before them left for want of a gain.

        What reads the stream itself, with no norm between, takes back its scale. A reader's role may name its norm.
        """
        power, branches = self._power_behind(axis, at), self._branches(axis)
        if role in branches:
            return power * self._taken(branches[role], role)
        if self.raw(axis, at, role):
            return power / self.axes[axis].scale
        return power * next((self._taken(norm, name) for name, norm in branches.items()), ONE)

    def _power_behind(self, axis: str, at: NamePattern) -> Factor:
        """What a reader of `axis` is multiplied by, for the code multiplies what comes of it by a power."""
        pattern = next((pattern for name, pattern in self.family.patterns if name.text == at.text), None)
        roles = {atom.role for atom in pattern.atoms() if atom.stand == "write"} if pattern is not None else set()
        mine = [role for role in roles if (power := self.family.powers.get(role or "")) and power.axis == axis]
        return self.power(mine[0]) if mine else ONE

    def raw(self, axis: str, at: NamePattern, role: str | None) -> bool:
        """Whether a tensor reads `axis` as it was written: it says so, or no norm gives to branches where it stands."""
        if role == "raw" or role in self._branches(axis):
            return role == "raw"
        layers = set(self.family.layers) & set(at.axes)
        for name, norm in self._branches(axis).items():
            if norm.gain is None or any(
                (layers & set(other.axes)) or not (layers or set(self.family.layers) & set(other.axes))
                for other in self._gains.get(name, ())
            ):
                return False
        return True

    def power(self, role: str | None) -> Factor:
        """What a writer is multiplied by, because the code multiplies what it writes by a power of a size."""
        power = self.family.powers.get(role or "")
        axis = None if power is None else self.axes.get(power.axis)
        if power is None or axis is None or axis.old == axis.new:
            return ONE
        if (2 * power.exponent).denominator != 1:
            return ONE  # said by `_powers`
        return Factor(Fraction(axis.old, axis.new) ** int(2 * power.exponent))

    def demand(self, role: str, at: NamePattern, last: bool) -> Factor:
        """What gain and shift of the norm before the head are multiplied by besides.

        In a post-norm model that norm is the last layer's; those of the other layers are the stream.
        """
        tied, inside = self.family.tied, set(self.family.layers) & set(at.axes)
        if tied is None or role != tied.norm or (inside and not (last and tied.layer in inside)):
            return ONE
        return self.head

    @cached_property
    def head(self) -> Factor:
        """What the head demands of the norm before it.

        A tied head reads the embedding's columns, which carry its scale c, its power f of a size, and E, so that logits
        would come out c f E^T E as large. The code may also multiply logits by a power of a size.
        """
        demand, tied = self.power("logits"), self.family.tied
        norm = None if tied is None else self.family.norms.get(tied.norm)
        if not self.tied or tied is None or norm is None:
            return demand
        atoms = [a for a in self.family.find(tied.embedding)[1].atoms() if a.stand == "write" and a.axis in self.axes]
        written, read = self.axes[str(atoms[-1].axis)], self.axes[norm.axes[0]]
        overlap = written.overlap(read)
        if overlap is None:
            self.problems.append(
                f"axis {read.name}: the tied head reads it through the embedding, whose channels of {written.name} "
                f"are placed otherwise"
            )
            return demand
        return demand / (written.scale * self.power(atoms[-1].role)) / Factor(overlap**2)

    @cached_property
    def _gains(self) -> dict[str, list[NamePattern]]:
        """By role, the names of gains."""
        out: dict[str, list[NamePattern]] = {}
        for name, pattern in self.family.patterns:
            for atom in pattern.atoms():
                if atom.stand == "gain" and atom.role is not None:
                    out.setdefault(atom.role, []).append(name)
        return out

    def _branches(self, axis: str) -> dict[str, Norm]:
        return {r: n for r, n in self.family.norms.items() if n.axis == axis and n.output == "branch"}

    def _taken(self, norm: Norm, role: str) -> Factor:
        return ONE if norm.gain is not None else Factor(self.rho(role)) / self.axes[norm.axes[0]].scale

    def _look(self, role: str, norm: Norm) -> None:
        """Whether a norm can see these lifts at all, and what it sees."""
        axes = [self.axes[name] for name in norm.axes]
        if all(axis.is_identity for axis in axes):
            self.seen[role] = Fraction(1)
            return
        said, seen = len(self.problems), Fraction(1)
        for axis in axes:
            energy = self._look_at(norm, axis, role)
            seen *= axis.scale.square * (energy or 1) * (1 if norm.kind == "sum" else Fraction(axis.old, axis.new))
        if len(axes) > 1 and self.family.side(role) not in ("q", "k"):
            name = axes[-1].name
            self.problems.append(f"axis {name}: norm {role} reads it with others, and is none of q or k; not covered")
        if len(axes) == 1 and seen != 1 and isinstance(norm.eps, float | int) and norm.eps:
            self.problems.append(
                f"axis {axes[0].name}: norm {role} has its eps {norm.eps!r} in the code, so the mean square it sees "
                f"may not change; found x {seen}"
            )
        if norm.kind == "sum" and any(not axis.plain or axis.copied for axis in axes):
            self.problems.append(
                f"axis {axes[0].name}: norm {role} gives to what is not linear, so that new channels must be zero"
            )
        if len(self.problems) == said:
            self.seen[role] = seen

    def _look_at(self, norm: Norm, axis: Axis, role: str) -> Fraction | None:
        energy = axis.energy()
        if energy is None:
            self.problems.append(f"axis {axis.name}: old channels reach a norm with unequal energies")
        if norm.kind != "layer" and axis.means:
            self.problems.append(f"axis {axis.name}: an RMSNorm sees a carried mean")
        if norm.kind == "layer" and axis.empty:
            empty = (axis.source == -1).nonzero()
            self.problems.append(
                f"axis {axis.name}: LayerNorm needs the mean of the old channels in new ones (or copies of them); "
                f"found {len(empty)} empty channels, the first at {int(empty[0])}"
            )
        if norm.kind == "layer" and any(factor != ONE for factor in axis.factors):
            self.problems.append(f"axis {axis.name}: under LayerNorm every coefficient must be 1")
        if norm.kind == "layer" and axis.means and (norm.output != "branch" or len(norm.axes) > 1):
            self.problems.append(f"axis {axis.name}: norm {role} gives to the stream, and carries no mean on")
        forced = self.family.attention_of(axis.name) is not None  # the side follows from the role there
        if not forced and axis.closed != "writers" and axis.empty:
            self.problems.append(f"axis {axis.name}: a norm reads it, so it must be closed at its writers")
        return energy

    def _powers(self) -> None:
        """Whether what the code multiplies by a power of a size can be made up for."""
        family = self.family
        for role, power in family.powers.items():
            axis = self.axes.get(power.axis)
            if axis is None or (axis.old != axis.new and (2 * power.exponent).denominator != 1):
                self.problems.append(f"axis {power.axis}: multiplied by its size to {power.exponent}; not covered")
            tensors = [list(pattern.atoms()) for _, pattern in family.patterns]
            if self.power(role) != ONE and any(
                a.role == role and not self._takes_power(a, role, power.axis, atoms) for atoms in tensors for a in atoms
            ):
                self.problems.append(f"axis {power.axis}: role {role} has a power, and writes no stream; not covered")

    def _takes_power(self, atom: Atom, role: str, axis: str, tensor: list[Atom]) -> bool:
        """Whether some rule makes up for the power: of a writer, of a norm's gain, or of a reader that writes more."""
        if atom.stand == "write":
            reads = sum(other.stand == "read" and other.axis == axis for other in tensor)
            return (atom.axis in self.family.streams and atom.axis == axis) or (atom.axis != axis and reads == 1)
        norm = self.family.norms.get(role)
        return atom.stand == "gain" and norm is not None and (norm.axis, norm.output) == (axis, "branch")

    def _head(self) -> None:
        """Whether the norm before the head can do what the head demands."""
        tied = self.family.tied
        norm = None if tied is None else self.family.norms.get(tied.norm)
        if tied is None or norm is None:
            written = set() if tied is None else self.family.find(tied.embedding)[1].axes() - set(OUTSIDE)
            still = all(self.axes[axis].is_identity for axis in written if axis in self.axes)
            if (self.tied and not still) or self.power("logits") != ONE:
                self.problems.append(f"axis {self.family.stream}: no norm is named that gives to the head; not covered")
            return
        if tied.norm not in self.seen or self.head == ONE:
            return
        gains = self._gains.get(tied.norm, [])
        inside = [name for name in gains if set(self.family.layers) & set(name.axes)]
        heads = [name for name in gains if tied.layer in name.axes]
        if norm.gain is None:
            self.problems.append(f"axis {norm.axis}: the head demands x {self.head} of its norm, which has no gain")
        elif (len(heads) != 1 or norm.output != "stream") if tied.layer else inside:
            self.problems.append(
                f"axis {norm.axis}: norm {tied.norm} before the head also stands elsewhere; not covered"
            )
