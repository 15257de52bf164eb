"""`model_type=mixtral num_local_experts=4`: planned, grown, verified in a fresh process, and lied about."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import growformer as gf
from growformer.proof.bar import BAR
from growformer.proof.functional import fresh_process, functional

from .harness import Cli

REQUEST = ("model_type=mixtral", "num_local_experts=4", "num_experts_per_tok=2")


@pytest.fixture
def grown(cli: Cli) -> Path:
    cli.source("llama")
    said = cli(*cli.of("expand", *REQUEST, "--prove", "structure"))
    assert said.code == 0, said
    return cli.out


def test_the_plan_as_a_table_and_as_json(cli: Cli) -> None:
    cli.source("llama")
    said = cli(*cli.of("plan", *REQUEST, "hidden_size=36"))
    assert said.code == 0
    assert "llama -> mixtral, method paper" in said.out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.out.splitlines() if line.startswith("|")]
    assert ["model.layers.{layer}.block_sparse_moe.gate.weight", "3", "-", "4 x 36", "new", ""] in rows
    assert next(row[:2] for row in rows if "w1" in row[0]) == [
        "model.layers.{layer}.block_sparse_moe.experts.{experts}.w1.weight",
        "12",
    ]
    assert ["model_type", "llama", "mixtral"] in rows and ["mlp_bias", "False", "-"] in rows
    assert "every expert starts as a copy of the dense MLP" in said.out
    found = json.loads(cli(*cli.of("plan", *REQUEST, "--json")).out)
    assert (found["source_family"], found["family"]) == ("llama", "mixtral")
    assert found["request"] == {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def test_towards_the_config_of_a_mixture(cli: Cli, tmp_path: Path) -> None:
    cli.source("llama")
    plain = json.loads(cli(*cli.of("plan", *REQUEST, "intermediate_size=40", "--json")).out)
    to = tmp_path / "to.json"
    to.write_text(json.dumps(plain["target_config"]))
    found = json.loads(cli(*cli.of("plan", "--to", to, "--json")).out)
    assert found["target_config"] == plain["target_config"] and found["tensors"] == plain["tensors"]
    to.write_text(json.dumps(plain["target_config"] | {"router_jitter_noise": 0.1}))
    cli.refused(*cli.of("plan", "--to", to), says="router_jitter_noise is 0.1 .* no size")


def test_verified_in_a_fresh_process(cli: Cli, grown: Path) -> None:
    report = fresh_process("load_report", folder=grown)
    assert report["missing_keys"] == report["unexpected_keys"] == report["mismatched_keys"] == []
    found = fresh_process("functional", src=cli.src, out=grown, tokens=torch.randint(37, (2, 16)))
    assert found["relative"] <= BAR
    said = cli("verify", grown, "--prove", "structure")
    assert said.code == 0, said


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_an_altered_expert_is_noticed_by_structure_and_outputs(cli: Cli, grown: Path) -> None:
    path = grown / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"][3, 4] += 1.0
    save_file(tensors, path, {"format": "pt"})
    proof = gf.verify(cli.src, grown, level="structure")
    claims = {claim.name: claim for claim in proof.claims}
    assert claims["structure"].passed is False and "experts.2.w2.weight[3, 4]" in claims["structure"].detail
    assert functional(cli.src, grown, torch.randint(37, (2, 16))).relative > 1e6 * BAR


def test_receipts_that_lie_about_the_families(cli: Cli, grown: Path) -> None:
    kept = cli.root / "kept.json"
    shutil.copy(grown / "growformer.json", kept)
    edit(grown / "growformer.json", lambda receipt: receipt.update(source_family="mistral"))
    said = cli("verify", cli.src, grown, "--prove", "structure")
    assert said.code == 2 and "a mistral became a mixtral; the source is a llama" in said.err
    shutil.copy(kept, grown / "growformer.json")
    edit(grown / "growformer.json", lambda receipt: receipt.update(family="qwen3_moe"))
    said = cli("verify", cli.src, grown, "--prove", "structure")
    assert said.code == 2 and "no such growth is declared" in said.err
    shutil.copy(kept, grown / "growformer.json")
    edit(grown / "growformer.json", lambda receipt: receipt.update(source_family=""))
    said = cli("verify", cli.src, grown, "--prove", "structure")
    assert said.code == 1 and "FAILS" in said.out


def test_one_chosen_expert_is_refused_unless_allowed(cli: Cli) -> None:
    cli.source("llama")
    words = ("model_type=mixtral", "num_local_experts=4", "num_experts_per_tok=1")
    cli.refused(*cli.of("expand", *words), says="no gradient ever reaches it; num_experts_per_tok=2 is alive")
    said = cli(*cli.of("expand", *words, "--allow-dead"))
    assert said.code == 0, said


def test_in_memory() -> None:
    from tiny import build

    model = build("llama")
    grown = gf.expand(model, model_type="mixtral", num_local_experts=3)
    assert type(grown).__name__ == "MixtralForCausalLM"
    assert gf.verify(model, grown).exit_code == 0


def test_the_family_says_what_it_becomes(cli: Cli) -> None:
    assert "model_type=mixtral num_local_experts=8 num_experts_per_tok=2" in cli("families", "llama").out
    assert json.loads(cli("families", "qwen3", "--json").out)["becomes"] == ["qwen3_moe"]
    assert json.loads(cli("families", "gpt2", "--json").out)["becomes"] == []
