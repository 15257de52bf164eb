"""Folders as they are found: bare backbones, prefixes left out, configs that name no architecture."""

import json
from pathlib import Path

import pytest

from growformer import api
from tests.tiny import build, save

LLAMA = {"hidden_size": 36, "head_dim": 14, "num_hidden_layers": 4}
GPT2 = {"n_embd": 36, "n_layer": 4}


@pytest.mark.parametrize(("kind", "part", "request_"), [("llama", "model", LLAMA), ("gpt2", "transformer", GPT2)])
@pytest.mark.parametrize("named_whole", [False, True])
def test_a_backbone_without_its_prefix(
    kind: str, part: str, request_: dict[str, int], named_whole: bool, tmp_path: Path
) -> None:
    """Some checkpoints name the class with a head and leave the prefix out (a tied head needs no tensor of its own)."""
    whole = build(kind, tie_word_embeddings=True)
    getattr(whole, part).save_pretrained(tmp_path / "src")
    if named_whole:
        config = json.loads((tmp_path / "src" / "config.json").read_text())
        config["architectures"] = [type(whole).__name__]
        (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    grown = api.expand_checkpoint(tmp_path / "src", tmp_path / "out", prove_level="full", **request_)
    assert grown.proof.exit_code == 0
    assert not any(tensor.name.startswith(part) for tensor in grown.plan.tensors)
    claims = {claim.name: claim.passed for claim in api.verify(tmp_path / "src", tmp_path / "out").claims}
    assert claims == dict.fromkeys(claims, True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_config_that_names_no_architecture(kind: str, tmp_path: Path) -> None:
    src = save(tmp_path / "src", kind)
    config = json.loads((src / "config.json").read_text())
    del config["architectures"]
    (src / "config.json").write_text(json.dumps(config))
    request = LLAMA if kind == "llama" else GPT2
    assert api.expand_checkpoint(src, tmp_path / "out", prove_level="full", **request).proof.exit_code == 0


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_models_in_memory(kind: str) -> None:
    import growformer as gf

    model = build(kind)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    steps = [gf.MLPExpansion(101), gf.HiddenExpansion(36), gf.LayerAddition(2, at=(0, 3))]
    big = gf.expand(model, *steps)
    gf.verify(model, big).raise_if_changed()
    assert big.growformer_plan.layers == {"layer": (None, 0, 1, None, 2)}
    assert all(bool((x == before[name]).all()) for name, x in model.state_dict().items())
    with pytest.raises(gf.GrowformerError, match="what `expand` made of it"):
        gf.verify(model, build(kind))
    # The control: one weight of the grown model moved.
    next(big.parameters()).data[0, 0] += 0.5
    with pytest.raises(gf.GrowformerError, match="not the same function"):
        gf.verify(model, big).raise_if_changed()
