"""Expansions as data: what they refuse, how they compose, and what they say in the words of config.json."""

import dataclasses
import json
from fractions import Fraction
from typing import Any

import pytest

from growformer.errors import PatternError, RequestError
from growformer.families import FAMILIES
from growformer.families.reference import REFERENCE
from growformer.methods import METHODS
from growformer.models import HeadSize, LayerSize, ReferenceConfig, ReferenceTransformer
from growformer.planning import Plan
from growformer.planning.expansions import (
    AttentionExpansion,
    Composition,
    Expansion,
    HeadAddition,
    HeadsExpansion,
    HiddenExpansion,
    LayerAddition,
    MLPExpansion,
    compose,
)
from growformer.planning.reference_growth import grow_reference, plan_reference
from growformer.planning.sizes import resolve_sizes

PAPER = METHODS["paper"]
CONFIG = ReferenceConfig(
    vocab=7,
    positions=3,
    hidden=6,
    layers=(LayerSize(5, (HeadSize(2, 3), HeadSize(4, 1))), LayerSize(8, (HeadSize(3, 2),))),
    eps=0.01,
    final_norm=True,
)
LLAMA: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}
GPT2: dict[str, Any] = {"vocab_size": 37, "n_positions": 9, "n_embd": 24, "n_inner": None, "n_head": 4, "n_layer": 3}


def grown(*steps: Expansion) -> ReferenceConfig:
    return grow_reference(CONFIG, compose(*steps), PAPER)[0]


def shapes_of(config: ReferenceConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in ReferenceTransformer(config).state_dict().items()}


# --- as data ---------------------------------------------------------------------------------------------------------


def test_expansions_are_values() -> None:
    assert MLPExpansion(9, layers=[0, 1]) == MLPExpansion(9, (0, 1))
    assert hash(LayerAddition(2, at=[0, 3])) == hash(LayerAddition(2, at=(0, 3)))
    assert str(HeadAddition(2, at=[1, 0])) == "HeadAddition(heads=2, at=(1, 0))"
    with pytest.raises(dataclasses.FrozenInstanceError):
        MLPExpansion(9).mlp = 10  # type: ignore[misc]


def test_compose_flattens() -> None:
    a, b, c = MLPExpansion(9), HiddenExpansion(9), LayerAddition(1)
    whole = compose(compose(a), compose(b, compose(c)))
    assert whole == compose(a, b, c) == Composition((a, b, c))
    assert whole.steps == (a, b, c) and a.steps == (a,)
    assert Composition((Composition((a, b)), c)).steps == (a, b, c)
    assert compose(b, a) != compose(a, b)
    with pytest.raises(RequestError, match="of nothing"):
        compose()


def test_plain_data_leaves_out_what_was_not_said() -> None:
    whole = compose(HeadAddition(2, at=[0, 1], key=3), LayerAddition(1, size=LayerSize(4, (HeadSize(1, 2),))))
    data = whole.to_json()
    assert data == [
        {"name": "HeadAddition", "heads": 2, "at": [0, 1], "key": 3},
        {"name": "LayerAddition", "layers": 1, "size": {"mlp": 4, "heads": ({"key": 1, "value": 2},)}},
    ]
    assert json.loads(json.dumps(data))[0] == data[0]


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8"])
def test_sizes_are_whole_numbers(size: Any) -> None:
    for make in (MLPExpansion, HeadAddition, HeadsExpansion, AttentionExpansion, HiddenExpansion, LayerAddition):
        with pytest.raises(RequestError, match="a whole number, 1 or more"):
            make(size)
    with pytest.raises(RequestError, match="HeadAddition: key="):
        HeadAddition(1, key=size)


@pytest.mark.parametrize("indices", [[], [0, 0], [-1], [0.5], [True], 1, ["0"]])
def test_indices_are_different_whole_numbers(indices: Any) -> None:
    with pytest.raises(RequestError, match="MLPExpansion: layers="):
        MLPExpansion(9, layers=indices)
    with pytest.raises(RequestError, match="LayerAddition: at="):
        LayerAddition(1, at=indices)
    with pytest.raises(RequestError, match="AttentionExpansion: heads="):
        AttentionExpansion(9, heads=indices)


# --- on the reference Transformer ------------------------------------------------------------------------------------


