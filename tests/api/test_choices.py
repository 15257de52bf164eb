"""Chosen recipes from folder to folder and in memory: proved, recorded, refused where they leave something dead."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from growformer import api
from growformer.api.checks.samples import save_tiny
from growformer.api.checks.verifying import prove_folder
from growformer.checkpoint import Receipt
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.proof.bar import BAR
from growformer.proof.difference import compare_outputs
from growformer.proof.float64 import build64_from
from growformer.proof.functional import functional
from growformer.proof.inputs import probe_inputs
from growformer.proof.outputs import closed_tokens, grown_axes
from tests.tiny import build

CASES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "strided": ("llama", {"head_dim": 20}, {"rope": "strided"}),
    "longrope": ("cohere", {"head_dim": 14, "hidden_size": 36}, {"rope": "longrope"}),
    "proportional": ("qwen2", {"head_dim": 14}, {"rope": "proportional"}),
    "experts": ("gpt_oss", {"num_local_experts": 7, "head_dim": 14, "num_hidden_layers": 5}, {"allow_dead": True}),
    "tokens": ("phi", {"vocab_size": 41, "hidden_size": 48}, {"new_tokens": "closed", "allow_dead": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_chosen_growth_is_proved_and_recorded(case: str, tmp_path: Path) -> None:
    name, request, choices = CASES[case]
    family = FAMILIES[name]
    src, out = save_tiny(family, family.architectures[0], tmp_path / "src"), tmp_path / "out"
    api.expand_checkpoint(src, out, prove_level="structure", **choices, **request)
    found = prove_folder(family, str(src), str(out), full=False, alive=True)
    assert found["claims"] == dict.fromkeys(("files", "structure", "algebra", "alive"), True), found["detail"]
    assert found["algebra"] <= BAR and found["new_entries"] > 0
    # What the plan names dead is all that is: the rest of the growth learns beside it.
    assert (found["dead"] > 0) == (case == "experts")
    receipt = Receipt.read(out)
    said = {name: word for name, word in choices.items() if name != "allow_dead"}
    assert receipt.request == {**request, **said} and bool(receipt.dead) == ("allow_dead" in choices)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_claim_holds(case: str, tmp_path: Path) -> None:
    name, request, choices = CASES[case]
    family = FAMILIES[name]
    src = save_tiny(family, family.architectures[0], tmp_path / "src", "bfloat16")
    grown = api.expand_checkpoint(src, tmp_path / "out", prove_level="full", **choices, **request)
    claims = {claim.name: claim.passed for claim in grown.proof.claims}
    assert claims == dict.fromkeys(("structure", "loads", "algebra", "stored", "runtime", "alive"), True)


@pytest.mark.parametrize("case", ["experts", "tokens"])
def test_what_would_be_dead_is_refused_by_default(case: str, tmp_path: Path) -> None:
    name, request, choices = CASES[case]
    family = FAMILIES[name]
    src = save_tiny(family, family.architectures[0], tmp_path / "src", "float32")
    with pytest.raises(RequestError, match=r"bias of -1e\+30.*--allow-dead"):
        api.expand_checkpoint(src, tmp_path / "out", **{**choices, "allow_dead": False}, **request)
    assert not (tmp_path / "out").exists()


def test_in_memory() -> None:
    model = build("llama")
    big = api.expand(model, head_dim=20, rope="strided")
    assert big.config.head_dim == 20 and big.config.rope_parameters == model.config.rope_parameters
    assert api.verify(model, big, level="structure").exit_code == 0
    theta = api.expand(model, head_dim=20)
    names = [name for name, x in big.state_dict().items() if not torch.equal(x, theta.state_dict()[name])]
    assert names and all("q_proj" in name or "k_proj" in name for name in names)


def test_closed_tokens_are_compared_by_their_probability(tmp_path: Path) -> None:
    """Logits alone cannot tell open tokens from closed ones: the old ones are the same."""
    phi = FAMILIES["phi"]
    src = save_tiny(phi, phi.architectures[0], tmp_path / "src")
    inputs = probe_inputs(src, 3, 12, 0).batches
    asked: Mapping[str, Mapping[str, Any]] = {"open": {}, "closed": {"new_tokens": "closed"}}
    for word, choice in asked.items():
        plan = api.plan(src, vocab_size=41, **choice)
        assert closed_tokens(plan.axes) == (word == "closed")
        grown = api.expand_checkpoint(
            src, tmp_path / word, vocab_size=41, allow_dead=True, prove_level="structure", **choice
        )
        reads = grown_axes(grown.plan.axes)
        assert functional(src, tmp_path / word, inputs, reads).relative <= BAR
        assert (functional(src, tmp_path / word, inputs, reads, closed=True).relative <= BAR) == (word == "closed")


def test_a_logit_just_low_enough_is_closed_and_one_above_is_not() -> None:
    a = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    for level, closed in ((-1e30, True), (-800.0, True), (-700.0, False)):
        b = torch.cat([a, torch.full((2, 1), level, dtype=torch.float64)], 1)
        assert compare_outputs({"logits": a}, {"logits": b})["logits"].relative == 0
        assert (compare_outputs({"logits": a}, {"logits": b}, closed=True)["logits"].relative == 0) == closed


def test_a_growth_beside_a_barred_bias_steps_by_typical_weights() -> None:
    """A step as large as the root mean square with -1e30 in it would end every gradient of the second pass."""
    from growformer.proof.alive import dead_entries

    config = build("llama").config.to_dict()
    tensors = {name: x.double() for name, x in build("llama").state_dict().items()}
    model = build64_from(config, tensors)
    mask = {name: torch.ones(x.shape, dtype=torch.bool) for name, x in model.named_parameters() if "mlp" in name}
    tokens = torch.arange(1, 31).reshape(2, 15) % 37
    assert set(dead_entries(model, mask, tokens).values()) == {0}
    model.model.norm.register_parameter("odds", torch.nn.Parameter(torch.tensor([-1e30], dtype=torch.float64)))
    for name, x in model.named_parameters():
        if name.endswith("down_proj.weight"):
            x.data.zero_()  # gate and up get their gradients in the second pass, through what the first has moved
    assert set(dead_entries(model, mask, tokens).values()) == {0}
