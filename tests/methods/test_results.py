"""The results that `growformer methods` shows are of the sources at hand, and a part of them is measured again."""

from pathlib import Path

import pytest

from growformer.api.checks.samples import save_tiny
from growformer.families import FAMILIES
from growformer.methods import METHODS
from growformer.report.methods import dumps, load_results, markdown, summary
from tests.methods import sweep

KEY = sweep.sources_hash()
NAMES = sorted(METHODS)
AGAIN = [NAMES[(int(KEY, 16) + i * 7) % len(NAMES)] for i in range(2)]
"""Two methods, others with every change of the sources."""


def test_the_results_are_of_these_sources() -> None:
    found = load_results()
    assert found["sources"] == KEY, "methods/results.json is of other sources: run `make methods` (test-all)"
    assert sweep.PAGE.read_text(encoding="utf-8") == markdown(found)
    assert {row["method"] for row in found["rows"]} == set(METHODS)


@pytest.mark.parametrize("method", AGAIN)
def test_a_method_measured_again(method: str, tmp_path: Path) -> None:
    rows = {(row["model"], row["axes"]): row for row in load_results()["rows"] if row["method"] == method}
    src = save_tiny(FAMILIES["llama"], "LlamaForCausalLM", tmp_path / "llama")
    for axes in ("mlp", "layer"):
        row = sweep.stock(method, "llama", axes, src, tmp_path)
        told = rows["llama", axes]
        assert [row.get(name) for name in ("state", "new", "dead", "copies", "approximate")] == [
            told.get(name) for name in ("state", "new", "dead", "copies", "approximate")
        ]


def test_a_changed_source_is_another_hash(tmp_path: Path) -> None:
    for part in sweep.PARTS:
        (tmp_path / part).mkdir()
        (tmp_path / part / "one.py").write_text("x = 1\n")
    key = sweep.sources_hash(tmp_path)
    (tmp_path / "methods" / "one.py").write_text("x = 2\n")
    assert sweep.sources_hash(tmp_path) != key


def test_every_exact_growth_is_within_the_bar_and_alive() -> None:
    from growformer.proof.bar import BAR

    rows = [row for row in load_results()["rows"] if row["state"] == "exact"]
    assert rows and all(row["difference"] <= BAR for row in rows)
    assert not [row for row in rows if row.get("dead")]
    assert all(row["moments"] <= 1e-10 for row in rows if "moments" in row)  # the bound that moments are held to
    assert len(summary(load_results())) == len(METHODS) and dumps(load_results())
