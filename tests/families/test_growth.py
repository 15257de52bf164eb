"""Must hold for every family: each config field alone, with what is tied to it, and all together; from disk, proved.

One fresh process verifies every folder, so that nothing but the files can make a proof pass.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from growformer.api import expand_checkpoint
from growformer.checkpoint import Receipt
from tests.tiny import save

ALL_LLAMA = {
    "hidden_size": 36,
    "intermediate_size": 41,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 14,
    "num_hidden_layers": 5,
}
ONE_BY_ONE = [
    {"hidden_size": 36},
    {"intermediate_size": 41},
    {"num_attention_heads": 8},
    {"num_key_value_heads": 4},
    {"num_attention_heads": 6, "num_key_value_heads": 3},
    {"head_dim": 14},
    {"head_dim": 20},
    {"num_hidden_layers": 5},
]
# head_dim 14 is below twice the tiny size of 10: exact, and dead under Qwen3's norm over each head.
QWEN3 = [r for r in ONE_BY_ONE if r != {"head_dim": 14}] + [{"head_dim": 26}, {"head_dim": 30}]
REQUESTS: dict[str, list[dict[str, int]]] = {
    "llama": [*ONE_BY_ONE, ALL_LLAMA],
    "llama-tied-bias": [*ONE_BY_ONE, ALL_LLAMA],
    "llama-mqa": [
        {"hidden_size": 36},
        {"num_attention_heads": 6, "hidden_size": 36},
        {"num_key_value_heads": 2},
        {"head_dim": 14},
        {**ALL_LLAMA, "num_key_value_heads": 3},
    ],
    "qwen3": [*QWEN3, {**ALL_LLAMA, "hidden_size": 35, "head_dim": 26}],
    "qwen3-tied": [*QWEN3, {**ALL_LLAMA, "hidden_size": 35, "head_dim": 26}],
    "gpt2": [
        {"n_embd": 36},
        {"n_head": 6},
        {"n_embd": 36, "n_head": 6},
        {"n_inner": 101},
        {"n_layer": 5},
        {"n_embd": 60, "n_head": 6, "n_inner": 101, "n_layer": 5},
    ],
}
CASES = [(kind, dtype, i) for kind, asked in REQUESTS.items() for i in range(len(asked)) for dtype in ("float64", None)]


def name(kind: str, dtype: str | None, i: int) -> str:
    return f"{kind}-{i}-{dtype or 'stored'}"


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case grown (with the certificate alone), then verified in full by one process that made none of them."""
    root = tmp_path_factory.mktemp("families")
    for kind in REQUESTS:
        save(root / kind, kind)
    pairs = {}
    for kind, dtype, i in CASES:
        out = root / name(kind, dtype, i)
        expand_checkpoint(root / kind, out, dtype=dtype, prove_level="structure", **REQUESTS[kind][i])
        pairs[name(kind, dtype, i)] = (str(root / kind), str(out))
    code = (
        "import json, sys\n"
        "import torch; torch.set_num_threads(1)\n"
        "from growformer import api\n"
        "pairs = json.load(sys.stdin)\n"
        "print(json.dumps({k: api.verify(a, b).to_json() for k, (a, b) in pairs.items()}))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(pairs), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, Any] = json.loads(run.stdout)
    found["root"] = str(root)
    return found


@pytest.mark.parametrize(("kind", "dtype", "i"), CASES)
def test_every_claim_holds(proofs: dict[str, Any], kind: str, dtype: str | None, i: int) -> None:
    proof = proofs[name(kind, dtype, i)]
    assert proof["exit_code"] == 0, proof["claims"]
    claims = {claim["name"]: claim for claim in proof["claims"]}
    assert set(claims) == {"files", "structure", "loads", "algebra", "stored", "runtime", "alive"}
    assert all(claim["passed"] is True for claim in claims.values())
    assert proof["measured"]["alive"]["new_entries"] > 0 or "num_key_value_heads" in REQUESTS[kind][i]
    # Every new entry learns: the plan names none dead.
    assert proof["measured"]["alive"]["dead"] == {}


def test_float64_is_the_algebra_of_the_files_themselves(proofs: dict[str, Any]) -> None:
    for key, proof in proofs.items():
        if key != "root":
            on_disk = proof["measured"]["algebra"]["of"] == "the files on disk"
            assert on_disk == key.endswith("float64")


def test_moments_of_rounding_are_told_apart(proofs: dict[str, Any]) -> None:
    """A growth without factors rounds nothing; one with sqrt(36/24) rounds, and says how many tensors."""
    root = Path(proofs["root"])
    assert Receipt.read(root / name("llama", None, 1)).fidelity["rounded"] == 0
    assert Receipt.read(root / name("llama", None, 0)).fidelity["rounded"] == 7
