"""The results that `growformer methods` shows are of the sources at hand, and a part of them is measured again."""

from pathlib import Path

import pytest

from growformer.api.checks.samples import save_tiny
from growformer.families import FAMILIES
from growformer.methods import METHODS
from growformer.optim.carry import Carry
from growformer.proof.bar import BAR
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
    for name in sweep.ASKING:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    key = sweep.sources_hash(tmp_path)
    (tmp_path / "methods" / "one.py").write_text("x = 2\n")
    again = sweep.sources_hash(tmp_path)
    (tmp_path / sweep.ASKING[0]).write_text("x = 2\n")
    assert len({key, again, sweep.sources_hash(tmp_path)}) == 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(FAMILIES["llama"], "LlamaForCausalLM", tmp_path_factory.mktemp("asking") / "llama")


def test_gradmax_is_measured_on_a_loss_that_the_sweep_gives(llama: Path, tmp_path: Path) -> None:
    row = sweep.stock("gradmax", "llama", "mlp", llama, tmp_path)
    assert row["state"] == "exact" and row["difference"] <= BAR and row["new"] > 0 and not row["dead"]
    assert row["moments"] <= 1e-10 and row["approximate"] == 0
    assert row["asked"] == {"passes": 1, "tokens": sweep.tokens().numel()}


def test_moments_that_go_wrong_are_found(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Carry.moment
    monkeypatch.setattr(Carry, "moment", lambda *args: 1.5 * right(*args))
    assert sweep.live_moments("gradmax", llama, sweep.REQUESTS["llama"]["mlp"])["moments"] > 0.1


def test_ligo_is_measured_and_says_how_often_it_asked(llama: Path, tmp_path: Path) -> None:
    row = sweep.stock("ligo", "llama", "mlp", llama, tmp_path)
    assert row["state"] == "changed" and row["relative"] > 1e-6
    assert row["asked"] == {"passes": 100, "tokens": 100 * sweep.tokens().numel()}
    page = markdown({"versions": {}, "rows": [row]})
    assert "; 100 passes of 32 tokens first" in page and "ligo 100 times a growth" in page


@pytest.mark.parametrize(
    ("method", "axes"), [("gradmax", "mlp"), ("ligo", "mlp"), ("ligo", "hidden"), ("ligo", "layer")]
)
def test_what_is_not_measured_says_why(method: str, axes: str) -> None:
    row = sweep.reference(method, axes)
    assert row["state"] == "refused"
    assert "passes through a stock model's modules; the reference Transformer grows as tensors" in row["why"]
    assert f"- reference, {axes}, {method}: {row['why']}" in markdown({"versions": {}, "rows": [row]})


def test_every_method_is_measured() -> None:
    assert not [row[0] for row in summary(load_results()) if row[2] == "not measured"]


def test_every_exact_growth_is_within_the_bar_and_alive() -> None:
    rows = [row for row in load_results()["rows"] if row["state"] == "exact"]
    assert rows and all(row["difference"] <= BAR for row in rows)
    assert not [row for row in rows if row.get("dead")]
    assert all(row["moments"] <= 1e-10 for row in rows if "moments" in row)  # the bound that moments are held to
    assert len(summary(load_results())) == len(METHODS) and dumps(load_results())
