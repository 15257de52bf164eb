"""Parameter tokens grow without changing the function, as long as τ stays; and what breaks that is noticed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import growformer as gf
from growformer.algebra.factor import ONE, Factor
from growformer.api.planned import on_disk
from growformer.checkpoint import RECEIPT, sha256
from growformer.errors import RequestError
from growformer.models.tokenformer import TokenFormerForCausalLM
from growformer.proof.axes import Axis
from growformer.proof.bar import BAR
from growformer.proof.float64 import build64_from, true_float64
from growformer.proof.norms import Norms
from tests.tokenformer.kit import FAMILY, loaded, relative, tokens

GROUPS = {"qkv_tokens": 31, "proj_tokens": 45, "ffn_tokens": 29}
INSIDE = {
    "qkv_tokens": [f"self_attn.{one}_proj" for one in "qkv"],
    "proj_tokens": ["self_attn.o_proj"],
    "ffn_tokens": ["mlp"],
}
EVERYTHING = {
    **GROUPS,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "num_hidden_layers": 5,
    "vocab_size": 41,
}


def logits64(of: Any, **config: Any) -> Tensor:
    """Logits of a model's weights in true float64, under its config with some fields replaced."""
    told = {**of.config.to_dict(), "architectures": [type(of).__name__], **config}
    rebuilt = build64_from(told, {name: x.detach() for name, x in on_disk(of).items()})
    with true_float64():
        logits: Tensor = rebuilt(input_ids=tokens()).logits.detach()
    return logits


def double(folder: Path) -> Any:
    return loaded(folder).double()


@pytest.mark.parametrize("asked", [*({name: size} for name, size in GROUPS.items()), GROUPS, EVERYTHING])
def test_growth_is_exact(folder: Path, asked: dict[str, int]) -> None:
    source = double(folder)
    grown = gf.expand(source, **asked)
    before, after = logits64(source), logits64(grown)
    assert relative(before, after[..., : before.shape[-1]]) <= BAR
    assert {name: getattr(grown.config, name) for name in asked} == asked


@pytest.mark.parametrize("name", GROUPS)
def test_new_keys_are_zero_and_values_free(folder: Path, name: str) -> None:
    source = double(folder)
    old = getattr(source.config, name)
    grown = gf.expand(source, **{name: GROUPS[name]})
    was, now = source.state_dict(), grown.state_dict()
    touched = set()
    for layer in range(3):
        for inside in INSIDE[name]:
            keys, values = (f"model.layers.{layer}.{inside}.{side}" for side in ("keys", "values"))
            touched |= {keys, values}
            assert len(now[keys]) == len(now[values]) == GROUPS[name]
            assert torch.equal(now[keys][:old], was[keys]) and torch.equal(now[values][:old], was[values])
            assert not now[keys][old:].any() and bool(now[values][old:].all())
    assert all(torch.equal(now[one], was[one]) for one in was if one not in touched)


@pytest.mark.parametrize("name", GROUPS)
def test_a_tau_that_follows_the_number_of_tokens_changes_the_function(folder: Path, name: str) -> None:
    """The control: τ = sqrt(n) worked out anew from the grown n, with the very same tensors."""
    source = double(folder)
    grown = gf.expand(source, **{name: GROUPS[name]})
    tau = name.replace("tokens", "tau")
    assert getattr(grown.config, tau) == getattr(source.config, tau) == math.sqrt(getattr(source.config, name))
    changed = relative(logits64(source), logits64(grown, **{tau: math.sqrt(GROUPS[name])}))
    assert changed > 1e-3