def test_sizes_after_a_composition() -> None:
    config = grown(
        LayerAddition(1, at=[0]),  # like the old first layer: 5, (2, 3) (4, 1)
        HeadAddition(1, layers=[2], at=[0], value=7),  # the old last layer: (3, 7) (3, 2)
        AttentionExpansion(5, layers=[0, 1], heads=[1]),
        HeadsExpansion(8, layers=[2]),
        MLPExpansion(9, layers=[0]),
        HiddenExpansion(9),
    )
    assert config.layers == (
        LayerSize(9, (HeadSize(2, 3), HeadSize(5, 1))),
        LayerSize(5, (HeadSize(2, 3), HeadSize(5, 1))),
        LayerSize(8, (HeadSize(3, 8), HeadSize(3, 8))),
    )
    assert (config.hidden, config.eps) == (9, Fraction(0.01) * Fraction(6, 9))
    rest = ("vocab", "positions", "final_norm", "causal", "activation", "tied")
    assert all(getattr(config, name) == getattr(CONFIG, name) for name in rest)


def test_eps_stays_as_written_where_hidden_stays() -> None:
    assert grown(MLPExpansion(9)).eps is CONFIG.eps


def test_growths_are_scoped_in_target_indices() -> None:
    step = compose(LayerAddition(1, at=[0]), HeadAddition(1, layers=[1], at=[1]), AttentionExpansion(6, [1], [2]))
    growth = grow_reference(CONFIG, step, PAPER)[1]
    assert growth.at("layer").sources == [None, 0, 1]
    assert growth.at("head", {"layer": 0}).sources == [None, None]
    assert growth.at("head", {"layer": 1}).sources == [0, None, 1]
    key = growth.at("key", {"layer": 1, "head": 2})
    assert (key.old, key.new, key.scope) == (4, 6, (("layer", 1), ("head", 2)))
    assert (growth.at("key", {"layer": 1, "head": 1}).old, growth.at("mlp", {"layer": 0}).old) == (0, 0)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (MLPExpansion(7), "mlp of layer 1 is 8 already"),
        (HiddenExpansion(5), "hidden is 6 already"),
        (AttentionExpansion(3), "key of layer 0 head 1 is 4 already"),
        (HeadsExpansion(2), "value of layer 0 head 0 is 3 already"),
        (MLPExpansion(9, layers=[2]), "there is no layer 2; the model then has 2"),
        (HeadAddition(1, layers=[5]), "there is no layer 5"),
        (AttentionExpansion(9, heads=[1]), "there is no head 1 in layer 1; it then has 1"),
        (HeadAddition(2, at=[0]), "places [0] should be 2 different numbers from 0 to 3"),
        (HeadAddition(1, at=[2]), "places [2] should be 1 different numbers from 0 to 1"),
        (LayerAddition(1, at=[3]), "places [3] should be 1 different numbers from 0 to 2"),
        (compose(HiddenExpansion(9), HiddenExpansion(8)), "hidden is 9 already"),
    ],
)
def test_what_the_reference_refuses(step: Expansion, said: str) -> None:
    with pytest.raises(RequestError) as raised:
        grow_reference(CONFIG, step, PAPER)
    assert said in str(raised.value)
    assert str(step.steps[-1]) in str(raised.value)


def test_indices_mean_the_model_as_it_is_when_the_expansion_acts() -> None:
    with pytest.raises(RequestError, match="no layer 2"):
        grown(MLPExpansion(9, layers=[2]), LayerAddition(1))
    assert grown(LayerAddition(1), MLPExpansion(9, layers=[2])).layers[2].mlp == 9


def test_a_model_without_layers_gets_none() -> None:
    empty = dataclasses.replace(CONFIG, layers=())
    with pytest.raises(RequestError, match="without layers"):
        grow_reference(empty, LayerAddition(1, size=LayerSize(3, (HeadSize(1, 1),))), PAPER)
    plan, config = plan_reference(REFERENCE, PAPER, empty, HiddenExpansion(8), shapes_of(empty))
    assert config.hidden == 8 and len(plan.tensors) == 4


def test_the_plan_has_exactly_the_grown_model_s_tensors() -> None:
    for switches in ({}, {"activation": "swiglu", "tied": True, "final_norm": False}):
        config = dataclasses.replace(CONFIG, **switches)  # type: ignore[arg-type]
        step = compose(LayerAddition(2), HeadAddition(1), AttentionExpansion(5), HiddenExpansion(9))
        plan, after = plan_reference(REFERENCE, PAPER, config, step, shapes_of(config))
        assert {tensor.name: tensor.shape for tensor in plan.tensors} == shapes_of(after)
        assert ReferenceConfig.from_dict(plan.target_config) == after
        assert ReferenceConfig.from_dict(plan.source_config) == config
        assert plan.layers == {"layer": (0, None, 1, None)}
        assert Plan.from_json(json.loads(plan.dumps())).tensors == plan.tensors


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("norm_final", None, "final_norm=True, and the checkpoint has none"),
        ("w_out", None, "'w_out' is missing"),
        ("layers.0.w_gate", (6, 5), "gated=False, and the checkpoint has some"),
        ("layers.1.heads.0.w_q", None, "is missing"),
        ("layers.0.b1", None, "is missing"),
        ("layers.1.heads.1.w_q", (6, 3), "'layers.1.heads.1.w_q' is beyond"),
        ("layers.2.heads.0.w_q", (6, 3), "'layers.2.heads.0.w_q' is beyond"),
        ("layers.2.w1", (6, 3), "'layers.2.w1' is beyond"),
        ("layers.0.heads.1.w_q", (6, 2), "with hidden=6, key=4"),
        ("layers.0.heads.1.w_x", (6, 2), "no pattern covers it"),
    ],
)
def test_a_config_and_weights_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...] | None, said: str) -> None:
    shapes = shapes_of(CONFIG)
    if shape is None:
        del shapes[name]
    else:
        shapes[name] = shape
    with pytest.raises(PatternError) as raised:
        plan_reference(REFERENCE, PAPER, CONFIG, HiddenExpansion(8), shapes)
    assert said in str(raised.value)


