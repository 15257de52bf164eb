"""`growformer families check` and the support table: what is printed, and the exit code."""

import json
from dataclasses import replace
from typing import Any

import pytest

from growformer.api import checking
from growformer.api.checking import AxisReport, Control, Decoding, FamilyReport, Growth
from growformer.report import families as report

from .harness import Cli

HOLDS = FamilyReport(
    family="llama",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    samples={"LlamaForCausalLM": 30},
    problems=(),
    gaps=(),
    undeclared=("mlp_bias",),
    permuted={"mlp": 1e-15},
    fixed={"layer": "depth has an order"},
    axes=(
        AxisReport("mlp", "intermediate_size", 28, 43, "exact", "free in, zero out", "any"),
        AxisReport("key", "head_dim", 10, 10, "refused", "", "head_dim=20: no | never"),
    ),
    growths=(
        Growth("intermediate_size", "LlamaForCausalLM", "float64", {"intermediate_size": 43}, "exact",
               algebra=1.23e-15, fidelity={"identical": 30, "rounded": 0}),
        Growth("all together", "LlamaForCausalLM", "bfloat16", {"head_dim": 20}, "exact", algebra=2e-15, ratio=0.8),
    ),
    controls=(Control("an eps stays as it was", "rms_norm_eps", {"structure": True, "outputs": True}),),
    decoding=(
        Decoding.of("key-value cache", 3e-15, ""),
        Decoding.of("sliding window", 4e-15, "sliding_window cut to 8"),
        Decoding.of("position_ids", None, ""),
    ),
    seconds=12.0,
)  # fmt: skip
BROKEN = {
    "a pattern": replace(HOLDS, problems=("no pattern covers it",)),
    "a layout": replace(HOLDS, permuted={"mlp": 0.3}),
    "an order that was not measured": replace(HOLDS, permuted={"mlp": float("nan")}),
    "a growth": replace(HOLDS, growths=(replace(HOLDS.growths[0], state="fails", detail="algebra: 1e-3"),)),
    "a proof": replace(HOLDS, growths=(replace(HOLDS.growths[0], state="not checked", detail="why"),)),
    "a control": replace(HOLDS, controls=(Control("a rule", "there", {"structure": True, "outputs": False}),)),
    "a cache": replace(HOLDS, decoding=(Decoding.of("key-value cache", 2e-12, ""),)),
    "a window that was not measured": replace(HOLDS, decoding=(Decoding.of("sliding window", float("nan"), ""),)),
    "no comparison": replace(HOLDS, decoding=(Decoding("decoding", "fails", None, "one path is of one model only"),)),
    "no proof": replace(HOLDS, growths=()),
}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[FamilyReport]:
    reports = [HOLDS]
    monkeypatch.setattr(checking, "check_family", lambda target, **options: reports[-1])
    return reports


def test_a_check_that_holds(cli: Cli, found: list[FamilyReport]) -> None:
    said = cli("families", "check", "llama")
    assert (said.code, said.err) == (0, "") and "FAILS" not in said.out
    for text in (
        "free in, zero out",
        "head_dim=20: no",
        "1e-15",
        "0.80",
        "depth has an order",
        "noticed",
        "mlp_bias",
        "3e-15",
        "4e-15 (sliding_window cut to 8)",
        "none",
    ):
        assert text in said.out
    assert FamilyReport.from_json(json.loads(cli("families", "check", "llama", "--json").out)) == HOLDS


@pytest.mark.parametrize("what", BROKEN)
def test_a_check_that_fails(what: str, cli: Cli, found: list[FamilyReport]) -> None:
    found.append(BROKEN[what])
    said = cli("families", "check", "llama")
    assert said.code == 1 and "FAILS" in said.out
    assert json.loads(cli("families", "check", "llama", "--json").out)["ok"] is False


def test_a_growth_within_eps_is_told_with_its_bound() -> None:
    within = replace(
        HOLDS,
        axes=(AxisReport("layer", "num_hidden_layers", 3, 5, "within eps", "the last norm's gain moves", "any"),),
        growths=(
            Growth(
                "num_hidden_layers", "BertModel", "float64", {}, "within eps", algebra=2e-6, bound=4e-6, beyond=1e-15
            ),
            Growth("all together", "BertModel", "float64", {}, "within eps", algebra=3e-6, bound=6e-6, beyond=2e-15),
        ),
    )
    told = within.to_json()
    assert within.ok and FamilyReport.from_json(told) == within
    assert report.cell(told["axes"][0]) == "within eps: any"
    (row,) = report.axis_rows(told)
    assert row[2] == "within eps: the last norm's gain moves" and row[5] == "2.0e-06, bound 4.0e-06"
    (together,) = report.growth_rows(told)
    assert together[3] == "within eps" and together[4] == "3e-06; beyond eps 2e-15"
    results = {"sources": "0", "versions": {}, "families": {"bert": report.slim(told)}}
    assert "0 proved the same function, 2 the same within eps" in report.markdown(results)
    assert results["families"]["bert"]["growths"][0]["bound"] == 4e-6


def test_what_is_asked_wrongly(cli: Cli) -> None:
    cli.source()
    cli.refused("families", "check", says="families check: which?")
    cli.refused("families", "llama", "gpt2", says="only `families check` takes a second word")
    cli.refused("families", "check", "nope", says="family 'nope' is unknown")
    cli.refused("families", "check", cli.root / "nope.py", says="there is no such file")


def test_the_page_is_made_of_results_alone(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {
        "sources": "0",
        "versions": {"torch": "2"},
        "families": {"llama": report.slim(HOLDS.to_json())},
    }
    assert json.loads(report.dumps(told)) == json.loads(json.dumps(told))
    monkeypatch.setattr(report, "load_results", lambda: told)
    page = cli("families", "--markdown").out
    assert page == report.markdown(told)
    headers, rows = report.matrix(told["families"])
    cells = dict(zip(headers, rows[0], strict=True))
    assert (cells["family"], cells["mlp"], cells["key"], cells["heads"]) == ("llama", "any", "no", "-")
    assert "| key | head_dim | refused | head_dim=20: no \\| never |" in page
    assert "| family | class | key-value cache | sliding window | position_ids |" in page
    assert "| llama | LlamaForCausalLM | 3e-15 | 4e-15 (sliding_window cut to 8) | none |" in page
    listed = json.loads(cli("families", "--json").out)[0]
    assert listed["sizes"] == {"intermediate_size": "any", "head_dim": "no"}
    assert "head_dim" not in next(line for line in cli("families").out.splitlines() if line.startswith("| llama"))
