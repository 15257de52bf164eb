"""A method that says it keeps the function keeps it, on every axis it grows; one that does not is asked for by name."""

import copy
from pathlib import Path

import pytest
import torch
from method_kit import (
    CASES,
    CHANGED,
    DECLARED,
    KEPT,
    LEARNED,
    OLD_VALUES,
    REQUESTS,
    TURNING,
    grow,
    grown,
    preserving,
    stock,
)

import growformer as gf
from growformer import api
from growformer.algebra import Kind
from growformer.errors import RequestError
from growformer.families.reference import REFERENCE
from growformer.methods import METHODS
from growformer.models import HeadSize, LayerSize, ReferenceConfig, ReferenceTransformer, randomise
from growformer.planning.expansions import (
    AttentionExpansion,
    Expansion,
    HeadAddition,
    HeadsExpansion,
    HiddenExpansion,
    LayerAddition,
    MLPExpansion,
)
from growformer.planning.reference_growth import expand_reference
from growformer.proof.bar import BAR
from tests.tiny import save
from tests.training.train_kit import recipe

SEEN = 1e-3
""""Changed" is by more than rounding."""

STACKED = {"stack": 6, "interpolate": 5, "midas": 5, "solar": 4, "bert2bert": 6, "bert2bert-aki": 6}
"""Methods that make another function, and a number of layers that each can make of 3."""


def test_the_cases_are_many_and_every_method_has_some() -> None:
    assert {method for _, method, _ in DECLARED} == set(METHODS)
    assert len(KEPT) > 100 and {method for _, method, _ in CHANGED} == set(STACKED)


@pytest.mark.parametrize(("kind", "method", "axis"), KEPT)
def test_the_function_is_kept(kind: str, method: str, axis: str) -> None:
    case = grown(kind, method, axis)
    assert case.plan.function == "exact"
    assert case.relative <= BAR


@pytest.mark.parametrize(("kind", "method", "axis"), CHANGED)
def test_another_function_is_called_one(kind: str, method: str, axis: str) -> None:
    case = grown(kind, method, axis)
    assert case.plan.function == "changed" and case.plan.changes
    assert case.relative > SEEN


@pytest.mark.parametrize(("kind", "method", "axis"), [case for case in CASES if case not in DECLARED])
def test_what_a_method_does_not_grow_it_refuses(kind: str, method: str, axis: str) -> None:
    request, kinds = REQUESTS[kind][axis]
    with pytest.raises(RequestError) as caught:
        gf.plan(stock(kind), method=method, **request)
    said = str(caught.value)
    if (kind, method, axis) in TURNING:
        assert "rotary" in said and "key=paper works" in said
    elif (kind, method, axis) in OLD_VALUES:
        assert "old values" in said and "heads=paper works" in said
    else:
        missing = kinds - set(METHODS[method].ways)
        assert any(f"--method {method},{word}=paper" in said for word in missing), said


@pytest.mark.parametrize("method", METHODS)
def test_the_word_preserving_is_of_all_ways(method: str) -> None:
    ways = METHODS[method].ways
    assert METHODS[method].preserving == all(way.preserving for way in ways.values())
    changing = {kind for kind, way in ways.items() if not way.preserving}
    assert (method in (*STACKED, *LEARNED)) == bool(changing)
    assert method in ("bert2bert-aki", *LEARNED) or changing <= {"layer"}


@pytest.mark.parametrize(("method", "layers"), STACKED.items())
def test_another_function_must_be_asked_for(method: str, layers: int) -> None:
    with pytest.raises(RequestError, match=r"the function changes.*allow_change=True"):
        gf.expand(stock("llama"), method=method, num_hidden_layers=layers)
    case = grow("llama", method, num_hidden_layers=layers)
    other = gf.expand(stock("llama"), method=method, num_hidden_layers=layers, allow_change=True)
    assert all(torch.equal(other.state_dict()[name], x) for name, x in case.after.tensors.items())


def test_in_a_live_run_too() -> None:
    model = copy.deepcopy(stock("llama"))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    for method, request in (("stack", {"num_hidden_layers": 6}), ("bert2bert-aki", {"intermediate_size": 40})):
        with pytest.raises(RequestError, match=r"the function changes.*allow_change=True"):
            gf.grow(model, optimizer, method=method, **request)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    gf.grow(model, optimizer, method="bert2bert-aki", intermediate_size=40, allow_change=True)
    assert model.config.intermediate_size == 40


def test_whole_layers_again_in_a_live_run() -> None:
    model = copy.deepcopy(stock("llama"))
    optimizer = torch.optim.AdamW(model.parameters())
    again = gf.expand(model, method="stack", num_hidden_layers=6, allow_change=True)
    gf.grow(model, optimizer, method="stack", num_hidden_layers=6, allow_change=True)
    assert model.config.num_hidden_layers == 6 and len(set(map(id, model.parameters()))) == 3 + 6 * 9
    theirs = again.state_dict()
    assert all(torch.equal(x, theirs[name]) for name, x in model.state_dict().items())
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def test_in_a_recipe_too(tmp_path: Path) -> None:
    entry = {"at": {"step": 2}, "to": {"intermediate_size": 30}, "method": "bert2bert-aki"}
    with pytest.raises(RequestError, match=r"the function changes.*allow_change: true"):
        api.train(recipe(tmp_path, grow=[entry], budget={"steps": 3}), tmp_path / "out")
    api.train(recipe(tmp_path, grow=[{**entry, "allow_change": True}], budget={"steps": 3}), tmp_path / "done")
    assert (tmp_path / "done").is_dir()


