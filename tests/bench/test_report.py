"""The page on a benchmark: all of it in one file, each number with its result file, figures within their frames."""

import copy
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from growformer.bench.summary import summarize
from growformer.report.bench import COLUMNS, render, write_bench
from growformer.report.bench_drawing import (
    LOOKS,
    Row,
    Series,
    alone,
    costs,
    courses,
    forest,
    mark,
    stroke,
)
from growformer.report.bench_text import markdown
from tests.bench.test_summary import SAVED, made

SVG = "{http://www.w3.org/2000/svg}"


def written(folder: Path) -> Path:
    """Made-up results in a folder."""
    (folder / "results").mkdir(parents=True)
    for name, result in made().items():
        (folder / "results" / f"{name}.json").write_text(json.dumps(result))
    return folder


def test_the_page_needs_nothing_else_and_every_link_leads_to_a_result(tmp_path: Path) -> None:
    page, figures = write_bench(written(tmp_path / "out"), tmp_path / "pages" / "report.html")
    html = page.read_text()
    assert not re.findall(r'(?:src|url|@import|fetch)\s*[=(]\s*["\']?(?:http|//)', html) and "<link" not in html
    assert not re.findall(r"https?://(?!www\.w3\.org)", html)
    links = re.findall(r'href="([^"]+)"', html)
    assert len(links) >= len(made()) and all((page.parent / link).is_file() for link in links)
    assert {Path(link).stem for link in links} == set(made())
    for figure in figures:
        root = ET.parse(figure).getroot()
        assert root.tag == f"{SVG}svg" and root.find(f"{SVG}style") is not None


def test_the_numbers_are_those_of_the_summary() -> None:
    html, _ = render(made(), "results")
    assert "22.2% [22.2%, 22.2%]" in html and "30.0% [30.0%, 30.0%]" in html  # 1 - 0.7 / 0.9, and 0.3
    assert "3.5000 -&gt; 3.7500" in html and 'data-sort="0.25"' in html
    assert "pays above 0.50" in html and "small: bit for bit" in html and ">saves<" in html
    other = copy.deepcopy(made())
    other["nothing--lr0.01--seed0"]["bits_per_byte"]["weights"] = "x"
    assert "small: NOT bit for bit" in render(other, "results")[0]


def test_the_page_says_whether_growing_is_worth_it_at_all() -> None:
    def said(results: dict[str, dict[str, Any]]) -> str:
        return " ".join(render(results, "results")[0].split())

    assert "At this budget the final size is not worth having" in said(made())
    worse = made({**SAVED, "small": -0.2, "nothing": -0.2})
    assert "At this budget the final size is worth having" in said(worse)
    worse["small--lr0.01--seed1"]["bits_per_byte"]["test"] *= 0.9
    assert "Whether the final size is worth having at this budget is not settled by these seeds" in said(worse)
    alone = {name: result for name, result in made().items() if result["seed"] == 0}
    assert "Whether the final size is worth having at this budget is not settled by one seed" in said(alone)


def test_the_tables_in_markdown_have_every_arm_and_the_same_numbers() -> None:
    arms, growths = (table.splitlines() for table in markdown(summarize(made())).split("\n\n"))
    for table in (arms, growths):
        assert len({line.count(" | ") for line in table}) == 1
    names = [line.split(" | ")[0].removeprefix("| ") for line in arms[2:]]
    assert [name.split(" (")[0] for name in names] == [line.name for line in summarize(made()).lines]
    assert "nothing (as small, bit for bit)" in names and len(names) == len(SAVED)
    assert [line.split(" | ")[0].removeprefix("| ") for line in growths[2:]] == ["grown", "rank", "asked", "tokens"]
    assert (
        "| 30.0% [30.0%, 30.0%] * | 22.2% [22.2%, 22.2%] |" in growths[2]
        and growths[2].endswith("| saves |")
        and growths[2].startswith("| grown | 3.5000 -> 3.7500 |")
    )
    assert "| -10.0% [-10.0%, -10.0%] | - |" in growths[-1]  # no step 0 to take off


def test_arms_that_came_later_are_named() -> None:
    results = copy.deepcopy(made())
    assert "Added to the suite" not in render(results, "results")[0]
    first = results["scratch--lr0.003--seed0"]["suite"]
    results["scratch--lr0.003--seed0"]["suite"] = {**first, "arms": [a for a in first["arms"] if a["name"] != "rank"]}
    assert "Added to the suite after its first run, with the analysis as it was: rank." in render(results, "results")[0]


def test_results_that_are_not_all_there_are_shown_as_such() -> None:
    results = {name: r for name, r in made().items() if "seed0" in name and r["arm"] != "scratch-half"}
    html, figures = render(results, "results")
    assert "runs are still missing" in html and "savings" not in figures and "not measured" in html
    results["grown--lr0.01--seed0"] |= {"bits_per_byte": None}
    results["grown--lr0.003--seed0"] |= {"bits_per_byte": None}
    assert "diverged" in render(results, "results")[0]


def test_names_are_escaped() -> None:
    results = made()
    for result in results.values():
        result["suite"]["about"] = "<script>alert(1)</script>"
    assert "<script>alert" not in render(results, "results")[0]
    rows = [Row("<b>", "grown", 0.1, 0.0, 0.2)]
    assert "<b>" not in forest(rows, "<i>", "<u>", 760, "wide") and "&lt;b&gt;" in forest(rows, "t", "l", 760, "wide")


