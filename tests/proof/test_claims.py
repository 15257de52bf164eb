"""The claims on models that are no causal language models: towers, backbones, classifiers, encoder-decoders."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from growformer import api
from growformer.checkpoint.stock import full_config
from growformer.planning import Plan
from growformer.proof.case import Case
from growformer.proof.claim_alive import alive
from growformer.proof.claim_float64 import Outputs, algebra, stored
from growformer.proof.claim_runtime import runtime
from growformer.proof.inputs import probe_inputs
from tests.proof.every_model import save

GROWTHS: dict[str, dict[str, int]] = {
    "vit-base": {"hidden_size": 36},
    "dinov2": {"hidden_size": 36},
    "llama-base": {"hidden_size": 36, "intermediate_size": 35},
    "bert-base": {"hidden_size": 48, "num_attention_heads": 8},
    "bert-qa": {"intermediate_size": 35},
    "whisper": {"encoder_ffn_dim": 35},
}


def case_of(src: Path, out: Path, plan: Plan) -> Case:
    config = json.loads((out / "config.json").read_text())
    raw = dict(plan.source_config)
    full = full_config(raw)[0]
    return Case(api.family_of(raw).of(full), plan, src, out, full, config)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    root, made = tmp_path_factory.mktemp("grown"), dict[str, Case]()

    def get(name: str) -> Case:
        if name not in made:
            src = save(name, root / name)
            plan = api.expand_checkpoint(src, root / f"{name}-out", prove_level="structure", **GROWTHS[name]).plan
            made[name] = case_of(src, root / f"{name}-out", plan)
        return made[name]

    return get


@pytest.mark.parametrize("name", GROWTHS)
def test_every_claim_holds_and_a_broken_weight_fails_them(
    name: str, grown: Callable[[str], Case], tmp_path: Path
) -> None:
    case = grown(name)
    inputs = probe_inputs(case.source, 4, 24, 0).batches
    measured: dict[str, Any] = {}
    claims = [check(Outputs(case, inputs), measured) for check in (algebra, stored)]
    claims += [runtime(case, inputs, measured), alive(case, measured)]
    assert [claim.passed for claim in claims] == [True] * 4, claims
    assert measured["alive"]["new_entries"] > 0 and measured["alive"]["dead"] == {}
    assert set(measured["floor"]) == {output.partition(",")[0] for output in measured["algebra"]["outputs"]}

    tensors = load_file(case.target / "model.safetensors")
    key = next(k for k, x in tensors.items() if x.dim() == 2 and ("mlp" in k or "fc1" in k or "intermediate" in k))
    (tmp_path / "config.json").write_text(json.dumps(case.target_config))
    save_file(tensors | {key: tensors[key] * 1.01}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    broken = replace(case, target=tmp_path)
    # What is pulled back from a scaled weight is scaled too: it is the source that it is no longer.
    measured = {}
    stored(Outputs(broken, inputs), measured)
    assert measured["stored"]["to_source"] > 1e-5
    assert runtime(broken, inputs, measured).passed is False


def test_new_entries_closed_on_both_sides_are_named_dead_by_their_names_on_disk(
    grown: Callable[[str], Case], tmp_path: Path
) -> None:
    case = grown("bert-qa")
    tensors = load_file(case.target / "model.safetensors")
    for name in tensors:
        if name.endswith("layer.1.intermediate.dense.weight") or name.endswith("layer.1.intermediate.dense.bias"):
            tensors[name][28:] = 0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(case.target_config))
    claim = alive(replace(case, target=tmp_path), {})
    assert claim.passed is False
    assert "bert.encoder.layer.1.intermediate.dense.weight (168)" in claim.detail
    assert "bert.encoder.layer.1.output.dense.weight (168)" in claim.detail


def test_what_has_no_gradient_in_the_source_is_reported_and_not_judged(grown: Callable[[str], Case]) -> None:
    measured: dict[str, Any] = {}
    claim = alive(grown("dinov2"), measured)
    assert measured["alive"]["idle_in_source"] == {"embeddings.mask_token": 12}
    assert "12 aside that extend what has no gradient in the source: embeddings.mask_token" in claim.found


def test_a_floor_is_measured_for_every_output(grown: Callable[[str], Case]) -> None:
    case, measured = grown("bert-base"), dict[str, Any]()
    inputs = probe_inputs(case.source, 4, 24, 0).batches
    assert "noise floor of" in runtime(case, inputs, measured).found
    assert set(measured["runtime"]["outputs"]) == {"last_hidden_state", "pooler_output"}
    assert all(numbers["a"] > 0 for numbers in measured["floor"].values())
    assert torch.tensor([numbers["floor"] for numbers in measured["floor"].values()]).max() < 1e-4