# --- in the words of config.json -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (MLPExpansion(40), {"intermediate_size": 40}),
        (HeadAddition(4), {"num_attention_heads": 8}),
        (HiddenExpansion(36), {"hidden_size": 36}),
        (LayerAddition(4), {"num_hidden_layers": 7}),
        (compose(AttentionExpansion(8), HeadsExpansion(8)), {"head_dim": 8}),
        (
            compose(HeadAddition(2), LayerAddition(1), HeadAddition(2), LayerAddition(2)),
            {"num_attention_heads": 8, "num_hidden_layers": 6},
        ),
        (
            compose(HiddenExpansion(30), MLPExpansion(40), HiddenExpansion(36)),
            {"hidden_size": 36, "intermediate_size": 40},
        ),
    ],
)
def test_fields_of_llama(step: Expansion, wanted: dict[str, int]) -> None:
    fields = step.fields(FAMILIES["llama"], LLAMA)
    assert fields == wanted
    # They are a request that the planner takes.
    assert resolve_sizes(FAMILIES["llama"], LLAMA, fields).fields.items() >= wanted.items()


def test_fields_of_gpt2() -> None:
    step = compose(HeadAddition(2), MLPExpansion(100), LayerAddition(1))
    assert step.fields(FAMILIES["gpt2"], GPT2) == {"n_head": 6, "n_inner": 100, "n_layer": 4}
    with pytest.raises(RequestError, match="n_inner is 96 already"):
        MLPExpansion(90).fields(FAMILIES["gpt2"], GPT2)


@pytest.mark.parametrize(
    ("family", "step", "said"),
    [
        ("llama", MLPExpansion(40, layers=[0]), "layers=(0,) makes layers or heads differ, and llama's config"),
        ("llama", HeadAddition(1, layers=[0]), "one size for all layers"),
        ("llama", HeadAddition(1, at=[0]), "at=(0,)"),
        ("llama", HeadAddition(1, key=8), "key=8"),
        ("llama", compose(AttentionExpansion(8, heads=[1]), HeadsExpansion(8)), "heads=(1,)"),
        ("llama", LayerAddition(1, size=LayerSize(3, (HeadSize(1, 1),))), "size="),
        ("llama", AttentionExpansion(8), "head_dim is key and value in one"),
        ("llama", HeadsExpansion(8), "compose(AttentionExpansion(8), HeadsExpansion(8)) works"),
        ("llama", compose(AttentionExpansion(8), HeadsExpansion(10)), "grow together and to one size"),
        ("llama", HiddenExpansion(20), "hidden_size is 24 already; growing never takes away"),
        ("llama", compose(HiddenExpansion(40), HiddenExpansion(36)), "hidden_size is 40 already"),
        ("gpt2", AttentionExpansion(8), "its head size is n_embd / n_head; grow hidden"),
        ("gpt2", HeadsExpansion(8), "its head size is n_embd / n_head; grow hidden"),
    ],
)
def test_what_a_config_of_one_size_refuses(family: str, step: Expansion, said: str) -> None:
    config = {"llama": LLAMA, "gpt2": GPT2}[family]
    with pytest.raises(RequestError) as raised:
        step.fields(FAMILIES[family], config)
    assert said in str(raised.value)


def test_places_of_new_layers() -> None:
    assert LayerAddition(2).layers_at(3) is None
    assert MLPExpansion(40).layers_at(3) is None
    assert LayerAddition(2, at=[0, 4]).layers_at(3) == (0, 4)
    # The second addition's places count the first one's layer.
    assert compose(LayerAddition(1, at=[0]), MLPExpansion(40), LayerAddition(1, at=[2])).layers_at(3) == (0, 2)
    assert compose(LayerAddition(1), LayerAddition(1, at=[0])).layers_at(3) == (0, 4)
    with pytest.raises(RequestError, match="from 0 to 3"):
        LayerAddition(1, at=[4]).layers_at(3)
