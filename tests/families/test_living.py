"""Every new entry learns, after a chain of growths too; what cannot is named by the plan and refused by default."""

from pathlib import Path

import pytest
import torch

from growformer import api
from growformer.errors import RequestError
from growformer.optim.dual import grow_moments
from growformer.planning import Plan
from growformer.proof.alive import covering_tokens, dead_entries, parameter_masks
from growformer.proof.float64 import build64
from growformer.proof.prove import new_entries
from tests.tiny import save

CHAINS: dict[str, list[dict[str, int]]] = {
    "llama": [{"num_hidden_layers": 4}, {"head_dim": 14, "hidden_size": 36}, {"num_attention_heads": 6}],
    "llama-tied-bias": [{"hidden_size": 36}, {"intermediate_size": 41, "num_hidden_layers": 4}, {"head_dim": 12}],
    "qwen3-tied": [{"head_dim": 20}, {"hidden_size": 35, "num_attention_heads": 6}, {"num_hidden_layers": 5}],
    "gpt2": [{"n_inner": 101}, {"n_layer": 4, "n_embd": 36}, {"n_head": 6}],
}


def _after(plan: Plan, new: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The entries that are new after `plan`, given those that were new before it."""
    masks = new_entries(plan)
    carried = {} if new is None else grow_moments(plan, {name: x.double() for name, x in new.items()}, 0)
    return {name: mask | (carried[name] != 0) if name in carried else mask for name, mask in masks.items()}


@pytest.mark.parametrize("kind", CHAINS)
def test_a_chain_is_alive_within_three_passes(kind: str, tmp_path: Path) -> None:
    folder, new, plans = save(tmp_path / "0", kind), None, []
    for i, request in enumerate(CHAINS[kind]):
        out = tmp_path / str(i + 1)
        grown = api.expand_checkpoint(folder, out, prove_level="structure", **request)
        folder, new = out, _after(grown.plan, new)
        plans.append(grown.plan)
    assert new is not None
    # GPT-2's key biases have no gradient in any model (softmax sees no constant): they are no part of the claim.
    for name, mask in new.items():
        if name.endswith("c_attn.bias"):
            mask.view(3, -1)[1] = False
    config = dict(plans[-1].target_config)
    masks = parameter_masks(config, new)
    tokens = covering_tokens(37, 32, 0)
    assert sum(dead_entries(build64(folder), masks, tokens, passes=3).values()) == 0
    # The control: one pass is not enough, for a closed side has to open first.
    assert sum(dead_entries(build64(folder), masks, tokens, passes=1).values()) > 0


def test_the_row_of_a_padding_token_learns_in_no_model(tmp_path: Path) -> None:
    src = save(tmp_path / "src", "llama", pad_token_id=36)
    proof = api.expand_checkpoint(src, tmp_path / "out", hidden_size=36, prove_level="full").proof
    assert proof.exit_code == 0
    assert proof.measured["alive"]["tokens"] == 36
    assert proof.measured["alive"]["dead"] == {}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied"])
def test_head_dim_below_twice_is_exact_and_dead_and_needs_to_be_allowed(kind: str, tmp_path: Path) -> None:
    src = save(tmp_path / "src", kind)
    assert "head_dim=20 is alive" in api.plan(src, head_dim=14).dead[0]
    assert api.plan(src, head_dim=20).dead == ()
    with pytest.raises(RequestError, match=r"no gradient; head_dim=20 is alive; --allow-dead"):
        api.expand_checkpoint(src, tmp_path / "out", head_dim=14)
    assert not (tmp_path / "out").exists()
    proof = api.expand_checkpoint(src, tmp_path / "out", head_dim=14, allow_dead=True, prove_level="full").proof
    claims = {claim.name: claim for claim in proof.claims}
    assert proof.exit_code == 0
    assert claims["alive"].allowed == "all but those the plan names dead (key)"
    dead = proof.measured["alive"]["dead"]
    # All of them, and nothing else: query and key rows and both gains; values learn.
    assert {name.split("self_attn.")[1].split(".")[0] for name in dead} == {"q_proj", "k_proj", "q_norm", "k_norm"}
