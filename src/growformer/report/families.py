"""The support table: what each family's axes can do, from the results of the last sweep and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

COLUMNS = ("hidden", "mlp", "heads", "kv_heads", "key", "value", "experts", "layer", "vocab", "positions")
"""Axes that many families have, by the end of their names; what is left over is told by name."""

Report = Mapping[str, Any]


def load_results() -> dict[str, Any]:
    """What the last sweep found: `sources` (a hash of what it ran on), `versions`, and `families` by name.

    Empty where the package was built before any sweep.
    """
    path = files("growformer.families") / "results.json"
    if not path.is_file():
        return {"sources": "", "versions": {}, "families": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def dumps(results: Mapping[str, Any]) -> str:
    """Results as a file holds them: one line a family, so that a change shows as the line it is."""
    head = {name: value for name, value in results.items() if name != "families"}
    rows = [
        f"{json.dumps(name)}: {json.dumps(report, separators=(',', ':'), sort_keys=True)}"
        for name, report in results["families"].items()
    ]
    return json.dumps(head, sort_keys=True)[:-1] + ', "families": {\n' + ",\n".join(rows) + "\n}}\n"


def slim(report: Report) -> dict[str, Any]:
    """A check's report as results keep it: figures to two digits, no times, no texts of what went well."""
    out = {name: value for name, value in report.items() if name not in ("seconds", "samples", "permuted")}
    out["samples"] = len(report["samples"])
    out["permuted"] = {axes: _digits(value) for axes, value in report["permuted"].items()}
    out["growths"] = [
        {name: value for name, value in growth.items() if name != "request"}
        | {name: _digits(growth[name]) for name in ("algebra", "bound", "beyond", "ratio") if name in growth}
        | {"detail": growth["detail"][:400]}
        for growth in report["growths"]
    ]
    out["decoding"] = [path | {"difference": _digits(path["difference"])} for path in report["decoding"]]
    out["controls"] = [{name: control[name] for name in ("rule", "where", "caught")} for control in report["controls"]]
    return out


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.1e}")


def cell(axis: Mapping[str, Any]) -> str:
    """One axis in a word or two: the sizes that it takes, or why it has none."""
    if axis["state"] == "refused":
        return "no"
    said = str(axis["limit"])
    return said if axis["state"] == "exact" else f"{axis['state']}: {said}"


