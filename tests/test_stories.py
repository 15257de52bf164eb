"""The main job on real input: a pretrained Llama grown along every axis at once, still telling the same story."""

from pathlib import Path
from typing import Any

import pytest

from growformer.proof.functional import fresh_process

REQUEST = [
    "hidden_size=96",
    "intermediate_size=256",
    "num_attention_heads=12",
    "num_key_value_heads=6",
    "head_dim=16",
    "num_hidden_layers=8",
]


def cli(*words: str) -> dict[str, Any]:
    """The console script in a process of its own."""
    import json
    import subprocess
    import sys

    code = "from growformer.cli.main import run; run()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def grown(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stories")
    for dtype in ("float32", "float64"):
        options = ["--dtype", dtype] if dtype == "float64" else []
        cli("expand", str(stories), str(root / dtype), *REQUEST, *options, "--prove", "structure", "--json")
    return {dtype: root / dtype for dtype in ("float32", "float64")}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_verify_in_a_fresh_process_proves_it(stories: Path, grown: dict[str, Path], dtype: str) -> None:
    proof = cli("verify", str(stories), str(grown[dtype]), "--prompt", "Once upon a time", "--json")
    claims = {claim["name"]: claim["passed"] for claim in proof["claims"]}
    names = ("files", "structure", "loads", "algebra", "stored", "runtime", "alive")
    assert claims == dict.fromkeys(names, True)
    assert proof["measured"]["structure"] == {"tensors": 74, "identical": 31, "scaled": 0, "rounded": 16, "new": 27}
    assert proof["measured"]["probe"]["kind"] == "text"
    assert proof["measured"]["loads"]["tied"] is True
    assert proof["measured"]["alive"]["dead"] == {}
    if dtype == "float32":
        assert proof["greedy"]["same"] == proof["greedy"]["tokens"] == 200


def test_stock_loading_finds_every_key(grown: dict[str, Path]) -> None:
    report = fresh_process("load_report", folder=grown["float32"])
    assert report["missing_keys"] == report["unexpected_keys"] == report["mismatched_keys"] == []
    assert report["tied"] is True


def test_everything_that_belongs_to_the_model_came_along(stories: Path, grown: dict[str, Path]) -> None:
    left = {p.name for p in stories.iterdir()} - {p.name for p in grown["float32"].iterdir()}
    assert left == set()
    assert {"growformer.json", "README.md"} <= {p.name for p in grown["float32"].iterdir()}


def test_it_becomes_a_mixture_of_experts(stories: Path, tmp_path: Path) -> None:
    request = ["model_type=mixtral", "num_local_experts=8", "num_experts_per_tok=2"]
    cli("expand", str(stories), str(tmp_path / "moe"), *request, "--prove", "structure", "--json")
    proof = cli("verify", str(stories), str(tmp_path / "moe"), "--prompt", "Once upon a time", "--json")
    claims = {claim["name"]: claim["passed"] for claim in proof["claims"]}
    names = ("files", "structure", "loads", "algebra", "stored", "runtime", "alive")
    assert claims == dict.fromkeys(names, True)
    assert proof["measured"]["structure"] == {"tensors": 157, "identical": 152, "scaled": 0, "rounded": 0, "new": 5}
    assert proof["measured"]["loads"]["tied"] is True
    assert proof["measured"]["alive"]["new_entries"] == 1158400 and proof["measured"]["alive"]["dead"] == {}
    assert proof["measured"]["alive"]["experts_never_chosen"] == {}
    assert proof["greedy"]["same"] == proof["greedy"]["tokens"] == 200
