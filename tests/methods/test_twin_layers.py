"""New layers that are full of weights and add nothing: all their units stand in pairs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from growformer.api.checks.samples import save_tiny
from growformer.api.folders import expand_checkpoint
from growformer.api.planned import plan
from growformer.api.verified import verify
from growformer.errors import RequestError
from growformer.families import FAMILIES

DOWN, UP = "model.layers.3.mlp.down_proj.weight", "model.layers.3.mlp.up_proj.weight"
OUT, Q = "model.layers.3.self_attn.o_proj.weight", "model.layers.3.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("twins")
    src = save_tiny(FAMILIES["llama"], "LlamaForCausalLM", root / "llama")
    expand_checkpoint(src, root / "grown", method="twins", prove_level="full", num_hidden_layers=4)
    return src, root / "grown"


def test_no_weight_of_a_new_layer_is_zero(grown: tuple[Path, Path]) -> None:
    tensors = load_file(grown[1] / "model.safetensors")
    for name in (DOWN, UP, OUT, Q):
        assert bool((tensors[name] != 0).all()), name
    assert torch.equal(tensors[UP][:14], tensors[UP][14:])
    assert torch.equal(tensors[DOWN][:, :14], -tensors[DOWN][:, 14:])
    # Key/value heads 0 and 1 are a pair, and so are the two query heads of each.
    assert torch.equal(tensors[OUT][:, :20], -tensors[OUT][:, 20:])


BROKEN: dict[str, tuple[str, tuple[Any, ...]]] = {
    "a unit read with another weight than its partner": (DOWN, (3, 20)),
    "a unit written with another weight": (UP, (20, 3)),
    "a head read with another weight": (OUT, (3, 30)),
    "a head's query written with another weight": (Q, (30, 3)),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_pair_is_seen(rule: str, grown: tuple[Path, Path], tmp_path: Path) -> None:
    name, at = BROKEN[rule]
    for path in grown[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][at] += 0.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    proof = verify(grown[0], tmp_path, level="structure")
    claim = next(claim for claim in proof.claims if claim.name == "structure")
    assert not claim.passed and name in claim.detail and "partner" in claim.detail


def test_heads_with_slopes_have_no_pairs(tmp_path: Path) -> None:
    src = save_tiny(FAMILIES["mpt"], "MptForCausalLM", tmp_path / "mpt")
    with pytest.raises(RequestError, match=r"slopes.*layer=paper works"):
        plan(src, method="twins", n_layers=5)
