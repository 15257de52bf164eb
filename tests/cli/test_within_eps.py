"""A growth that is exact only up to the eps of norms says so wherever it says anything."""

import json

import pytest

from growformer.api.checks.samples import save_tiny
from growformer.checkpoint import Receipt
from growformer.families import FAMILIES
from growformer.planning import Plan
from growformer.proof.bar import BAR

from .harness import Cli

DEEPER = ("num_hidden_layers=5", "--layers-at", "1,4")


@pytest.fixture
def bert(cli: Cli) -> Cli:
    """The command line, with a tiny BERT as its source."""
    save_tiny(FAMILIES["bert"], "BertForMaskedLM", cli.src, "float32", {"layer_norm_eps": 1e-5})
    return cli


def test_the_plan_says_it_with_the_formula_in_place_of_exact(bert: Cli) -> None:
    said = bert(*bert.of("plan", *DEEPER)).out
    assert "Within eps, not exact: num_hidden_layers 3 -> 5: the norm before new layers" in said
    assert "after the source's layers 0, 2" in said and "eps/2 x |1/v - 1/K^2|" in said and "eps = 1e-05" in said
    assert "Function: the same within eps, not exact." in said
    assert "| new, 1 " in said
    exact = bert(*bert.of("plan", "intermediate_size=40")).out
    assert "Function: the same (exact in real arithmetic)." in exact and "eps" not in exact.lower()
    told = json.loads(bert(*bert.of("plan", *DEEPER, "--json")).out)
    assert told["function"] == "within eps" and len(told["within_eps"]) == 1
    assert Plan.from_json(told).function == "within eps"


def test_expand_and_verify_say_it_and_hold(bert: Cli) -> None:
    said = bert(*bert.of("expand", *DEEPER))
    assert said.code == 0 and "WITHIN EPS, not exact: num_hidden_layers 3 -> 5" in said.out
    receipt, card = Receipt.read(bert.out), (bert.out / "README.md").read_text()
    (line,) = receipt.within_eps
    assert f"It computes the same function within eps, not exactly:\n\n- {line}\n" in card
    assert "| eps |" in card and "within eps: " in card
    proof = json.loads(bert("verify", bert.src, bert.out, "--json").out)
    assert proof["exit_code"] == 0
    claims = [claim["name"] for claim in proof["claims"]]
    # What eps does is measured and told before the grown model is run.
    assert claims == ["files", "structure", "loads", "eps", "algebra", "stored", "runtime", "alive"]
    found = proof["measured"]["algebra"]
    assert BAR < found["relative"] <= found["bound"] <= 10 * found["relative"] and found["beyond"] <= BAR


def test_expand_for_machines(bert: Cli) -> None:
    told = json.loads(bert(*bert.of("expand", *DEEPER, "--prove", "structure", "--json")).out)
    assert told["function"] == "within eps" and len(told["within_eps"]) == 1
    left = {claim["name"]: claim["passed"] for claim in told["claims"]}
    assert left["structure"] is True and left["eps"] is None


def test_where_eps_is_no_small_number_nothing_is_written(cli: Cli) -> None:
    save_tiny(FAMILIES["bert"], "BertForMaskedLM", cli.src, "float32", {"layer_norm_eps": 1e-2})
    said = cli(*cli.of("expand", "num_hidden_layers=4", "--layers-at", "0"))
    assert said.code == 1 and not cli.out.exists()
    assert "eps is no small number" in said.err and "place it elsewhere" in said.err
