"""What a check of a family found, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["exact", "within eps", "refused", "fails", "not checked"]


@dataclass(frozen=True)
class Growth:
    """One growth from disk to disk, verified by a process that did not make it.

    Attributes:
        what: the config field that grew, or what the request combines.
        architecture: the class.
        dtype: of the source's files.
        request: new sizes by config field.
        state: how it ended.
        detail: what failed, or the refusal.
        algebra: the relative difference in float64; None where it was not measured.
        bound: of a growth that is exact up to eps, what the difference must be within; None elsewhere.
        beyond: of such a growth, the difference from the source with its eps taken as in the grown model.
        ratio: the runtime's difference in noise floors; None where it was not measured.
        fidelity: tensors identical, scaled, rounded, new.
        new_entries: how many entries are new.
        dead: how many of them have no gradient within two passes.
        excused: why the plan says that they cannot have one.
    """

    what: str
    architecture: str
    dtype: str
    request: Mapping[str, int]
    state: State
    detail: str = ""
    algebra: float | None = None
    ratio: float | None = None
    fidelity: Mapping[str, int] = field(default_factory=dict)
    new_entries: int = 0
    dead: int = 0
    excused: str = ""
    bound: float | None = None
    beyond: float | None = None


@dataclass(frozen=True)
class AxisReport:
    """How one axis of the first architecture grows.

    Attributes:
        axis: its name.
        field: the config field to ask for; empty where none holds it.
        old, new: sizes in the growth that was measured.
        state: how that ended; "refused" where no size is granted.
        recipe: what keeps the function, derived from the plan.
        limit: which sizes are granted, tried one by one; or the refusal.
        moves: other config fields that the growth brings along.
    """

    axis: str
    field: str
    old: int
    new: int
    state: State
    recipe: str = ""
    limit: str = ""
    moves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Control:
    """A rule that was broken on purpose.

    Attributes:
        rule: what was broken.
        where: in which tensor, config field or pattern.
        caught: by each of the checks that had to notice.
        detail: what they said.
    """

    rule: str
    where: str
    caught: Mapping[str, bool]
    detail: str = ""


@dataclass(frozen=True)
class Decoding:
    """What a causal model gives where its code takes another path, before and after all axes grew together.

    Attributes:
        path: its name in `growformer.proof.decoding.CHECKS`.
        state: "absent" where the class has no such path.
        difference: relative, in true float64; None where there is none.
        detail: what had to be changed in both models to run it, or why it failed.
    """

    path: str
    state: Literal["exact", "fails", "absent"]
    difference: float | None = None
    detail: str = ""

    @classmethod
    def of(cls, path: str, difference: float | None, note: str) -> Decoding:
        """What was measured, held against the bar."""
        from growformer.proof.bar import BAR

        state: Literal["exact", "fails", "absent"] = (
            "exact" if difference is not None and difference <= BAR else "fails"
        )
        return cls(path, "absent" if difference is None else state, difference, note)


@dataclass(frozen=True)
class FamilyReport:
    """Everything that a check found.

    Attributes:
        family: its name.
        architectures: its classes.
        samples: which stock models were built without memory, and how many tensors their patterns cover.
        problems: of the literal: tensors, patterns, shapes or sizes that do not fit.
        gaps: the same under other switches of the config; growth refuses what they mean.
        undeclared: config fields of the class that no fact covers (a source may have them at their defaults only).
        permuted: for each group of axes, the relative difference after putting its channels in another order.
        fixed: for each axis that has an order, why.
        axes: by axis.
        growths: every growth that was made.
        controls: every rule that was broken.
        decoding: the first class beside its plain forward pass; empty where it is no causal language model.
        seconds: how long it all took.
    """

    family: str
    architectures: tuple[str, ...] = ()
    samples: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()
    undeclared: tuple[str, ...] = ()
    permuted: Mapping[str, float] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    axes: tuple[AxisReport, ...] = ()
    growths: tuple[Growth, ...] = ()
    controls: tuple[Control, ...] = ()
    decoding: tuple[Decoding, ...] = ()
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """What does not hold, one sentence each; empty where the family is as it says."""
        from growformer.proof.bar import BAR

        out = list(self.problems)
        for axes, difference in self.permuted.items():
            if not difference <= BAR:
                out.append(
                    f"another order of {axes} changes the function by {difference:.1e}: some pattern that names "
                    f"{axes} does not say where its channels are"
                )
        for growth in self.growths:
            if growth.state in ("fails", "not checked"):
                out.append(f"{growth.what} ({growth.architecture}, {growth.dtype}): {growth.detail}")
        for path in self.decoding:
            if path.state == "fails":
                measured = "" if path.difference is None else f"{path.difference:.1e}, allowed {BAR:.0e}"
                out.append(f"{path.path}, before and after growth: {'; '.join(filter(None, (measured, path.detail)))}")
        for control in self.controls:
            missed = [name for name, caught in control.caught.items() if not caught]
            if missed:
                out.append(f"control: {control.rule} ({control.where}) is not noticed by {', '.join(missed)}")
        if not any(growth.state in ("exact", "within eps") for growth in self.growths):
            out.append("no growth was proved")
        return out

    @property
    def ok(self) -> bool:
        """Nothing failed, and something was proved."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the verdict."""
        return {**asdict(self), "failures": self.failures, "ok": self.ok}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FamilyReport:
        """The inverse of `to_json`."""
        given = {name: value for name, value in data.items() if name in cls.__dataclass_fields__}
        given["axes"] = tuple(AxisReport(**{**a, "moves": tuple(a["moves"])}) for a in data["axes"])
        given["growths"] = tuple(Growth(**g) for g in data["growths"])
        given["controls"] = tuple(Control(**c) for c in data["controls"])
        given["decoding"] = tuple(Decoding(**d) for d in data["decoding"])
        for name in ("architectures", "problems", "gaps", "undeclared"):
            given[name] = tuple(data[name])
        return cls(**given)
