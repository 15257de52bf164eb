"""Growths that are exact but for the eps of norms: the bound is measured on the source, holds, and is close."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from growformer import api
from growformer.api.checks.samples import save_tiny
from growformer.checkpoint import Receipt
from growformer.checkpoint.stock import full_config
from growformer.families import FAMILIES
from growformer.planning import Plan
from growformer.proof.bar import BAR
from growformer.proof.case import Case
from growformer.proof.claim_float64 import Outputs, algebra, eps, stored
from growformer.proof.claim_runtime import noise_floor, runtime
from growformer.proof.eps import Passing
from growformer.proof.inputs import probe_inputs

GROWTHS: dict[str, tuple[str, dict[str, Any], dict[str, int], Any]] = {
    "bert 1e-12": ("bert", {"layer_norm_eps": 1e-12}, {"num_hidden_layers": 6}, [0, 2, 3]),
    "bert 1e-5": ("bert", {"layer_norm_eps": 1e-5}, {"num_hidden_layers": 6}, [0, 2, 3]),
    "bert one": ("bert", {"layer_norm_eps": 1e-5}, {"num_hidden_layers": 4}, [2]),
    "bert four in a row": ("bert", {"layer_norm_eps": 1e-5}, {"num_hidden_layers": 7}, [2, 3, 4, 5]),
    "bert before all": ("bert", {"layer_norm_eps": 2e-3}, {"num_hidden_layers": 4}, [0]),
    "distilbert": ("distilbert", {}, {"n_layers": 5, "dim": 48}, None),
    "deberta": ("deberta_v2", {"layer_norm_eps": 1e-7}, {"num_hidden_layers": 6}, None),
    "bart": ("bart", {}, {"encoder_layers": 5, "decoder_layers": 5}, {"layer": [2], "decoder_layer": [0, 4]}),
}
INSIDE = [name for name in GROWTHS if name != "bert before all"]


def case_of(src: Path, out: Path) -> Case:
    config = json.loads((out / "config.json").read_text())
    raw, receipt = json.loads((src / "config.json").read_text()), Receipt.read(out)
    full = full_config(raw)[0]
    return Case(api.family_of(raw).of(full), Plan.from_json(receipt.plan), src, out, full, config)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    root, made = tmp_path_factory.mktemp("grown"), dict[str, Case]()

    def get(name: str) -> Case:
        if name not in made:
            family, changes, request, at = GROWTHS[name]
            literal = FAMILIES[family]
            src = save_tiny(literal, literal.architectures[0], root / name, "float64", changes)
            api.expand_checkpoint(src, root / f"{name} out", prove_level="structure", layers_at=at, **request)
            made[name] = case_of(src, root / f"{name} out")
        return made[name]

    return get


def proved(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    outputs, measured = Outputs(case, probe_inputs(case.source, 3, 16, 0).batches), dict[str, Any]()
    return {claim.name: claim for claim in (check(outputs, measured) for check in (eps, algebra))}, measured


def broken(case: Case, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Case:
    tensors = load_file(case.target / "model.safetensors")
    change(tensors)
    (tmp_path / "config.json").write_text(json.dumps(case.target_config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return replace(case, target=tmp_path)


@pytest.mark.parametrize("kept", [1.0, 4.0])
@pytest.mark.parametrize("after", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_formula_is_what_norms_in_a_row_do(kind: Any, after: int, kept: float) -> None:
    value = 0.01
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.logspace(-2, 1, 50, dtype=torch.float64)[:, None]
    x -= x.mean(-1, keepdim=True)

    def normed(y: torch.Tensor) -> torch.Tensor:
        y = y - y.mean(-1, keepdim=True) if kind == "layer" else y
        return y / (y.square().mean(-1, keepdim=True) + value).sqrt()

    once, all_of_them = normed(x), normed(x)
    for _ in range(after):
        all_of_them = normed(kept * all_of_them)
    norm = Passing("norm.weight", kind, value, kept, after)
    v = x.square().mean(-1)
    assert torch.allclose(normed(x * norm.scaling(v)[:, None]), all_of_them, rtol=BAR, atol=0)
    move = ((all_of_them - once).abs() / once.abs()).max(-1).values
    assert torch.allclose(norm.move(v), move, rtol=1e-9, atol=BAR)


def test_nothing_moves_what_does_not_vary_and_nothing_moves_without_eps() -> None:
    norm = Passing("norm.weight", "layer", 1e-5, 1.0, 2)
    flat = torch.zeros(1, dtype=torch.float64)
    assert norm.move(flat).item() == 0 and norm.scaling(flat).isfinite().all()
    none = replace(norm, eps=0.0)
    assert none.move(torch.tensor([0.1, 9.0], dtype=torch.float64)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", INSIDE)
def test_the_bound_holds_and_is_close(name: str, grown: Callable[[str], Case]) -> None:
    claims, measured = proved(grown(name))
    assert claims["eps"].passed is True and claims["algebra"].passed is True, claims
    found = measured["algebra"]
    assert found["beyond"] <= BAR
    assert set(found["bounds"]) == set(found["outputs"])
    for output, relative in found["outputs"].items():
        bound = found["bounds"][output]
        if bound > 10 * BAR:  # below that, rounding is part of what is measured
            assert relative <= bound <= 10 * relative
        else:
            assert relative <= max(bound, BAR)
    assert measured["eps"]["norms"].keys() == {passing.gain for passing in grown(name).passings}
    assert "within eps" in claims["algebra"].allowed and "beyond eps" in claims["algebra"].found


def test_new_layers_in_a_row_add_nothing(grown: Callable[[str], Case]) -> None:
    one, four = (proved(grown(name))[1]["algebra"]["relative"] for name in ("bert one", "bert four in a row"))
    assert one == pytest.approx(four, rel=1e-3) and one > 1e-7


def test_an_eps_that_is_no_small_number_beside_a_variance_is_no_small_change(grown: Callable[[str], Case]) -> None:
    claims, measured = proved(grown("bert before all"))
    assert claims["eps"].passed is False and claims["algebra"].passed is True
    assert "bert.embeddings.LayerNorm.weight" in claims["eps"].detail and "elsewhere" in claims["eps"].detail
    low, high = measured["eps"]["norms"]["bert.embeddings.LayerNorm.weight"]["variance"]
    assert 0 < low < high and measured["eps"]["moved"] == pytest.approx(1e-3 * (1 / low - 1), rel=0.02)


NORM = "bert.encoder.layer.{}.output.LayerNorm.{}".format


def swap(kind: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        a, b = NORM(1, kind), NORM(3, kind)
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_gain_or_shift_that_is_not_moved(kind: str, grown: Callable[[str], Case], tmp_path: Path) -> None:
    claims, measured = proved(broken(grown("bert 1e-5"), tmp_path, swap(kind)))
    assert claims["algebra"].passed is False
    assert measured["algebra"]["relative"] > measured["algebra"]["bound"]


def test_a_mistake_smaller_than_the_bound_is_one_all_the_same(grown: Callable[[str], Case], tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[NORM(3, "weight")] *= 1 + 1e-8

    claims, measured = proved(broken(grown("bert 1e-5"), tmp_path, change))
    assert measured["algebra"]["relative"] <= measured["algebra"]["bound"]
    assert measured["algebra"]["beyond"] > BAR and claims["algebra"].passed is False


def test_stored_and_runtime_and_from_disk(grown: Callable[[str], Case]) -> None:
    case = grown("bert one")
    inputs, measured = probe_inputs(case.source, 3, 16, 0).batches, dict[str, Any]()
    whole, parts = Outputs(case, inputs), Outputs(case, inputs, memory=1 << 14)
    for name, value in whole.expected().items():
        assert torch.allclose(value, parts.expected()[name], rtol=BAR, atol=BAR)
    assert eps(parts, {}).passed and algebra(parts, {}).passed
    assert stored(whole, measured).passed is True and measured["stored"]["relative"] <= BAR
    assert runtime(case, inputs, measured).passed is True
    assert all(floor["c"] > 0 for floor in measured["floor"].values())


def test_an_exact_growth_has_no_such_floor(grown: Callable[[str], Case], tmp_path: Path) -> None:
    src = grown("bert 1e-5").source
    api.expand_checkpoint(src, tmp_path / "out", prove_level="structure", intermediate_size=35)
    case = case_of(src, tmp_path / "out")
    assert case.passings == []
    floors: Mapping[str, Any] = noise_floor(case, probe_inputs(src, 3, 16, 0).batches, {})
    assert all(floor.c == 0 for floor in floors.values())
