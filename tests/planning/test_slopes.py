"""Units written with zeros under a ReLU: named dead by the plan, as the proof finds them, but for a gate or a slope."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import growformer as gf
from growformer.algebra import GATE, Family
from growformer.api.checks.samples import raw_config, save_tiny
from growformer.checkpoint.stock import full_config
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.families.reference import REFERENCE
from growformer.methods import METHODS
from growformer.models import ReferenceConfig, ReferenceTransformer
from growformer.planning.expansions import MLPExpansion
from growformer.planning.picks import kind_of
from growformer.planning.reference_growth import plan_reference
from growformer.planning.slopes import FLAT, LOUD

UNITS: dict[str, dict[str, int]] = {
    "gpt2": {"n_inner": 101},
    "opt": {"ffn_dim": 33},
    "nemotron": {"intermediate_size": 33},
    "llama": {"intermediate_size": 33},
}


def tiny(folder: Path, name: str, **changes: Any) -> Path:
    return save_tiny(FAMILIES[name], FAMILIES[name].architectures[0], folder / "src", changes=changes)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt2", {"activation_function": "relu"}, "activation_function=relu"),
        ("opt", {}, "activation_function=relu"),
        ("nemotron", {}, "hidden_act=relu2"),
        ("gpt2", {}, ""),
        ("opt", {"activation_function": "gelu"}, ""),
        ("llama", {"hidden_act": "relu"}, ""),
    ],
)
def test_the_plan_names_them(name: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    src = tiny(tmp_path, name, **changes)
    plan = gf.plan(src, method="zero-in", **UNITS[name])
    assert len(plan.dead) == bool(said) and not gf.plan(src, **UNITS[name]).dead
    if said:
        assert f"new units are written with zeros, where {said} has no slope" in plan.dead[0]
        with pytest.raises(RequestError, match=r"has no slope.*mlp=paper is alive; --allow-dead"):
            gf.expand_checkpoint(src, tmp_path / "out", method="zero-in", **UNITS[name])


def test_the_proof_finds_what_is_named(tmp_path: Path) -> None:
    src = tiny(tmp_path, "gpt2", activation_function="relu")
    grown = gf.expand_checkpoint(
        src, tmp_path / "out", method="zero-in", prove_level="full", allow_dead=True, **UNITS["gpt2"]
    )
    measured = grown.proof.measured["alive"]
    assert sum(measured["dead"].values()) == measured["new_entries"] > 0
    assert [claim.passed for claim in grown.proof.claims if claim.name == "alive"] == [True]


def test_under_a_relu_a_gate_keeps_them_alive(tmp_path: Path) -> None:
    src = tiny(tmp_path, "llama", hidden_act="relu")
    grown = gf.expand_checkpoint(src, tmp_path / "out", method="zero-in", prove_level="full", **UNITS["llama"])
    assert not grown.plan.dead and not grown.proof.measured["alive"]["dead"]


def test_without_the_declaration_the_proof_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from growformer.errors import ChangedError

    src = tiny(tmp_path, "gpt2", activation_function="relu")
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], activations={}))
    with pytest.raises(ChangedError, match="alive"):
        gf.expand_checkpoint(src, tmp_path / "out", method="zero-in", prove_level="full", **UNITS["gpt2"])


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_the_reference_s_units(activation: str) -> None:
    config = ReferenceConfig.uniform(11, 7, 6, 2, 2, 4, 4, 8, activation=activation)
    shapes = {name: tuple(x.shape) for name, x in ReferenceTransformer(config).state_dict().items()}
    plan, _ = plan_reference(REFERENCE, METHODS["zero-in"], config, MLPExpansion(11), shapes)
    assert [("activation=relu has no slope" in said) for said in plan.dead] == [True] * 2 * (activation == "relu")


@pytest.mark.parametrize("act", FLAT)
def test_flat_is_what_torch_has(act: str) -> None:
    from transformers.activations import ACT2FN

    slopes = {}
    for name in (act, "gelu", "silu"):
        x = torch.zeros((), requires_grad=True)
        ACT2FN[name](x).backward()
        slopes[name] = float(x.grad)
    assert slopes.pop(act) == 0 and all(slopes.values())


@pytest.mark.parametrize("method", ["zero-in", "msg", "gated"])
def test_units_that_are_not_silent_at_zero_are_refused(method: str, tmp_path: Path) -> None:
    src = tiny(tmp_path, "gpt2", activation_function="sigmoid")
    assert gf.plan(src, **UNITS["gpt2"]).function == "exact"
    if method != "zero-in" and METHODS[method].ways["mlp"].closed != "writers":
        assert gf.plan(src, method=method, **UNITS["gpt2"]).function == "exact"
        return
    with pytest.raises(
        RequestError, match=r"n_inner .* written with zeros, and activation_function=sigmoid of 0 is not"
    ):
        gf.plan(src, method=method, **UNITS["gpt2"])


def test_what_the_plan_refuses_would_change_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from growformer.errors import ChangedError
    from growformer.planning import slopes

    src = tiny(tmp_path, "gpt2", activation_function="sigmoid")
    monkeypatch.setattr(slopes, "LOUD", ())
    with pytest.raises(ChangedError):
        gf.expand_checkpoint(src, tmp_path / "out", method="zero-in", prove_level="full", **UNITS["gpt2"])


def test_loud_is_what_transformers_has() -> None:
    from transformers.activations import ACT2FN

    with torch.no_grad():
        assert {name for name in ACT2FN if float(ACT2FN[name](torch.zeros(1, 1))) != 0} == set(LOUD)


def fixed(family: Family) -> set[str]:
    """Axes of units whose activation stands in the code, or that have none: no config field names it."""
    return {
        "bloom": {"mlp"},
        "mpt": {"mlp"},
        "whisper": {"stem", "projector"},
        "siglip_text_model": {"projection"},
    }.get(family.name, set()) | ({"pooled"} if family.name in POOLED else set())


POOLED = ("bert", "roberta", "distilbert", "electra", "bart", "t5", "umt5")
"""Their poolers have a tanh, or the classifier's own, in the code; DistilBERT's a ReLU, before its head alone."""


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_says_what_its_units_go_through(name: str) -> None:
    raw = raw_config(FAMILIES[name], FAMILIES[name].architectures[0])
    family, full = FAMILIES[name].of(full_config(raw)[0]), json.dumps(full_config(raw)[0], default=str)
    gated = {
        atom.axis
        for _, pattern in family.patterns
        if any(each.role == GATE for each in pattern.atoms())
        for atom in pattern.atoms()
    }
    units = {axis for axis in family.axes if kind_of(family, axis) == "mlp"} - gated
    assert units - set(family.activations) <= fixed(family)
    assert all(f'"{field.rpartition(".")[2]}"' in full for axis, field in family.activations.items() if axis in units)
