"""What attention demands of the lifts: who reads whom among heads, their slopes, what scores are scaled by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from growformer.algebra.factor import ONE, Factor
from growformer.algebra.facts import Attention
from growformer.algebra.family import Family
from growformer.algebra.pattern import Atom
from growformer.proof.axes import NONE, Axis
from growformer.proof.norms import Norms
from growformer.proof.positions import rotary_places


@dataclass
class Attending:
    """A family's attentions under the receipt's axes. `problems` fills with what cannot hold.

    Attributes:
        keys: for each axis that a dot product sums over, its attention.
        rotary: for each axis that turns, for each old pair the pair it moved to.
    """

    family: Family
    axes: Mapping[str, Axis]
    norms: Norms
    problems: list[str] = field(default_factory=list)
    keys: dict[str, Attention] = field(default_factory=dict)
    rotary: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for attention in self.family.attentions:
            for key in attention.key:
                if self.keys.setdefault(key, attention).scaled != attention.scaled or (
                    set(self.keys[key].key) != set(attention.key)
                ):
                    self.problems.append(f"axis {key}: two attentions sum over it, and scale otherwise; not covered")
            self._heads(attention)
            self._alibi(attention)
            self._rotary(attention)
        for key in self.keys:
            self._key(key)

    def growth(self, key: str) -> Factor:
        """What scores are scaled by: sqrt(key'/key), for they are divided by sqrt(key') (arXiv 2308.06103, eq. 19)."""
        attention = self.keys[key]
        axes = [self.axes[name] for name in attention.key]
        old, new = sum(axis.old for axis in axes), sum(axis.new for axis in axes)
        return Factor.sqrt(new, old) if attention.scaled and old else ONE

    def normed(self, key: str) -> bool:
        """Whether norms read the queries and keys."""
        return any(key in norm.axes for norm in self.family.norms.values())

    def unseen(self, atom: Atom) -> bool:
        """Whether new channels of heads may hold anything here, whichever side is closed.

        Scores of a new head see nothing but its own values, and a new key/value head is read by new heads only.
        """
        for attention in self.family.attentions:
            if atom.axis == attention.kv_heads and atom.axis != attention.heads:
                return self.family.side(atom.role) != "v" or self.axes[str(atom.axis)].closed != "writers"
            if atom.axis in (attention.heads, attention.group) and self.family.side(atom.role) in ("q", "k"):
                return True
        return False

    def sharing(self, axis: str) -> bool:
        """Whether this is an axis of key/value heads or groups, whose new channels no old output may read."""
        return any(axis in (a.kv_heads, a.group) and axis != a.heads for a in self.family.attentions)

    def grouped(self, axis: str) -> bool:
        """Whether this is an axis of query heads that patterns may write as (kv_heads group)."""
        return any(axis == a.heads and a.group is not None for a in self.family.attentions)

    def heads(self, axis: str) -> bool:
        return any(axis in (a.heads, a.kv_heads, a.group) for a in self.family.attentions)

    def carried(self, role: str, key: str) -> Factor:
        """What the normalised queries or keys are, of what they were, at the channels that are read."""
        axis, norm = self.axes[key], self.family.norms[role]
        factor = Factor(1 / self.norms.seen.get(role, Fraction(1)))
        for name in norm.axes:
            factor = factor * self.axes[name].scale
        at = next((at[0] for at in axis.read_at() if at), None)
        return factor if at is None else factor * axis.factors[int(axis.factor[at])]

    def qk_gains(self, key: str) -> tuple[Factor, Factor]:
        """What the gains of queries and of keys are multiplied by, where the queries' takes up no more than it must.

        Their product alone is fixed: what scores are scaled by, over what the norms left of queries and keys.
        """
        queries, keys, _ = self.keys[key].roles
        q, k = self.carried(queries, key), self.carried(keys, key)
        first = ONE if len(self.family.norms[queries].axes) == 1 else q.inverse
        return first, self.growth(key) / (q * k * first)

    def _heads(self, attention: Attention) -> None:
        """Every old query head must read (a copy of) its old key/value head, and no new one what is not its own."""
        for name in (attention.heads, attention.group):
            axis = None if name is None or self._own_values(attention) else self.axes[name]
            if axis is None or not axis.empty or axis.closed == "readers":
                continue
            wrong = self._alike(attention, axis) if axis.closed == "pairs" else self._own_writers(attention, axis)
            if wrong:
                self.problems.append(f"axis {name}: {wrong}")
        if attention.kv_heads is None or attention.kv_heads == attention.heads:
            return
        heads, shared = self.axes[attention.heads], self.axes[attention.kv_heads]
        if not shared.old or not shared.new or heads.old % shared.old or heads.new % shared.new:
            self.problems.append(
                f"axis {heads.name}: {heads.old} over {shared.old} and {heads.new} over {shared.new} "
                f"key/value heads must divide"
            )
            return
        old, new = heads.old // shared.old, heads.new // shared.new
        for j, h in enumerate(heads.source.tolist()):
            found = int(shared.source[j // new])
            if h >= 0 and found != h // old:
                self.problems.append(
                    f"axis {heads.name}: q heads appended across groups: old head {h} sits at {j} and reads "
                    f"{'a new' if found < 0 else f'old key/value head {found} as its'} key/value head; "
                    f"required old key/value head {h // old}"
                )
                break
        if attention.group is not None:
            self._group(heads, shared, self.axes[attention.group])

    def _own_writers(self, attention: Attention, heads: Axis) -> str:
        """What is wrong with new heads that are closed where their values are written."""
        shared = None if attention.kv_heads is None else self.axes[attention.kv_heads]
        said = "new heads may read old values, so they must be closed at readers"
        if shared is None or heads.name != attention.heads or shared.closed != "writers" or heads.new % shared.new:
            return said
        group = heads.new // shared.new
        new = (heads.source == NONE).nonzero().flatten()
        return "" if bool((shared.source[new // group] == NONE).all()) else said

    def _alike(self, attention: Attention, heads: Axis) -> str:
        """What is wrong with pairs of heads: they must have one slope, and keys and values that are alike."""
        assert heads.partner is not None
        shared = None if attention.kv_heads is None else self.axes[attention.kv_heads]
        if attention.alibi is not None or heads.name != attention.heads or attention.group is not None:
            return "heads that differ by their number, or stand in groups, have no pairs"
        if shared is None:
            return ""  # all heads read one set of keys and values
        group = heads.new // shared.new
        for j, i in enumerate(heads.partner.tolist()):
            mine, other = j // group, i // group
            alike = mine == other or (shared.partner is not None and int(shared.partner[mine]) == other)
            if i >= 0 and not alike:
                return f"heads {i} and {j} are a pair, and read key/value heads that are not"
        return ""

    def _own_values(self, attention: Attention) -> bool:
        """Whether every head has values of its own: tensors that write values write them for each query head."""
        wrote = [
            {atom.axis for atom in pattern.atoms() if atom.stand == "write" and atom.role in (None, attention.roles[2])}
            for _, pattern in self.family.patterns
            if any(a.axis == attention.value and a.stand == "write" for a in pattern.atoms())
        ]
        return bool(wrote) and all(attention.heads in axes for axes in wrote)

    def _group(self, heads: Axis, shared: Axis, group: Axis) -> None:
        """Where heads are written as (kv_heads group), their lift is the product of the two."""
        if shared.copied or group.copied:
            name = (shared if shared.copied else group).name
            self.problems.append(f"axis {name}: a group's queries stand beside its keys; copies are not covered")
        for j, h in enumerate(heads.source.tolist()):
            outer, inner = int(shared.source[j // group.new]), int(group.source[j % group.new])
            required = outer * group.old + inner if outer >= 0 and inner >= 0 else NONE
            if h != required:
                self.problems.append(
                    f"axis {heads.name}: new head {j} comes from {h}; by {shared.name} and {group.name} from {required}"
                )
                return

    def _alibi(self, attention: Attention) -> None:
        """A head's slope follows from its number and their count, so that it must sit where the slope is its own."""
        heads = self.axes[attention.heads]
        if attention.alibi is None or heads.is_identity:
            return
        had, have = slopes(heads.old), slopes(heads.new)
        for j, h in enumerate(heads.source.tolist()):
            if h >= 0 and had[h] != have[j]:
                self.problems.append(
                    f"axis {heads.name}: old head {h} sits at {j}, whose slope is 2^-{have[j]}; required 2^-{had[h]}"
                )
                return

    def _rotary(self, attention: Attention) -> None:
        rotary = attention.rotary
        if rotary is None or rotary.axis in self.rotary:
            return
        axis = self.axes[rotary.axis]
        if axis.copied and not self.normed(axis.name):
            self.problems.append(f"axis {axis.name}: copies would turn with other frequencies than their old channels")
        elif rotary.whole:
            places, wrong = rotary_places(rotary, axis)
            self.problems += wrong
            self.rotary[axis.name] = places

    def _key(self, key: str) -> None:
        axis, family = self.axes[key], self.family
        wrote = {
            atom.role
            for _, pattern in family.patterns
            for atom in pattern.atoms()
            if atom.stand == "write" and atom.axis == key
        }
        if self.normed(key):
            self._normed_key(axis)
        elif not (axis.is_identity and self.growth(key) == ONE) and self.keys[key].roles[1] not in wrote:
            self.problems.append(f"axis {key}: no tensor writes it in the role k; not covered")

    def _normed_key(self, key: Axis) -> None:
        """Queries and keys under norms: both normed, with gains, and each old channel read at one place."""
        *roles, value = self.keys[key.name].roles
        norms = [self.family.norms.get(role) for role in roles]
        # Where keys are the values as well, the norm over values is what follows then; its readers name it.
        others = {role for role, norm in self.family.norms.items() if key.name in norm.axes} - {*roles, value}
        across = [self.axes[name] for norm in norms if norm is not None for name in norm.axes]
        if all(axis.is_identity for axis in (key, *across)) and self.growth(key.name) == ONE:
            return
        if others or any(norm is None or key.name not in norm.axes for norm in norms):
            self.problems.append(f"axis {key.name}: only one of queries and keys is normed; not covered")
        elif any(norm is not None and norm.gain is None for norm in norms):
            self.problems.append(f"axis {key.name}: the norms of queries and keys have no gain; not covered")
        if any(len(at) != 1 for at in key.read_at()):
            self.problems.append(f"axis {key.name}: under its norms each old channel must be read at one place")
        elif len({int(key.factor[at[0]]) for at in key.read_at()}) > 1:
            self.problems.append(f"axis {key.name}: the channels that are read carry unequal coefficients")


def slopes(heads: int) -> list[Fraction]:
    """For each head, e of its slope 2^-e of linear biases (arXiv 2108.12409).

    Where `heads` is no power of two, the table of the lower power comes first and then every second slope of the table
    of twice it: so Bloom builds it, and MPT's way round comes to the same. A largest exponent other than 8 scales all
    of them alike.
    """
    lower = 2 ** (heads.bit_length() - 1)
    more = [Fraction(4 * k, lower) for k in range(1, 2 * (heads - lower), 2)]
    return [Fraction(8 * k, lower) for k in range(1, lower + 1)] + more