def matrix(reports: Mapping[str, Report]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The support table in short: families down, axes across.

    Returns:
        (headers, rows).
    """
    rows = []
    for name, report in reports.items():
        cells: dict[str, dict[str, None]] = {}
        for axis in report["axes"]:
            column = _column(axis["axis"])
            said = cell(axis)
            if column == "other":
                # A width of the family's own; those that follow another need no mention here.
                if said.startswith("follows"):
                    continue
                said = f"{axis['axis']}: {said}"
            cells.setdefault(column, {})[said] = None
        rows.append((name, *("; ".join(cells.get(column, {"-": None})) for column in (*COLUMNS, "other"))))
    return ("family", *COLUMNS, "other"), rows


def _column(axis: str) -> str:
    for name in COLUMNS:
        if axis == name:
            return name
    ends = {name: axis.endswith(f"_{name}") for name in ("hidden", "heads", "key", "value", "layer")}
    if axis in ("decoder_mlp", "text_mlp", "vision_mlp"):
        return "mlp"
    return next((name for name, ends_so in ends.items() if ends_so), "other")


def axis_rows(report: Report) -> list[tuple[str, ...]]:
    """For one family: axis, config field, how it is exact, which sizes, difference, fidelity of the tensors."""
    growths = {growth["what"]: growth for growth in report["growths"]}
    rows: list[tuple[str, ...]] = []
    for axis in report["axes"]:
        growth = growths.get(axis["field"]) or growths.get(str(axis["limit"]).removeprefix("follows ")) or {}
        counts = growth.get("fidelity", {})
        fidelity = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        error = growth.get("algebra")
        measured = "" if error is None or axis["state"] == "refused" else f"{error:.0e}"
        if measured and axis["state"] == "within eps":
            measured = f"{error:.1e}, bound {growth['bound']:.1e}"
        recipe = axis["recipe"] if axis["state"] == "exact" else axis["state"]
        recipe += f": {axis['recipe']}" if axis["state"] == "within eps" else ""
        sizes = f"{axis['old']} -> {axis['new']}" if axis["new"] != axis["old"] else ""
        rows.append((axis["axis"], axis["field"], recipe, axis["limit"], sizes, measured, fidelity))
    return rows


AXIS_HEADERS = ("axis", "config.json", "recipe", "sizes", "measured at", "difference", "tensors")


def growth_rows(report: Report) -> list[tuple[str, ...]]:
    """For one family: every growth of all axes together, and those whose recipe must be chosen."""
    return [
        (
            growth["what"],
            growth["architecture"],
            growth["dtype"],
            growth["state"] + (f": {growth['detail']}" if growth["detail"] else ""),
            _difference(growth),
            "" if growth["ratio"] is None else f"{growth['ratio']:.2f}",
        )
        for growth in report["growths"]
        if growth["what"].startswith(("all together", "opt-in: "))
    ]


def _difference(growth: Mapping[str, Any]) -> str:
    """The difference in float64; where eps explains one, what is beyond that."""
    error, beyond = growth["algebra"], growth.get("beyond")
    said = "" if error is None else f"{error:.0e}"
    return said if beyond is None else f"{said}; beyond eps {beyond:.0e}"


GROWTH_HEADERS = ("growth", "class", "source", "verdict", "difference", "noise floors")


def decoding_table(reports: Mapping[str, Report]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """What each causal family gives where its code takes another path than a plain forward pass.

    Returns:
        (headers, rows): the family, its class, and a column for every path; `none` where the class has no such path.
    """
    causal = {
        name: {p["path"]: p for p in report["decoding"]} for name, report in reports.items() if report["decoding"]
    }
    paths = tuple(dict.fromkeys(path for told in causal.values() for path in told))
    rows = [
        (name, reports[name]["architectures"][0], *(_path(told.get(path)) for path in paths))
        for name, told in causal.items()
    ]
    return ("family", "class", *paths), rows


def _path(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return ""
    if told["state"] == "absent":
        return "none"
    measured = "" if told["difference"] is None else f"{told['difference']:.0e}"
    said = " ".join(filter(None, (measured, f"({told['detail']})" if told["detail"] else "")))
    return said if told["state"] == "exact" else f"fails: {said}"


def markdown(results: Mapping[str, Any]) -> str:
    """docs/families.md."""
    reports = results["families"]
    growths = [growth for report in reports.values() for growth in report["growths"]]
    exact = sum(growth["state"] == "exact" for growth in growths)
    within = sum(growth["state"] == "within eps" for growth in growths)
    up_to_eps = f", {within} the same within eps, beside bounds measured on the source" if within else ""
    controls = sum(len(report["controls"]) for report in reports.values())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Families",
        "",
        "Generated by `make families` from `src/growformer/families/results.json`; no cell is written by hand.",
        "",
        f"{len(reports)} families, {len(growths)} growths of tiny random models made and verified from disk by another "
        f"process ({versions}): {exact} proved the same function{up_to_eps}. {controls} rules were broken on purpose. "
        "`growformer families check NAME` repeats it for one family, and for a FILE.py of your own.",
        "",
        "A cell says which sizes the axis takes; `no` means that growth refuses, with the reason. The limits are those "
        "of the stock class and of its config, found by asking for every size up to three times the source's.",
        "",
        *_table(*matrix(reports)),
        "",
        "## Decoding",
        "",
        "Causal language models take other paths than one plain forward pass: token by token with a key-value cache, "
        "batches padded on the left, sequences longer than a sliding window, positions given by the caller, with gaps. "
        "Each was run before and after all axes grew together, from a float64 source: the relative difference in true "
        "float64, of which 1e-12 is allowed. `none`: the class has no such path (its sample sees every earlier token, "
        "or its forward pass takes no `position_ids`). A closed entry that was filled on purpose, and a window one "
        "longer, were noticed on every path that they concern.",
        "",
        *_table(*decoding_table(reports)),
    ]
    for name, report in reports.items():
        lines += ["", f"## {name}", "", *_table(AXIS_HEADERS, axis_rows(report)), ""]
        lines += _table(GROWTH_HEADERS, growth_rows(report))
        if report["failures"]:
            lines += ["", "Does not hold yet:", "", *(f"- {_escaped(text)}" for text in report["failures"])]
    return "\n".join(lines) + "\n"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return lines + ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
