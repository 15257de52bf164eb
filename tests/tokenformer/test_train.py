"""`growformer train` on a TokenFormer: from scratch, through two growths of its tokens."""

import json
from pathlib import Path

import pytest

from growformer.proof.bar import BAR
from growformer.training.log import read_log
from tests.tokenformer.kit import loaded
from tests.training.train_kit import recipe, train

MODEL = {
    "model_type": "tokenformer",
    "hidden_size": 24,
    "qkv_tokens": 16,
    "proj_tokens": 12,
    "ffn_tokens": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
}
GROW = [
    {"at": {"step": 16}, "to": {"ffn_tokens": 30}, "warmup": 4},
    {"at": {"share": 0.66}, "to": {"qkv_tokens": 24, "proj_tokens": 18, "ffn_tokens": 45}, "warmup": 4},
]


def test_two_growths_in_a_run(tmp_path: Path) -> None:
    path = recipe(tmp_path, model=MODEL, grow=GROW, prove=True, budget={"steps": 50}, report=False)
    place, watcher = train(path, tmp_path / "run")
    assert "import growformer.models.tokenformer" in watcher.said[-1]

    log = read_log(place.log)
    growths = [line for line in log if line["kind"] == "growth"]
    assert [(g["step"], g["to"]) for g in growths] == [(16, GROW[0]["to"]), (33, GROW[1]["to"])]
    for growth in growths:
        claims = {claim["name"]: claim for claim in growth["proof"]["claims"]}
        assert all(claim["passed"] for claim in claims.values()) and float(claims["algebra"]["found"]) <= BAR
        assert growth["bits_per_byte"][1] == pytest.approx(growth["bits_per_byte"][0], rel=1e-5)
    bits = [line["bits_per_byte"] for line in log if line["kind"] == "evaluation"]
    assert bits[-1] < growths[1]["bits_per_byte"][0] < growths[0]["bits_per_byte"][0] < bits[0]

    config = json.loads((place.model / "config.json").read_text())
    assert (config["ffn_tokens"], config["ffn_tau"]) == (45, 20**0.5)
    keys = loaded(place.model).model.layers[0].mlp.keys
    assert len(keys) == 45 and bool(keys[20:].all()), "new keys left zero"