def test_folders_say_by_how_much(tmp_path: Path) -> None:
    src = save(tmp_path / "src", "llama")
    with pytest.raises(RequestError, match=r"the function changes"):
        api.expand_checkpoint(src, tmp_path / "out", method="stack", num_hidden_layers=6)
    assert not (tmp_path / "out").exists()
    made = api.expand_checkpoint(src, tmp_path / "out", method="stack", num_hidden_layers=6, allow_change=True)
    assert made.proof.exit_code == 0
    claim = next(c for c in made.proof.claims if c.name == "changed")
    assert claim.told and not claim.required and "nats" in claim.found
    measured = made.proof.measured["changed"]
    assert measured["relative"] > SEEN and measured["loss_before"] != measured["loss_after"]
    again = api.verify(src, tmp_path / "out")
    assert again.exit_code == 0 and again.measured["changed"] == measured


def test_a_preserving_method_is_proved_and_not_measured(tmp_path: Path) -> None:
    src = save(tmp_path / "src", "llama")
    made = api.expand_checkpoint(src, tmp_path / "out", method="lemon", intermediate_size=40, prove_level="structure")
    assert "changed" not in {c.name for c in made.proof.claims} and made.proof.exit_code == 0


# --- the reference Transformer, whose every axis stands apart --------------------------------------------------------

RAGGED = ReferenceConfig(
    vocab=23,
    positions=5,
    hidden=12,
    layers=(LayerSize(17, (HeadSize(3, 7), HeadSize(6, 2))), LayerSize(10, (HeadSize(8, 1),))),
    eps=0.03,
    final_norm=True,
)
EXPANSIONS: dict[str, tuple[Kind, Expansion]] = {
    "mlp": ("mlp", MLPExpansion(40)),
    "mlp of one layer": ("mlp", MLPExpansion(13, layers=[1])),
    "heads": ("heads", HeadAddition(2)),
    "value": ("value", HeadsExpansion(16)),
    "value of one head": ("value", HeadsExpansion(10, layers=[0], heads=[1])),
    "key": ("key", AttentionExpansion(15)),
    "hidden": ("hidden", HiddenExpansion(24)),
    "hidden x 3": ("hidden", HiddenExpansion(36)),
    "layers": ("layer", LayerAddition(2)),
}
NO_PAIRS = {("twins", "heads"), ("twins", "layers")}
REFERENCE_CASES = [
    (method, name)
    for method in METHODS
    for name, (kind, _) in EXPANSIONS.items()
    if kind in METHODS[method].ways and METHODS[method].ways[kind].preserving
    if METHODS[method].ways[kind].fill != "gradient"
]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize(("method", "name"), [case for case in REFERENCE_CASES if case not in NO_PAIRS])
def test_the_reference_computes_the_same(method: str, name: str, activation: str) -> None:
    config = ReferenceConfig(**{**vars(RAGGED), "activation": activation})
    model = randomise(ReferenceTransformer(config), 1)
    larger = expand_reference(REFERENCE, METHODS[method], model, EXPANSIONS[name][1])
    ids = torch.randint(config.vocab, (4, config.positions), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before, after = model(ids), larger(ids)
    assert sum(x.numel() for x in larger.parameters()) > sum(x.numel() for x in model.parameters())
    assert float((before - after).abs().max() / before.abs().max()) <= BAR


@pytest.mark.parametrize(
    ("method", "name", "said"),
    [
        ("twins", "heads", "no pairs"),
        ("twins", "layers", "no pairs"),
        ("twins", "hidden", "twins .* does not grow hidden; it grows mlp"),
        ("lemon", "key", "lemon .* does not grow key"),
        ("hyperclone", "layers", "hyperclone .* does not grow layer"),
        ("stack", "layers", "stack .* whole layers again"),
        ("gradmax", "mlp", "gradmax .* takes what new mlp holds from passes through a stock model's modules"),
        ("ligo", "hidden", "ligo .* takes what new hidden holds from passes"),
        ("ligo", "layers", "ligo .* takes what new layer holds from passes"),
    ],
)
def test_the_reference_refuses_the_rest(method: str, name: str, said: str) -> None:
    model = randomise(ReferenceTransformer(RAGGED), 1)
    with pytest.raises(RequestError, match=said):
        expand_reference(REFERENCE, METHODS[method], model, EXPANSIONS[name][1])


def test_the_reference_copies_whole_streams_only() -> None:
    model = randomise(ReferenceTransformer(RAGGED), 1)
    with pytest.raises(RequestError, match=r"only whole copies of its 12 channels.*hidden=24 is the next"):
        expand_reference(REFERENCE, METHODS["net2net"], model, HiddenExpansion(19))


def test_control_an_entry_that_is_off_is_seen() -> None:
    case = grow("llama", "lemon", intermediate_size=41)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = dict(case.after.tensors)
    tensors[name] = tensors[name].clone()
    tensors[name][0, 30] *= 2
    broken = type(case.after)(case.after.config, tensors)
    assert type(case)(case.plan, case.before, broken).relative > BAR >= case.relative


def test_preserving_follows_the_ways() -> None:
    assert preserving("llama", "bert2bert", "mlp") and not preserving("llama", "bert2bert", "layers")
