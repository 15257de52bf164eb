"""Where rotary pairs sit, and what config.json must say for each old pair to turn with the frequency it had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from growformer.algebra.facts import Rotary
from growformer.algebra.sizes import lookup
from growformer.proof.axes import NONE, Axis
from growformer.proof.frequencies import LISTED, check_rewritten

Config = Mapping[str, Any]

ROPE = ("rope_theta", "rope_parameters", "rope_scaling")
FRACTION = "partial_rotary_factor"
_BY_FREQUENCY = ("default", "linear", "llama3", "dynamic")
"""Rope types that treat each frequency for itself, whatever its place, so that pairs may move among places."""


def rotary_places(rotary: Rotary, axis: Axis) -> tuple[list[int], list[str]]:
    """For each old pair of an axis that turns as a whole, the pair of the new head that it moved to; what is torn."""
    if axis.is_identity:
        return list(range(axis.old // 2)), []
    if axis.old % 2 or axis.new % 2:
        return [], [f"axis {axis.name}: rotary positions need even sizes; found {axis.old} -> {axis.new}"]
    at = [place[0] if place else NONE for place in axis.read_at()]
    half = rotary.layout == "half"
    step, pair, new_pair = (1, axis.old // 2, axis.new // 2) if half else (2, 1, 1)
    out = []
    for i in range(0, axis.old // 2 * step, step):
        place = at[i]
        starts = 0 <= place < axis.new // 2 if half else place >= 0 and place % 2 == 0
        if not starts or at[i + pair] != place + new_pair:
            required = f"(i', i' + {new_pair})" if half else "(2i', 2i' + 1)"
            return [], [
                f"axis {axis.name}: rotary pair {i // step} = channels ({i}, {i + pair}) sits at "
                f"({place}, {at[i + pair]}); required {required}"
            ]
        out.append(place // step)
    return out, []


@dataclass
class _Stated:
    """What a config states of one set of rope parameters: every theta, every fraction, the other fields."""

    thetas: list[float] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    rest: list[dict[str, Any]] = field(default_factory=list)


def _sets(config: Config, older: str) -> dict[str, _Stated]:
    """The sets of rope parameters: one, named "", or one for each layer type.

    Args:
        config: a model's config.
        older: the older name of the fraction that turns; empty where no fraction does.
    """
    stated = config.get("rope_parameters")
    if isinstance(stated, Mapping) and any(isinstance(value, Mapping) for value in stated.values()):
        # Older fields beside sets for each layer type do not count; they are held to stay as they are.
        return {str(name): _set([("rope_parameters", value)], bool(older)) for name, value in stated.items()}
    fields = [(name, config[name]) for name in ("rope_parameters", "rope_scaling") if name in config]
    out = _set(fields, bool(older))
    out.thetas += [float(config["rope_theta"])] if config.get("rope_theta") is not None else []
    out.fractions += [float(config[older])] if older and config.get(older) is not None else []
    return {"": out}


def _set(fields: list[tuple[str, Any]], partial: bool) -> _Stated:
    out = _Stated()
    for name, stated in fields:
        if isinstance(stated, Mapping):
            rest = dict(stated)
            if "rope_theta" in rest:
                out.thetas.append(float(rest.pop("rope_theta")))
            rest["rope_type"] = rest.pop("type", None) or rest.get("rope_type") or "default"
            if rest["rope_type"] == "proportional" or (partial and FRACTION in rest):
                out.fractions.append(float(rest.pop(FRACTION, 1.0)))
            out.rest.append({k: v for k, v in rest.items() if k != "type"})
        elif name == "rope_scaling" and not any(isinstance(other, Mapping) for _, other in fields):
            out.rest.append({"rope_type": "default"})
    return out


def check_rotary(
    rotary: Rotary, axis: Axis, pairs: list[int], source: Config, target: Config, full: Config
) -> list[str]:
    """What the target's rope fields say other than they must.

    Args:
        rotary: the facts.
        axis: the axis that turns.
        pairs: where all channels turn, for each old pair the pair it moved to.
        source, target: the two config.json.
        full: the source's config with every default filled in, or `source` again.
    """
    problems = [] if rotary.whole else _turned(rotary, axis, target, full)
    places = pairs if rotary.whole else list(range(axis.old // 2))
    still = places == list(range(len(places))) and (not rotary.whole or axis.old == axis.new)
    old, raw, new = (_sets(config, rotary.partial) for config in (full, source, target))
    if not any(name in target for name in ROPE) and still:
        new = old  # both fall back on what the class fills in
    if set(old) != set(new):
        return [*problems, f"config field rope_parameters: found sets {sorted(new)}; required {sorted(old)}"]
    if set(old) != {""}:
        moved = [n for n in ("rope_theta", "rope_scaling") if target.get(n) != source.get(n)]
        problems += [f"config field {n}: found {target.get(n)!r}; required {source.get(n)!r}" for n in moved]
    if rotary.set and rotary.set not in old and not axis.is_identity:
        problems.append(f"config field rope_parameters: no set for {rotary.set}, where axis {axis.name} grows")
    for name in (name for name in old if rotary.set in ("", name)):
        # A config class may add to the rope fields what it derives: either way of writing them is the source's.
        kept = [*old[name].rest, *(raw[name].rest if name in raw else [])] or [{"rope_type": "default"}]
        rewritten = _rewritten(rotary, axis, places, still, old[name], new[name], kept, full)
        found = _thetas(rotary, axis, places, still, old[name], new[name], kept) if rewritten is None else rewritten
        problems += [f"{text} (rope_parameters of {name})" if name else text for text in found]
    return problems


def _rewritten(
    rotary: Rotary,
    axis: Axis,
    pairs: list[int],
    still: bool,
    old: _Stated,
    new: _Stated,
    kept: list[dict[str, Any]],
    full: Config,
) -> list[str] | None:
    """What is wrong with a set that is written as another rope type, or whose type sees where pairs are.

    None where it is neither: its base decides then.
    """
    kind, kinds = kept[0]["rope_type"], {fields["rope_type"] for fields in new.rest}
    moved = kind == "yarn" and pairs != list(range(len(pairs)))
    if still or not rotary.whole or not (moved or (kinds & set(LISTED) and kinds != {kind})):
        return None
    odd = [fields for fields in new.rest[1:] if fields != new.rest[0]]
    if odd or len(set(new.thetas)) != 1 or len(set(old.thetas)) != 1 or len(set(new.fractions)) > 1:
        return [f"config field rope_parameters: the target contradicts itself: {new.rest!r:.300}, theta {new.thetas}"]
    if moved and new.rest[0] not in kept:
        return [f"config field rope_parameters: found {new.rest[0]}; required {kept[0]}"]
    written = {**new.rest[0], **({FRACTION: new.fractions[0]} if new.fractions else {})}
    sizes, thetas = (axis.old, axis.new), (old.thetas[0], new.thetas[0])
    return list(check_rewritten(rotary, sizes, pairs, kept[0], written, thetas, full))


def _turned(rotary: Rotary, axis: Axis, target: Config, full: Config) -> list[str]:
    """Where the first channels turn only: as many as did, at their places, and nothing else among them."""
    if rotary.turned:
        name = rotary.turned
        turned = lookup(full, name)
        if lookup(target, name) != turned and not (lookup(target, name) is None and axis.old == axis.new):
            return [f"config field {name}: found {lookup(target, name)!r}; required {turned!r}"]
        counts = {"": turned if isinstance(turned, int) else axis.old if axis.is_identity else None}
    else:
        counts = {}
        fractions = {name: of.fractions for name, of in _sets(full, rotary.partial).items()}
        for name, of in _sets(target, rotary.partial).items():
            old = {int(axis.old * f) for f in fractions.get(name, [])}
            new = {int(axis.new * f) for f in of.fractions}
            if axis.old == axis.new and not new:
                new = old
            if len(old) > 1 or old != new:
                return [
                    f"config field {FRACTION}: found {of.fractions}, by which {sorted(new)} of {axis.new} channels "
                    f"turn; required {sorted(old)}, as in the source"
                ]
            counts[name] = next(iter(old), axis.old if axis.is_identity else None)
    for count in () if axis.is_identity else counts.values():
        if count is None or count > axis.old or count % 2:
            return [f"axis {axis.name}: {count} of its channels turn; not covered"]
        at = [place[0] if place else NONE for place in axis.read_at()]
        for i in range(axis.old):
            if (at[i] != i) if i < count else at[i] < count:
                required = i if i < count else f"{count} or more"
                return [f"axis {axis.name}: channel {i} sits at {at[i]}; required {required}, for {count} turn"]
    return []


def _thetas(
    rotary: Rotary,
    axis: Axis,
    pairs: list[int],
    still: bool,
    old: _Stated,
    new: _Stated,
    kept: list[dict[str, Any]],
) -> Iterator[str]:
    """What is wrong with one set of rope parameters."""
    for side, stated in (("source", old), ("target", new)):
        if len(set(stated.thetas)) > 1:
            yield f"config field rope_theta: the {side} contradicts itself: {stated.thetas}"
            return
    old_thetas, thetas = old.thetas, new.thetas
    if not old_thetas and not thetas and still:
        old_thetas = thetas = [1.0]  # both fall back on the same default
    if not old_thetas or not (thetas or still):
        yield f"config field rope_theta: source {old_thetas}, target {thetas}; both are needed"
        return
    if any(fields not in kept for fields in new.rest or [{"rope_type": "default"}]):
        yield f"config field rope_parameters: found {new.rest}; required {kept[0]}"
        return
    if kept[0]["rope_type"] == "proportional" and rotary.whole:
        # Of the whole head's pairs the first int(fraction x size // 2) turn.
        turning, turn = ({int(f * size // 2) for f in of.fractions} for of, size in ((old, axis.old), (new, axis.new)))
        if len(turning) != 1 or turning != turn:
            yield f"config field {FRACTION}: {sorted(turn)} pairs turn; required {sorted(turning)}, as in the source"
            return
    theta, found = old_thetas[0], (thetas or old_thetas)[0]
    if still:
        if found != theta:
            yield f"config field rope_theta: found {found!r}; required {theta!r}"
        return
    steady = rotary.steady if pairs == list(range(len(pairs))) else _BY_FREQUENCY
    if kept[0]["rope_type"] not in steady:
        yield f"config field rope_parameters: type {kept[0]['rope_type']!r} moves its frequencies"
        return
    for i, place in enumerate(pairs):
        # theta'^(-2 i'/key') = theta^(-2 i/key), solved for theta'.
        if (place == 0) != (i == 0):
            yield f"axis {axis.name}: rotary pair {i} sits at pair {place}, which turns with another frequency"
            return
        required = theta ** float(Fraction(i * axis.new, axis.old * place)) if i else found
        if abs(found - required) > 4 * 2.0**-52 * required:
            yield (
                f"config field rope_theta: found {found!r}; required {required!r} = {theta!r} ^ "
                f"({i} x {axis.new} / ({axis.old} x {place})), for rotary pair {i} to keep its frequency"
            )
            return
