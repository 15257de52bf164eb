"""A saved adapter's rank grows: receipt, proof, and PEFT loads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import growformer as gf
from growformer.cli.main import app
from growformer.errors import ChangedError, GrowformerError, RequestError
from growformer.proof.adapters import Adapter, prove_rank
from growformer.proof.bar import BAR
from tests.lora.kit import loaded, logits, relative, saved
from tests.tiny import build

EPS = torch.finfo(torch.float32).eps
A = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def read(folder: Path) -> Adapter:
    return Adapter(
        json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    )


def test_command_line(tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "small")
    out = tmp_path / "large"
    done = CliRunner().invoke(app, ["expand", str(folder), str(out), "r=16", "--json"])
    assert done.exit_code == 0, done.output
    claims = {claim["name"]: claim["passed"] for claim in json.loads(done.stdout)["claims"]}
    assert claims == {"structure": True, "algebra": True}
    config, receipt = read(out).config, json.loads((out / "growformer.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32)
    assert (receipt["family"], receipt["method"], receipt["request"]) == ("lora", "rank", {"r": 16})
    assert relative(logits(model), logits(loaded(build("llama"), out))) < 16 * EPS
    assert CliRunner().invoke(app, ["verify", str(out)]).exit_code == 0
    shown = CliRunner().invoke(app, ["plan", str(folder), "r=16"])
    assert shown.exit_code == 0 and "lora_alpha 8 -> 32" in shown.stdout


@pytest.mark.parametrize(
    ("targets", "config"),
    [
        (("embed_tokens", "lm_head", "v_proj"), {}),
        (("q_proj",), {"use_dora": True}),
        (("q_proj",), {"modules_to_save": ["lm_head"]}),
        (("q_proj", "v_proj"), {"use_rslora": True, "lora_alpha": 5}),
    ],
    ids=str,
)
def test_kinds_of_modules(targets: tuple[str, ...], config: dict[str, Any], tmp_path: Path) -> None:
    model, folder = saved(tmp_path / "small", targets=targets, **config)
    grown = gf.expand_checkpoint(folder, tmp_path / "large", r=12)
    assert grown.proof.measured["algebra"] <= BAR
    assert relative(logits(model), logits(loaded(build("llama"), tmp_path / "large"))) < 16 * EPS


def test_controls(tmp_path: Path) -> None:
    """Every rule broken in turn, and the proof that says so."""
    _, folder = saved(tmp_path / "small")
    gf.expand_checkpoint(folder, tmp_path / "large", r=16)
    old, new = read(folder), read(tmp_path / "large")

    def said(config: dict[str, Any] | None = None, **tensors: torch.Tensor) -> str:
        named = {{"a": A, "b": B}[name]: x for name, x in tensors.items()}
        proof = prove_rank(old, Adapter({**new.config, **(config or {})}, {**new.tensors, **named}))
        with pytest.raises(ChangedError) as error:
            proof.raise_if_changed()
        return str(error.value)

    prove_rank(old, new).raise_if_changed()
    assert "algebra" in said({"lora_alpha": 8})  # alpha left as it was
    assert "algebra" in said({"use_rslora": True}) or "use_rslora" in said({"use_rslora": True})
    dead = new.tensors[A].clone()
    dead[4:] = 0
    assert "could never learn" in said(a=dead)  # zeros on both sides
    filled = new.tensors[B].clone()
    filled[0, 9] = 1e-6
    assert "a new column is not zero" in said(b=filled)
    moved = new.tensors[A].clone()
    moved[0, 0] *= 1 + 2 * EPS
    assert "old entries are not" in said(a=moved)


def test_verify_sees_a_changed_file(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "small")
    gf.expand_checkpoint(folder, tmp_path / "large", r=16)
    path = tmp_path / "large" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[B][0, 9] = 1
    save_file(tensors, path)
    proof = gf.verify(folder, tmp_path / "large")
    assert [claim.passed for claim in proof.claims] == [False, False]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"r": 2}, "ranks only grow"),
        ({"hidden_size": 48}, "hidden_size: .* holds an adapter, whose rank can grow"),
        ({"r": 8, "dtype": "bfloat16"}, "dtype says nothing of an adapter"),
        ({"r": 8, "follow": "."}, "one after the other|config.json"),
    ],
    ids=str,
)
def test_refused_by_name(asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "small", steps=0)
    with pytest.raises(GrowformerError, match=said):
        gf.expand_checkpoint(folder, tmp_path / "large", **asked)
    assert not (tmp_path / "large").exists()


def test_training_state_is_never_left_behind_silently(tmp_path: Path) -> None:
    _, folder = saved(tmp_path / "small", steps=0)
    (folder / "optimizer.pt").write_bytes(b"state")
    with pytest.raises(RequestError, match="--model-only"):
        gf.expand_checkpoint(folder, tmp_path / "large", r=16)
    gf.expand_checkpoint(folder, tmp_path / "large", r=16, model_only=True)
    assert not (tmp_path / "large" / "optimizer.pt").exists()
