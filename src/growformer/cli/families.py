"""`growformer families`: what is supported, one family's literal, and the check of a literal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from growformer.algebra import Family, Field, Layered, Ratio, Size, Times
from growformer.cli import show
from growformer.errors import RequestError
from growformer.families import BECOMING, FAMILIES
from growformer.planning.sizes import growable
from growformer.report import families as report

if TYPE_CHECKING:
    from growformer.api.checking import FamilyReport

CHECK = "check"
"""The word that asks for a check; no family may be called so."""


def run_families(name: str | None, target: str | None, markdown: bool, json: bool) -> None:
    """`growformer families [NAME | check NAME|FILE.py]`."""
    if name == CHECK:
        if target is None:
            raise RequestError("families check: which? A family's name, or the path of a FILE.py with one literal")
        run_check(target, json)
    elif target is not None:
        raise RequestError(f"families {name} {target}: only `families check` takes a second word")
    elif markdown:
        show.say(report.markdown(report.load_results()).rstrip("\n"))
    elif name is None:
        _list(json)
    else:
        _one(name, json)


def _list(json: bool) -> None:
    reports = report.load_results()["families"]
    limits = {
        name: {axis["field"]: report.cell(axis) for axis in found["axes"] if axis["field"]}
        for name, found in reports.items()
    }
    if json:
        rows = [(f.name, list(f.model_types), growable(f), limits.get(f.name, {})) for f in FAMILIES.values()]
        show.as_json([{"name": n, "model_types": t, "grows": g, "sizes": s} for n, t, g, s in rows])
        return
    cells = [(f.name, ", ".join(f.model_types), _grows(f, limits.get(f.name, {}))) for f in FAMILIES.values()]
    show.table(("family", "model_type", "grows by"), cells)
    if limits:
        show.say(
            "\nSizes in brackets where not every one is exact; `growformer families NAME` says how each axis grows."
        )


def _grows(family: Family, limits: dict[str, str]) -> str:
    told = ((name, limits.get(name, "any")) for name in growable(family))
    return ", ".join(name if said == "any" else f"{name} ({said})" for name, said in told if said != "no")


def _one(name: str, json: bool) -> None:
    if name not in FAMILIES:
        raise RequestError(f"family {name!r} is unknown; there are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    becomes = [target for source, target in BECOMING if source == name]
    if json:
        axes = {axis: _size_text(size) for axis, size in family.axes.items()}
        show.as_json({"name": family.name, "axes": axes, "tensors": dict(family.tensors), "becomes": becomes})
        return
    found = report.load_results()["families"].get(name)
    how = {axis["axis"]: axis for axis in found["axes"]} if found is not None else {}
    rows = []
    for axis, size in family.axes.items():
        told = how.get(axis, {"recipe": "", "limit": ""})
        rows.append((axis, _size_text(size), told["recipe"] or "-", told["limit"] or "-"))
    show.table(("axis", "config.json", "recipe", "sizes"), rows)
    rows2 = [(n, p, family.optional.get(n, "")) for n, p in family.tensors.items()]
    show.table(("tensor", "pattern", "where config.json says"), rows2, title=f"{family.name}: tensors")
    for target in becomes:
        experts, count = FAMILIES[target].experts, FAMILIES[target].axes["experts"]
        chosen = experts.chosen if experts is not None else ""
        show.say(f"\nBecomes a mixture of experts: model_type={target} {_size_name(count)}=8 {chosen}=2")


def _size_name(size: Size) -> str:
    return size.name if isinstance(size, Field) else ""


def _size_text(size: Size) -> str:
    if isinstance(size, Ratio):
        return f"{size.over} / {size.by}"
    if isinstance(size, Times):
        return f"{size.times} {size.field}"
    if isinstance(size, Layered):
        return f"{size.field} of {size.type} layers"
    return size.name if size.default is None else f"{size.name} (default {_size_text(size.default)})"


def run_check(target: str, json: bool) -> None:
    """`growformer families check NAME|FILE.py`: a FILE.py is executed, for it is the user's own program."""
    from growformer.api.checking import check_family

    with show.progress(json) as tell:
        found = check_family(target, say=lambda what: tell(what, 0, 0))
    if json:
        show.as_json(found.to_json())
    else:
        print_check(found)
    if not found.ok:
        raise typer.Exit(1)


def print_check(found: FamilyReport) -> None:
    """The report for people: axes, growths, controls, and what does not hold."""
    told = found.to_json()
    show.table(report.AXIS_HEADERS, report.axis_rows(told), title=f"{found.family}: each axis alone")
    show.table(report.GROWTH_HEADERS, report.growth_rows(told), title="All together:")
    if found.decoding:
        show.table(*report.decoding_table({found.family: told}), title="Decoding, before and after growth:")
    if found.permuted:
        rows = [(axes, f"{difference:.0e}") for axes, difference in found.permuted.items()]
        rows += [(axis, f"not tried: {why}") for axis, why in found.fixed.items()]
        show.table(("another order of", "difference"), rows, title="Layout:")
    if found.controls:
        rows2 = [
            (c.rule, c.where, ", ".join(f"{n}: {'noticed' if s else 'MISSED'}" for n, s in c.caught.items()))
            for c in found.controls
        ]
        show.table(("broken on purpose", "where", "by"), rows2, title="Controls:")
    if found.undeclared:
        show.say(f"\nno fact covers, so refused unless at the default: {', '.join(found.undeclared)}")
    for text in found.gaps:
        show.say(f"refused: {text}")
    for text in found.failures:
        show.say(f"FAILS: {text}")
    verdict = "holds" if found.ok else f"{len(found.failures)} failures"
    show.say(f"\n{found.family}: {len(found.samples)} stock models covered, {verdict}. {found.seconds:.0f} seconds.")


__all__ = ["run_check", "run_families"]
