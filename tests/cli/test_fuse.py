"""growformer fuse, and verify of what it made."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import save

from growformer.api.fused import verify_fused
from growformer.checkpoint import Receipt
from growformer.proof.bar import BAR

from .harness import Cli, state

Q, HEAD, NORM = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of unequal widths, and what is fused of them."""
    from growformer.api import fuse_checkpoint

    root = tmp_path_factory.mktemp("fused")
    save(root / "one", "llama")
    sizes = {"hidden_size": 36, "intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 3}
    save(root / "other", "llama", seed=1, **sizes)
    fuse_checkpoint(root / "one", root / "other", root / "out", allow_change=True)
    return root


@pytest.fixture
def three(cli: Cli, made: Path) -> Cli:
    """The command line, in a folder with the three."""
    for name in ("one", "other", "out"):
        shutil.copytree(made / name, cli.root / name)
    return cli


def test_a_fusion_is_asked_for_by_name(three: Cli) -> None:
    one, other, new = three.root / "one", three.root / "other", three.root / "new"
    three.refused("fuse", one, other, new, says="compute what neither of them does.*--allow-change goes on")
    three.refused("fuse", one, other, one, "--allow-change", says="exists")
    three.refused("fuse", one, other, other / "in", "--allow-change", says="inside the source")
    three.refused("fuse", one, other, new, "--allow-change", "--dtype", "int8", says="dtype='int8' is unknown")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    three.refused(
        "fuse", one, other, new, "--allow-change",
        says=f"rms_norm_eps is 0.001 in {one} and 1e-06 in {other};.*--ignore-field rms_norm_eps goes on",
    )  # fmt: skip
    said = three("fuse", one, other, new, "--allow-change", "--ignore-field", "rms_norm_eps", "--prove", "structure")
    assert said.code == 0 and json.loads((new / "config.json").read_text())["rms_norm_eps"] == 0.001
    assert three("verify", new, "--prove", "structure").code == 0


def test_what_is_fused_loads_and_says_what_it_is(three: Cli) -> None:
    one, other, new = three.root / "one", three.root / "other", three.root / "new"
    before = state(three.root)
    said = three("fuse", one, other, new, "--allow-change")
    assert said.code == 0 and said.err == ""
    assert "note: both models must mean the same by every token id" in said.out
    assert "CHANGES THE FUNCTION: two models side by side compute what neither of them does" in said.out
    assert "from the mean of both models'" in said.out and "told" in said.out
    assert {name: what for name, what in state(three.root).items() if not name.startswith("new")} == before
    assert state(new).keys() == state(three.root / "out").keys()
    model = transformers.AutoModelForCausalLM.from_pretrained(new)
    assert (model.config.hidden_size, model.config.intermediate_size) == (60, 48)
    card = (new / "README.md").read_text()
    assert "# one and other, fused" in card and "another function than both" in card
    receipt = Receipt.read(new)
    assert receipt.method == "fuse" and receipt.plan["other_source"]["path"] == str(other)


def test_json_has_the_numbers(three: Cli) -> None:
    one = three.root / "one"
    said = three("fuse", one, one, three.root / "new", "--allow-change", "--json")
    told = json.loads(said.out)
    measured = told["measured"]["fused"]
    assert told["function"] == "changed" and told["exit_code"] == 0
    # A model beside itself computes what it did; that is measured as well.
    assert measured["relative"] <= BAR and measured["apart"] == 0
    assert measured["cost_fused"] == pytest.approx(measured["cost_one"], abs=BAR)
    three_different = json.loads((three.root / "out" / "growformer.json").read_text())["measured"]["measured"]["fused"]
    assert three_different["relative"] > 1e-2 and three_different["apart"] > 1e-2


def test_verify_says_what_it_is(three: Cli) -> None:
    one, other, out = three.root / "one", three.root / "other", three.root / "out"
    for words in ((one, other, out), (one, out), (out,)):
        said = three("verify", *words, "--prove", "full")
        assert said.code == 0 and "| fused " in said.out and "told" in said.out and "algebra" not in said.out
    said = three("verify", other, one, out, "--prove", "structure")  # each in the other's place
    assert said.code == 1 and "FAILS" in said.out
    three.refused("verify", one, other, out, out, says="got 4")
    three.refused("verify", one, other, out, "--prompt", "a", says="three are given")
    three.refused("verify", one, other, one, says="has no growformer.json")
    three.refused("verify", out, "--memory", "8GB", says="a fused model and the two in it are run whole")


def test_a_model_that_is_gone_is_named(three: Cli) -> None:
    receipt = json.loads((three.root / "out" / "growformer.json").read_text())
    receipt["plan"]["other_source"]["path"] = str(three.root / "nowhere")
    (three.root / "out" / "growformer.json").write_text(json.dumps(receipt))
    three.refused(
        "verify", three.root / "out", says="nowhere.*no such folder; say where they are: growformer verify ONE"
    )
    assert three("verify", three.root / "one", three.root / "other", three.root / "out").code == 0


BROKEN: dict[str, tuple[str, tuple[int, ...], str]] = {
    "a zero": (Q, (0, 30), "holds more than the two models' blocks"),
    "the one model's block": (Q, (3, 5), "the block of the one model is not 1 times its own"),
    "the other model's block": (Q, (50, 30), "the block of the other model is not 1 times its own"),
    "half a head": (HEAD, (3, 5), "the block of the one model is not 0.5 times its own"),
    "a gain": (NORM, (30,), "the block of the other model is not 1 times its own"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_block_is_seen(what: str, made: Path, tmp_path: Path) -> None:
    name, at, says = BROKEN[what]
    out = shutil.copytree(made / "out", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    tensors[name][at] += 0.5
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    proof = verify_fused(out, level="structure")
    claims = {claim.name: claim for claim in proof.claims}
    assert proof.exit_code == 1 and claims["files"].passed is False and claims["loads"].passed is True
    assert claims["blocks"].detail == f"{name}: {says}"


def test_a_changed_config_is_seen(made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made / "out", tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-2}))
    claims = {claim.name: claim for claim in verify_fused(out, level="structure").claims}
    assert claims["config"].passed is False and "rms_norm_eps" in claims["config"].found


def test_dtypes(three: Cli) -> None:
    one, half, new = three.root / "one", save(three.root / "half", "llama", dtype="bfloat16"), three.root / "new"
    three.refused("fuse", one, half, new, "--allow-change", says="stored as F32 in .* as BF16 in .*say --dtype")
    assert three("fuse", one, half, new, "--allow-change", "--dtype", "bfloat16").code == 0
    assert {x.dtype for x in load_file(new / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((new / "config.json").read_text())["dtype"] == "bfloat16"
    assert three("verify", new).code == 0
