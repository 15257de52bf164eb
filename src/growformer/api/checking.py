"""check_family: is a family's literal right, and how does each of its axes grow?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from growformer.algebra import Family
from growformer.api.checks.controls import (
    CLOSED_RULE,
    WINDOW_RULE,
    Broken,
    broken_choices,
    broken_folders,
    longer_window,
    mislabelled,
)
from growformer.api.checks.cover import Cover, cover_family
from growformer.api.checks.optins import TITLE, opt_ins
from growformer.api.checks.order import Orders, difference_of, differences
from growformer.api.checks.recipes import recipe_of
from growformer.api.checks.requests import Asked, Planner
from growformer.api.checks.results import AxisReport, Control, Decoding, FamilyReport, Growth, State
from growformer.api.checks.samples import load_family, save_tiny, serving
from growformer.api.checks.verifying import Verifier, verifier
from growformer.api.folders import Grown, expand_checkpoint
from growformer.checkpoint.stock import full_config
from growformer.errors import GrowformerError, PatternError, RequestError
from growformer.planning.choices import Choices
from growformer.proof.bar import BAR

__all__ = ["DTYPES", "AxisReport", "Control", "Decoding", "FamilyReport", "Growth", "check_family", "load_family"]

DTYPES = ("float64", "float32", "bfloat16")
"""Storage dtypes of the sources that the combined request is tried on."""


def check_family(
    family: Family | str,
    *,
    axes: Sequence[str] | None = None,
    dtypes: Sequence[str] = DTYPES,
    say: Callable[[str], None] = lambda text: None,
    within: Verifier | None = None,
) -> FamilyReport:
    """Check a family's literal against its stock classes, and grow and prove every axis of tiny models.

    Every tensor must have one pattern of its shape, and every pattern a tensor; another order of channels must leave
    the function as it is; every axis alone, and all together, must grow and be proved by a fresh process; and rules
    that are broken on purpose must be noticed.

    Args:
        family: the family, its name, or the path of a FILE.py with one literal. Such a file is executed.
        axes: grow only these alone; None: all.
        dtypes: of the sources on which all axes are grown together.
        say: told what is being done.
        within: the process that verifies; None starts one.

    Raises:
        RequestError: no such family.
        SourceError: the file cannot be run.
    """
    declared = load_family(family) if isinstance(family, str) else family
    start = time.monotonic()
    with serving(declared), tempfile.TemporaryDirectory() as root, ExitStack() as opened:
        fresh = within if within is not None else opened.enter_context(verifier())
        check = _Check(declared, Path(root), fresh, say)
        check.cover()
        if check.sound:
            check.order()
            check.grow(axes, dtypes)
            check.finish()
            check.controls()
        return check.report(time.monotonic() - start)


@dataclass
class _Making:
    """A growth whose proof is on its way."""

    growth: Growth
    answer: Future[dict[str, Any]] | None = None
    grown: Grown | None = None

    def done(self) -> Growth:
        if self.answer is None:
            return self.growth
        found = self.answer.result()
        states = set(found["claims"].values())
        state: State = "fails" if False in states else "not checked" if None in states else self.growth.state
        return replace(
            self.growth,
            state=state,
            detail=found["detail"] if state in ("fails", "not checked") else "",
            algebra=found.get("algebra"),
            bound=found.get("bound"),
            beyond=found.get("beyond"),
            ratio=found.get("ratio"),
            new_entries=found.get("new_entries", 0),
            dead=found.get("dead", 0),
        )


@dataclass
class _Check:
    """One check in the making."""

    declared: Family
    root: Path
    fresh: Verifier
    say: Callable[[str], None]
    found: Cover = field(default_factory=Cover)
    permuted: dict[str, float] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    axes: list[AxisReport] = field(default_factory=list)
    makings: list[_Making] = field(default_factory=list)
    caught: list[Control] = field(default_factory=list)
    decoding: list[Decoding] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)
    _sources: dict[tuple[str, str, str], Path] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """There is a sample to go on with."""
        return self.declared.architectures[0] in self.found.samples

    @property
    def first(self) -> str:
        return self.declared.architectures[0]

    def cover(self) -> None:
        self.say("tensors and patterns")
        self.found = cover_family(self.declared)

    def source(self, architecture: str, dtype: str = "float64", variant: str = "") -> Path:
        key = architecture, dtype, variant
        if key not in self._sources:
            folder = self.root / f"source-{len(self._sources)}"
            self._sources[key] = save_tiny(
                self.declared, architecture, folder, dtype, self.found.changes.get(variant, {})
            )
        return self._sources[key]

    def planner(self, folder: Path) -> Planner:
        from growformer.checkpoint import read_config

        return Planner(self.declared.of(full_config(read_config(folder))[0]), folder)

    def order(self) -> None:
        self.say("order of channels")
        try:
            src = self.source(self.first)
            orders = Orders(self.planner(src).family, src)
            self.permuted, self.fixed = differences(orders), orders.fixed
        except (GrowformerError, RuntimeError, ValueError, KeyError) as error:
            self.found.problems.append(f"order of channels: {type(error).__name__}: {error}")

    def grow(self, only: Sequence[str] | None, dtypes: Sequence[str]) -> None:
        src = self.source(self.first)
        planner = self.planner(src)
        asked = planner.asked()
        for one in asked:
            if only is None or set(only) & set(one.axes):
                self._alone(planner, one)
        request = planner.together(asked)
        self.together = None
        for dtype in dtypes:
            making = self._make(self.first, "all together", request, dtype, full=True)
            if dtype == "float64":
                self.together = making
        for architecture in self.declared.architectures[1:]:
            self._combined(architecture, "")
        for variant in self.found.changes:
            self._combined(self.first, variant)
        if only is None:
            self._opt_ins()

    def _opt_ins(self) -> None:
        """Each recipe that must be chosen, at the first class that takes it."""
        seen: set[str] = set()
        for architecture in self.declared.architectures:
            try:
                planner = self.planner(self.source(architecture))
                found = [one for one in opt_ins(planner, planner.asked()) if one.what not in seen]
            except (GrowformerError, RuntimeError, ValueError, KeyError, TypeError):
                continue  # what a class cannot do was said when all its axes grew
            for one in found:
                seen.add(one.what)
                self._make(architecture, one.what, one.request, "float64", full=False, choices=one.choices)

    def _alone(self, planner: Planner, one: Asked) -> None:
        making = None
        if one.new != one.old:
            making = self._make(self.first, one.field, {one.field: one.new}, "float64", full=False)
        for axis in one.axes:
            if making is None or making.grown is None:
                text = one.limit if making is None else making.growth.detail
                self.axes.append(AxisReport(axis, one.field, one.old, one.old, "refused", "", text))
                continue
            self.axes.append(self._axis(planner, one, axis, making))
        # Axes without a field of their own, which this growth moves as well.
        if making is not None and making.grown is not None:
            named = {report.axis for report in self.axes} | {a for o in planner.asked_fields() for a in o}
            for axis, told in making.grown.plan.axes.items():
                if axis not in named and told["old"] != told["new"]:
                    self.axes.append(self._axis(planner, one, axis, making, follows=True))

    def _axis(self, planner: Planner, one: Asked, axis: str, making: _Making, follows: bool = False) -> AxisReport:
        assert making.grown is not None
        plan = making.grown.plan
        told = plan.axes[axis]
        full = planner.full, full_config(plan.target_config)[0]
        recipe = recipe_of(planner.family, plan, axis, full)
        limit = f"follows {one.field}" if follows else one.limit
        return AxisReport(
            axis, "" if follows else one.field, told["old"], told["new"], "exact", recipe, limit, one.moves
        )

    def _combined(self, architecture: str, variant: str) -> None:
        what = "all together" + (f", {variant}" if variant else "")
        try:
            planner = self.planner(self.source(architecture, variant=variant))
            request = planner.together(planner.asked())
        except GrowformerError as error:
            self.makings.append(_Making(Growth(what, architecture, "float64", {}, "refused", str(error))))
            return
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            said = f"{type(error).__name__}: {error}"
            self.makings.append(_Making(Growth(what, architecture, "float64", {}, "fails", said)))
            return
        self._make(architecture, what, request, "float64", full=False, alive=False, variant=variant)

    def _make(
        self,
        architecture: str,
        what: str,
        request: Mapping[str, int],
        dtype: str,
        *,
        full: bool,
        alive: bool = True,
        variant: str = "",
        choices: Choices | None = None,
    ) -> _Making:
        """Grow, and hand the two folders to the process that proves."""
        self.say(f"{what} ({architecture}, {dtype})")
        growth = Growth(what, architecture, dtype, dict(request), "refused")
        making = _Making(growth)
        self.makings.append(making)
        if not request:
            making.growth = Growth(
                what, architecture, dtype, {}, "fails", "no request for all axes together is granted"
            )
            return making
        try:
            src = self.source(architecture, dtype, variant)
            sizes: dict[str, Any] = {**request, **(choices or Choices()).to_json()}
            out = self.root / f"grown-{len(self.makings)}"
            making.grown = expand_checkpoint(
                src, out, prove_level="structure", allow_dead=True, threads=1, memory="64MiB", **sizes
            )
        except (RequestError, PatternError) as error:
            # Of a variant, tensors that no pattern covers: growth refuses what it does not know. A sample must fit.
            state: State = "fails" if isinstance(error, PatternError) and not variant else "refused"
            making.growth = Growth(what, architecture, dtype, dict(request), state, str(error))
            return making
        except Exception as error:  # any failure to grow is a finding
            said = f"{type(error).__name__}: {error}"
            making.growth = Growth(what, architecture, dtype, dict(request), "fails", said)
            return making
        plan = making.grown.plan
        making.growth = Growth(
            what,
            architecture,
            dtype,
            dict(request),
            "fails" if plan.function == "changed" else plan.function,
            fidelity=plan.fidelity,
            excused="; ".join(plan.dead),
        )
        making.answer = self.fresh.prove(self.declared, src, out, full=full, alive=alive)
        return making

    def finish(self) -> None:
        """Wait for the proofs; an axis is as its growth is."""
        self.say("proofs")
        self.growths = [making.done() for making in self.makings]
        states = {growth.what: growth.state for growth in self.growths}
        self.axes = [
            axis if axis.state == "refused" else replace(axis, state=states[_field_of(axis)]) for axis in self.axes
        ]

    def controls(self) -> None:
        self.say("controls")
        made = next((m for m in self.makings if m.grown is not None and m.growth.what == "all together"), None)
        waiting, decoding = [], None
        for chosen in self.makings:
            if chosen.grown is None or not chosen.growth.what.startswith(TITLE):
                continue
            src = self.source(chosen.growth.architecture)
            for broken in broken_choices(self.planner(src).family, chosen.grown.plan, chosen.grown.out, self.root):
                waiting.append((broken, self.fresh.judge(self.declared, src, broken.folder)))
        if made is not None and made.grown is not None and made.growth.dtype == "float64":
            src = self.source(self.first)
            plan, out = made.grown.plan, made.grown.out
            for broken in broken_folders(self.planner(src).family, plan, out, self.root):
                waiting.append((broken, self.fresh.judge(self.declared, src, broken.folder)))
            decoding = self._decoding(src, out, [broken for broken, _ in waiting if broken.rule == CLOSED_RULE])
        for what, literal, axes in mislabelled(self.declared):
            self.caught.append(self._mislabelled(what, literal, axes))
        for broken, answer in waiting:
            found = answer.result()
            self.caught.append(Control(broken.rule, broken.where, found["caught"], found["detail"]))
        if decoding is not None:
            self._decoded(*decoding)

    def _decoding(
        self, src: Path, out: Path, broken: list[Broken]
    ) -> tuple[Future[dict[str, Any]], list[Broken]] | None:
        """Hand a causal model, before and after growth and broken, to the process that proves."""
        from growformer.proof.decoding import decodes
        from growformer.proof.float64 import stock_config

        if not decodes(stock_config(src)):
            return None
        window = longer_window(out, self.root)
        broken = broken + ([window] if window is not None else [])
        return self.fresh.decode(self.declared, src, out, [one.folder for one in broken]), broken

    def _decoded(self, answer: Future[dict[str, Any]], broken: list[Broken]) -> None:
        from growformer.proof.decoding import SLIDING

        found = answer.result()
        self.decoding = [Decoding.of(path, difference, note) for path, (difference, note) in found["paths"].items()]
        if found["detail"]:
            self.decoding.append(Decoding("decoding", "fails", None, found["detail"]))
        for one, caught in zip(broken, found["broken"], strict=True):
            # The other paths may be shorter than the window.
            seen = caught if one.rule != WINDOW_RULE else {SLIDING: caught.get(SLIDING, False)}
            at = next((i for i, c in enumerate(self.caught) if (c.rule, c.where) == (one.rule, one.where)), None)
            if at is None:
                self.caught.append(Control(one.rule, one.where, seen))
            else:
                self.caught[at] = replace(self.caught[at], caught={**self.caught[at].caught, **seen})

    def _mislabelled(self, what: str, literal: Family, axes: set[str]) -> Control:
        rule, _, where = what.partition(": ")
        src = self.source(self.first)
        family = literal.of(self.planner(src).full)
        try:
            wrong = {group: d for group, d in difference_of(family, src, axes).items() if not d <= BAR}
            said = ", ".join(f"{group}: {d:.1e}" for group, d in wrong.items())
            return Control(rule, where, {"order": bool(wrong)}, said)
        except (GrowformerError, RuntimeError, ValueError) as error:
            # Shapes that no longer fit together are noticed too.
            return Control(rule, where, {"order": True}, f"{type(error).__name__}: {error}")

    def report(self, seconds: float) -> FamilyReport:
        return FamilyReport(
            self.declared.name,
            self.declared.architectures,
            self.found.samples,
            tuple(self.found.problems),
            tuple(self.found.gaps),
            self.found.undeclared,
            self.permuted,
            self.fixed,
            tuple(self.axes),
            tuple(self.growths),
            tuple(self.caught),
            tuple(self.decoding),
            round(seconds, 1),
        )


def _field_of(axis: AxisReport) -> str:
    return axis.field or axis.limit.removeprefix("follows ")
