"""The results that are committed: whole, of the suite that is committed, and shown as they are."""

from pathlib import Path

import pytest

from growformer.bench.results import read_results, suite_hash
from growformer.bench.suite import read_suite
from growformer.bench.summary import summarize
from growformer.report.bench import render
from growformer.report.bench_text import markdown
from tests.bench.bench_kit import SMOKE

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent for path in (ROOT / "results").glob("*/results"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_results_are_of_the_suite_and_its_pages_of_them(folder: Path) -> None:
    found = read_results(folder)
    summary = summarize(found)
    suite = read_suite(SMOKE.with_name(f"{folder.name}.yaml"))[0]
    assert summary.suite["hash"] == suite_hash(suite)
    assert {arm["name"] for arm in summary.suite["arms"]} == {arm.name for arm in suite.arms}
    assert read_suite(folder / "suite.yaml")[0] == suite
    say = f"run growformer report results/{folder.name}"
    assert (folder / "report.html").read_text(encoding="utf-8") == render(found, "results")[0], say
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert markdown(summary) in page, f"{say} --markdown, and put it into docs/results.md"


def test_there_are_some() -> None:
    curves = {path.name: set(summarize(read_results(path)).curves) for path in FOLDERS}
    assert curves == {"medium": set(), "small": {0, 1, 2}}
