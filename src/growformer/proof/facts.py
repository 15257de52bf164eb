"""What the receipt's axes demand of a family's tensors, and whether its norms, heads and positions allow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from growformer.algebra.factor import ONE, Factor
from growformer.algebra.family import OUTSIDE, Family
from growformer.algebra.pattern import Atom, NamePattern, TensorPattern
from growformer.proof.attending import Attending
from growformer.proof.axes import Axis
from growformer.proof.norms import Norms
from growformer.proof.slices import check_slices, slices_of


@dataclass
class Facts:
    """What the receipt's axes demand, for one family. `problems` fills with what cannot hold.

    Attributes:
        axes: every axis of the family but its layers.
        tied: the head reads through the embedding's own tensor.
        layers: every axis of layers, new ones reached by none.
        routed: the source had no router, so that its experts are whole copies under a new one.
    """

    family: Family
    axes: dict[str, Axis]
    tied: bool
    layers: Mapping[str, Axis] = field(default_factory=dict)
    routed: bool = False
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.norms = Norms(self.family, self.axes, self.tied)
        self.attending = Attending(self.family, self.axes, self.norms)
        self.problems += [*self.norms.problems, *self.attending.problems, *check_slices(self.family, self.axes)]
        if self.split > 1 and self.routed:
            self.problems.append("experts under a new router are whole copies; slices of them are not covered")
        for axis in self.axes.values():
            if axis.barred:
                self._barred(axis)
            if not axis.is_identity:
                self._axis(axis)
        for axis in self.layers.values():
            self._slabs(axis)

    @property
    def paired(self) -> bool:
        """Whether new channels of some axis stand in pairs."""
        return any(axis.partner is not None for axis in self.axes.values())

    @property
    def split(self) -> int:
        """In how many slices every expert is split; 1: in none."""
        return slices_of(self.axes)

    def whole(self, axis: str) -> bool:
        """Whether each copy of a channel is read by all that read it: what weighs the copies adds up to one."""
        return self.routed and self.routes(axis)

    def routes(self, axis: str) -> bool:
        """Whether a router chooses among the channels of an axis."""
        return self.family.experts is not None and axis == self.family.experts.axis

    def share(self, axis: str) -> Factor:
        """What the weights of all copies that read a channel of `axis` add up to, as a multiple of the source's.

        Experts are weighed by their router, and each of m copies gets 1/m of the weight.
        """
        return Factor.of(self.axes[axis].times or 1) if self.routes(axis) else ONE

    def scales(self, atom: Atom) -> bool:
        """Whether an atom is a gain that is no norm's: it scales an axis channel by channel (LayerScale)."""
        return atom.stand == "gain" and atom.role not in self.family.norms and atom.axis in self.axes

    def scale_of(self, at: NamePattern, pattern: TensorPattern) -> NamePattern | None:
        """The gain, in the same role, behind a tensor that writes the mean of an axis; None where none is."""
        for atom in pattern.atoms():
            if atom.stand != "write" or atom.role is None or not (atom.axis in self.axes and self._means(atom)):
                continue
            for other, scale in self.family.patterns:
                if other.axes == at.axes and any(self.scales(a) and a.role == atom.role for a in scale.atoms()):
                    return other
        return None

    def weighed(self, atom: Atom) -> bool:
        """Whether some tensor writes what this gain scales."""
        return any(
            (other.stand, other.role, other.axis) == ("write", atom.role, atom.axis)
            for _, pattern in self.family.patterns
            for other in pattern.atoms()
        )

    def _means(self, atom: Atom) -> bool:
        return self.axes[str(atom.axis)].means

    def _axis(self, axis: Axis) -> None:
        """Whether an axis may be lifted in this way at all."""
        family, name = self.family, axis.name
        if name in OUTSIDE:
            if not axis.plain or axis.source.tolist() != [i if i < axis.old else -1 for i in range(axis.new)]:
                self.problems.append(f"axis {name}: inputs and outputs index it, so that it may only grow at its end")
            return
        if family.experts is not None and name == family.experts.axis and not (axis.times or axis.barred):
            self.problems.append(
                f"axis {name}: a router chooses among them; only whole copies of all are covered, or new ones that its "
                f"bias bars"
            )
        if name in family.copied and not axis.times:
            self.problems.append(f"axis {name}: only whole copies of all its channels, for {family.copied[name]}")
        normed = family.norm_over(name) is not None
        linear = {*family.streams, *self.attending.keys, *(attention.value for attention in family.attentions)}
        if not axis.plain and (name in family.copied or not (normed or name in linear)):
            self.problems.append(f"axis {name}: its channels pass what is not linear; coefficients must be 1")
        if axis.means and not normed:
            self.problems.append(f"axis {name}: a mean is carried past a reader that is no norm")
        if axis.partner is not None:
            self._paired(axis)
        self._used(name)

    def _paired(self, axis: Axis) -> None:
        """Whether channels that are written alike hold the same, and nothing but maps that sum read them."""
        family, name = self.family, axis.name
        experts = family.experts is not None and name == family.experts.axis
        normed = any(name in norm.axes for norm in family.norms.values())
        if name in (*family.streams, *self.attending.keys, *family.copied) or experts or normed:
            self.problems.append(f"axis {name}: more than maps that sum its channels reads it, so it has no pairs")
        if any(name in at.axes for at, _ in family.patterns):
            self.problems.append(f"axis {name}: names of tensors hold it; pairs of tensors are not covered")

    def _slabs(self, layers: Axis) -> None:
        """Whether tensors that hold a slab for each layer leave it to the layer what comes of a new one."""
        for at, pattern in self.family.patterns:
            atoms = [atom for dim in pattern.dims for atom in dim.atoms() if atom.axis == layers.name]
            streams = any(a.axis in self.family.streams and a.stand == "write" for a in pattern.atoms())
            if atoms and not layers.is_identity and (streams or any(atom.stand != "write" for atom in atoms)):
                self.problems.append(
                    f"axis {layers.name}: {at.text} has a slab for each, and adds to the stream itself"
                )

    def _barred(self, axis: Axis) -> None:
        """Whether a bias can keep new channels of an axis from being chosen, and leaves the old ones as they are."""
        family, experts = self.family, self.family.experts
        if not (axis.name == "vocab" or (experts is not None and axis.name == experts.axis)):
            self.problems.append(f"axis {axis.name}: nothing chooses among its channels; it cannot be barred")
        elif not family.odds(axis.name):
            self.problems.append(f"axis {axis.name}: the family names no bias that could bar new channels")
        if not axis.plain or axis.copied:
            self.problems.append(f"axis {axis.name}: copies of what is chosen would be chosen as well, so not barred")

    def _used(self, name: str) -> None:
        """Whether tensors both write and read the axis: what nobody writes is an input, what nobody reads an output."""
        family = self.family
        attending = self.attending
        if name in attending.keys or attending.sharing(name) or attending.grouped(name):
            return  # queries read keys, and heads their group
        stands = {a.stand for _, pattern in family.patterns for a in pattern.atoms() if a.axis == name}
        names = {axis for at, _ in family.patterns for axis in at.axes}
        if name not in names and not {"write", "read"} <= stands:
            self.problems.append(f"axis {name}: inputs or outputs of the model use it, so it may not grow")