def test_keys_that_are_not_zero_change_the_function(folder: Path) -> None:
    source = double(folder)
    grown = gf.expand(source, ffn_tokens=29)
    with torch.no_grad():
        grown.model.layers[0].mlp.keys[28, 3] = 0.5
    assert relative(logits64(source), logits64(grown)) > BAR


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with more tokens of each group."""
    out = tmp_path_factory.mktemp("grown") / "out"
    gf.expand_checkpoint(folder, out, **GROUPS)
    return out


def test_the_proof_holds(folder: Path, out: Path) -> None:
    proof = gf.verify(folder, out)
    claims = {claim.name: claim for claim in proof.claims}
    assert all(claim.passed for claim in claims.values()) and {"structure", "algebra", "alive"} <= set(claims)
    # 3 layers: 11 tokens in each of q, k and v, 27 in the output's, 1 in the feed-forward part; keys and values.
    new = 3 * (11 * (3 * 24 + 40 + 20 + 20) + 27 * (40 + 24) + 1 * (24 + 24))
    assert claims["alive"].found.startswith(f"{new:,} of {new:,} new entries within two passes")
    assert "import growformer.models.tokenformer" in (out / "README.md").read_text()


def tampered(out: Path, folder: Path, **fields: Any) -> Path:
    """A copy whose config.json has other fields (None takes one out), with a receipt that has its hash."""
    folder.mkdir()
    for path in out.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = {**json.loads((out / "config.json").read_text()), **fields}
    config = {name: value for name, value in config.items() if value is not None or name not in fields}
    (folder / "config.json").write_text(json.dumps(config))
    receipt = json.loads((folder / RECEIPT).read_text())
    receipt["target"]["files"]["config.json"] = sha256(folder / "config.json")
    (folder / RECEIPT).write_text(json.dumps(receipt))
    return folder


@pytest.mark.parametrize("value", [math.sqrt(45), None])
def test_the_proof_notices_another_tau(folder: Path, out: Path, tmp_path: Path, value: float | None) -> None:
    """Stated wrongly, or not stated, so that the config class would fill it in from the grown size."""
    proof = gf.verify(folder, tampered(out, tmp_path / "other", proj_tau=value))
    claims = {claim.name: claim for claim in proof.claims}
    assert not claims["structure"].passed and "config field proj_tau: found" in claims["structure"].detail
    assert not claims["algebra"].passed


def test_a_tau_that_nobody_stated_is_stated(folder: Path, tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for path in folder.iterdir():
        (src / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.endswith("_tau")}))
    gf.expand_checkpoint(src, tmp_path / "out", ffn_tokens=40)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["ffn_tau"] == math.sqrt(28) and "qkv_tau" not in told


def test_no_copies_and_no_scales_pass_a_gelu() -> None:
    """The certificate's own rule, for a receipt that claims another lift of the tokens."""
    axes = {name: Axis.identity(name, 4) for name in FAMILY.axes}
    assert Norms(FAMILY, axes, tied=False).problems == []
    twice, same = torch.arange(4).repeat(2), torch.zeros(8, dtype=torch.int64)
    copied = Axis("ffn_tokens", 4, 8, twice, (ONE,), same, (ONE,) * 8, ONE, "writers")
    scaled = replace(axes["ffn_tokens"], scale=Factor.of(2))
    for axis in (copied, scaled):
        found = Norms(FAMILY, {**axes, "ffn_tokens": axis}, tied=False).problems
        assert any("gives to what is not linear" in text for text in found)


def test_it_grows_with_its_optimizer(folder: Path) -> None:
    """Between two steps, in place: what both training runs computed before is the same, and new tokens learn."""
    model = loaded(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> float:
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    step()
    before = logits64(model)
    gf.grow(model, optimizer, **GROUPS)
    assert isinstance(model, TokenFormerForCausalLM) and relative(before, logits64(model)) <= BAR
    losses = [step() for _ in range(4)]
    assert losses[-1] < losses[0]
    keys, values = model.model.layers[1].mlp.keys, model.model.layers[1].mlp.values
    assert bool(keys[28:].all())
    state = optimizer.state[values]
    assert state["exp_avg"].shape == values.shape and bool(state["exp_avg"][28:].any())


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"ffn_tokens": 20}, "ffn_tokens"),
        ({"intermediate_size": 40}, "intermediate_size"),
        ({"ffn_tau": 6}, "ffn_tau"),
        ({"num_hidden_layers": 5, "method": "twins"}, "what it reads has no pairs; layer=paper works"),
        ({"hidden_size": 20}, "hidden_size"),
    ],
)
def test_what_is_refused(folder: Path, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        gf.plan(folder, **asked)
    assert says in str(caught.value)