def within(figure: str) -> bool:
    """Whether everything drawn lies within the figure."""
    root = ET.fromstring(alone(figure))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    at = [(float(e.attrib[x]), width) for e in root.iter() for x in ("x1", "x2", "cx", "x") if x in e.attrib]
    at += [(float(e.attrib[y]), height) for e in root.iter() for y in ("y1", "y2", "cy", "y") if y in e.attrib]
    for path in root.iter(f"{SVG}path"):
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.attrib["d"])]
        at += [(n, width) for n in numbers[::2]] + [(n, height) for n in numbers[1::2]]
    return all(-0.01 <= value <= most + 0.01 for value, most in at)


@pytest.mark.parametrize(("kind", "width", "height"), [("wide", 760, 380), ("narrow", 360, 320)])
def test_figures_stay_within_their_frames(kind: str, width: int, height: int) -> None:
    kinds = list(LOOKS)
    lines = [
        Series(f"arm-{i}", kinds[i % 5], [(c * 1e11, 3 / (c + 1) + i / 9) for c in range(40)], [2e12])
        for i in range(17)
    ]
    assert within(courses(lines, "x", "l", width, height, kind))
    ends = [Series("a", "scratch", [(1e12, 2.0)]), Series("b", "still", [(2e12, 1.8), (4e12, 1.7)])]
    assert within(costs(ends, lambda c: 60 * c**-0.125, "x", "l", width, height, kind))
    assert within(costs(ends[:1], None, "x", "l", width, height, kind))
    rows = [
        Row("a", "grown", 0.1, -8.0, 0.9),
        Row("a-long-name-of-an-arm", "start", -0.2, None, None),
        Row("b", "grown", -3.0, -5, -1, [-4.9, -1.0]),
    ]
    for line, form in ((0.0, ".1%"), (-1.0, ".4f")):
        assert within(forest(rows, "x", "l", width, kind, line=line, form=form))
    assert not within(forest(rows, "x", "l", width, kind).replace('cx="', 'cx="9'))


def test_kinds_of_arms_are_told_apart_without_colour() -> None:
    assert len({look.light for look in LOOKS.values()}) == len({look.dark for look in LOOKS.values()}) == len(LOOKS)
    lines = {stroke(kind).replace(kind, "") for kind in LOOKS}
    marks = {mark(kind, 0, 0, 1).replace(kind, "") for kind in LOOKS}
    assert len(lines) == len(marks) == len(LOOKS)


def test_every_arm_of_one_cost_has_its_row_and_the_least_loss_is_first() -> None:
    _, figures = render(made(), "results")
    rows = re.findall(r'<g data-arm="([^"]+)"', figures["losses"])
    assert rows[0] == "grown" and rows[-1] == "tokens" and set(rows) == SAVED.keys() - {"scratch-half"}
    assert {line.name: line.kind for line in summarize(made()).lines} == {
        "scratch": "scratch", "scratch-half": "scratch", "small": "still", "grown": "grown", "grown-at-0": "start",
        "nothing": "control", "asked": "grown", "rank": "grown", "tokens": "grown",
    }  # fmt: skip
    assert re.findall(r'<g data-arm="([^"]+)"', figures["savings"]) == ["grown", "rank", "asked", "tokens"]
    alone = {name: r for name, r in made().items() if r["arm"] != "scratch"}
    assert "losses" not in render(alone, "results")[1]


DOM = """
const cell = s => ({dataset: {sort: s}, firstElementChild: null});
const rows = [["b", "2"], ["c", ""], ["a", "10"]].map(r => ({cells: r.map(cell), name: r[0]}));
const heads = [0, 1].map(() => { const h = {attrs: {}, firstElementChild: {addEventListener: (_, f) => h.click = f},
  setAttribute(k, v) { this.attrs[k] = v; }, removeAttribute(k) { delete this.attrs[k]; },
  getAttribute(k) { return this.attrs[k] ?? null; }}; return h; });
const body = {rows, append(row) { rows.splice(rows.indexOf(row), 1); rows.push(row); }};
const by = {value: 0, addEventListener: (_, f) => by.change = f};
const classes = on => ({on, toggle(name, to) { this.on = to; }});
const groups = ["a", "b"].map(arm => ({dataset: {arm}, classList: classes(false)}));
const lit = {addEventListener: (_, f) => lit.change = f};
const document = {body: {classList: classes(false)}, querySelectorAll: () => groups,
  getElementById: id => id === "by" ? by : id === "lit" ? lit : {tBodies: [body], tHead: {rows: [{cells: heads}]}}};
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the page's script with")
def test_the_table_sorts_numbers_as_numbers_and_gaps_last() -> None:
    html, _ = render(made(), "results")
    assert (
        len(re.findall(r"<option value=\"\d", html)) == len(COLUMNS) == len(re.findall(r'<button type="button">', html))
    )
    script = re.search(r"<script>(.*)</script>", html, re.S)
    assert script is not None
    say = "console.log(rows.map(r => r.name).join(''));"
    steps = f"heads[1].click();{say}heads[1].click();{say}by.change({{target: {{value: '0'}}}});{say}"
    found = subprocess.run(["node", "-e", DOM + script[1] + steps], capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["bac", "abc", "abc"], found.stderr
    say = "console.log([document.body, ...groups].map(e => +e.classList.on).join(''));"
    steps = "".join(f"lit.change({{target: {{value: '{arm}'}}}});{say}" for arm in ("b", ""))
    found = subprocess.run(["node", "-e", DOM + script[1] + steps], capture_output=True, text=True, timeout=60)
    assert found.stdout.split() == ["101", "000"], found.stderr
