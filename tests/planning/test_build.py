"""Which tensors a checkpoint must have, and the plan of each: layers, experts, heads, what is left behind."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from growformer.algebra import Attention, Experts, Family, Norm, Rotary, Tied, replace
from growformer.errors import PatternError, RequestError
from growformer.planning.cover import idle_rows
from tests.planning.tiny_families import Grown, close, family, grow, plan_of, random_source

CONFIG: dict[str, Any] = {
    "vocab_size": 5,
    "hidden_size": 4,
    "mlp_size": 6,
    "layer_size": 3,
    "eps": 0.1,
    "architectures": ["TinyForCausalLM"],
}
MODEL = family(
    ("vocab", "hidden", "mlp", "layer"),
    {
        "model.embed": "vocab -> hidden",
        "model.layers.{layer}.norm": "pre: * hidden",
        "model.layers.{layer}.norm.bias": "pre: + hidden",
        "model.layers.{layer}.up": "mlp <- hidden",
        "model.layers.{layer}.up.bias": "-> mlp",
        "model.layers.{layer}.down": "hidden <- mlp",
        "model.layers.{layer}.down.bias": "-> hidden",
        "model.norm": "final: * hidden",
        "head": "vocab <- hidden",
    },
    {role: Norm("hidden", "rms", eps="eps") for role in ("pre", "final")},
    tied=Tied("head", "model.embed", norm="final", field="tie"),
    tasks={"score": "_ <- hidden", "score.bias": "-> _"},
    prefix="model.",
    drop=("model.layers.{layer}.inv_freq", "model.mask"),
    neutral=("architectures",),
)
WIDER = {"hidden_size": 7}


def source_of(model: Family = MODEL, config: dict[str, Any] = CONFIG) -> dict[str, torch.Tensor]:
    return random_source(model, config)


def refused(shapes: dict[str, torch.Tensor], model: Family = MODEL, **config: Any) -> str:
    with pytest.raises(PatternError) as raised:
        plan_of(model, {**CONFIG, **config}, shapes, WIDER)
    return str(raised.value)


# --- coverage --------------------------------------------------------------------------------------------------------


def test_a_whole_checkpoint() -> None:
    plan = plan_of(MODEL, CONFIG, source_of(), WIDER)
    assert [t.name for t in plan.tensors][:5] == [
        "model.embed",
        *(f"model.layers.0.{name}" for name in ("norm", "norm.bias", "up", "up.bias")),
    ]
    assert set(plan.by_name) == set(source_of())
    assert plan.by_name["score"].shape == (3, 7) and plan.by_name["score"].source_shape == (3, 4)


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("model.layers.1.up", "tensor 'model.layers.1.up' is missing from the checkpoint (1 such tensors)"),
        ("model.norm", "'model.norm' is missing"),
        ("score", None),  # the heads of tasks come and go
        ("score.bias", None),
    ],
)
def test_a_missing_tensor(without: str, said: str | None) -> None:
    shapes = {name: tensor for name, tensor in source_of().items() if name != without}
    if said is None:
        assert without not in plan_of(MODEL, CONFIG, shapes, WIDER).by_name
    else:
        assert said in refused(shapes)


def test_other_tensors() -> None:
    source = source_of()
    assert "no pattern covers it" in refused({**source, "model.extra": torch.zeros(4)})
    assert "'model.layers.3.up' is beyond what config.json says" in refused(
        {**source, "model.layers.3.up": source["model.layers.0.up"]}
    )
    said = refused({**source, "model.layers.0.up": torch.zeros(6, 5)})
    assert "has shape [6, 5]" in said and "with mlp=6, hidden=4 from config.json gives [6, 4]" in said
    assert "has shape [3, 5], but its pattern '_ <- hidden' with hidden=4 from config.json gives ['_', 4]" in refused(
        {**source, "score": torch.zeros(3, 5)}
    )
    assert "has shape [3]" in refused({**source, "score": torch.zeros(3)})


def test_what_is_left_behind() -> None:
    old = {"model.layers.1.inv_freq": torch.zeros(2), "model.mask": torch.zeros(3, 3)}
    plan = plan_of(MODEL, CONFIG, {**source_of(), **old}, WIDER)
    assert plan.dropped == tuple(old) and not set(old) & set(plan.by_name)


def test_a_bare_backbone_leaves_the_prefix_out() -> None:
    source = {name.removeprefix("model."): tensor for name, tensor in source_of().items() if name != "head"}
    plan = plan_of(MODEL, CONFIG, {**source, "mask": torch.zeros(3)}, {**WIDER, "layer_size": 4})
    assert set(plan.by_name) == {*source, *(f"layers.3.{n}" for n in ("norm", "norm.bias", "up", "up.bias"))} | {
        "layers.3.down",
        "layers.3.down.bias",
    }
    assert plan.dropped == ("mask",)


@pytest.mark.parametrize(("value", "stored"), [(True, True), (False, False), (True, False), (False, True)])
def test_tensors_that_a_config_switches_on(value: bool, stored: bool) -> None:
    name = "model.layers.{layer}.up.bias"
    model = replace(MODEL, optional={name: "part.bias"})
    source = {k: v for k, v in source_of().items() if stored or not k.endswith("up.bias")}
    if value == stored:
        assert (
            "model.layers.0.up.bias" in plan_of(model, {**CONFIG, "part": {"bias": value}}, source, WIDER).by_name
        ) is (stored)
    else:
        assert (
            f"part.bias={value}, and the checkpoint has {'none' if value else 'some'} of the tensors {name}"
            in refused(source, model, part={"bias": value})
        )


# --- heads -----------------------------------------------------------------------------------------------------------


def test_a_head_is_its_own_tied_or_not_there() -> None:
    source = source_of()
    without = {name: tensor for name, tensor in source.items() if name != "head"}
    own = plan_of(MODEL, {**CONFIG, "tie": False}, source, WIDER)
    assert "head" in own.by_name and own.dropped == ()
    stored_twice = plan_of(MODEL, {**CONFIG, "tie": True}, source, WIDER)
    assert stored_twice.dropped == ("head",) and "head" not in stored_twice.by_name
    assert any("stored beside the tied embedding" in note for note in stored_twice.notes)
    tied = plan_of(MODEL, {**CONFIG, "tie": True}, without, WIDER)
    assert tied.dropped == () and not tied.notes
    # A tied head asks less of the last norm's gain than one of its own; so does a model without one.
    headless = plan_of(MODEL, {**CONFIG, "architectures": ["TinyModel"], "tie": True}, without, WIDER)
    factors = [str(plan.by_name["model.norm"].factors[0]) for plan in (own, tied, headless)]
    assert factors == ["sqrt(4/7)", "sqrt(4/7)", "sqrt(4/7)"]


def test_the_last_norm_of_a_tied_head_knows_the_stream_s_scale() -> None:
    model = replace(MODEL, norms={role: Norm("hidden", "rms", eps=1e-6) for role in ("pre", "final")})
    without = {name: tensor for name, tensor in source_of().items() if name != "head"}
    base: dict[str, Any] = {**CONFIG, "tie": True}
    found = {
        arch: str(plan_of(model, {**base, "architectures": [arch]}, without, WIDER).by_name["model.norm"].factors[0])
        for arch in ("TinyForCausalLM", "TinyModel")
    }
    assert found == {"TinyForCausalLM": "4/7", "TinyModel": "sqrt(4/7)"}


@pytest.mark.parametrize(("layer", "factor"), [("decoder_layer", ["1", "1", "1/2"]), ("", ["1/2", "1/2", "1/2"])])
def test_a_tied_head_asks_the_norm_it_reads_and_no_other(layer: str, factor: list[str]) -> None:
    """BART: the head reads the last layer's norm, which is one of many with that name."""
    model = family(
        ("vocab", "hidden", "decoder_layer"),
        {"embed": "vocab -> hidden", "{decoder_layer}.out": "out: * hidden", "head": "vocab <- hidden"},
        {"out": Norm("hidden", "layer", eps="eps", output="stream")},
        tied=Tied("head", "embed", norm="out", layer=layer),
        copied={"hidden": "a test says so"},
        layers=("decoder_layer",),
    )
    config = {"vocab_size": 5, "hidden_size": 4, "decoder_layer_size": 3}
    grown = grow(model, config, {"hidden_size": 8}, without=["head"])
    assert [str(grown.plan.by_name[f"{i}.out"].factors[0]) for i in range(3)] == factor


# --- new layers ------------------------------------------------------------------------------------------------------


def layers_grown(model: Family = MODEL, request: dict[str, int] | None = None, **options: Any) -> Grown:
    return grow(model, CONFIG, request or {"layer_size": 5, **WIDER}, layers_at=options.pop("layers_at", [0, 3]))


def test_a_new_layer_is_closed_once() -> None:
    grown = layers_grown()
    target = grown.target
    assert grown.plan.layers == {"layer": (None, 0, 1, None, 2)}
    for layer in (0, 3):
        closed = {
            name
            for name in ("norm", "norm.bias", "up", "up.bias", "down", "down.bias")
            if (target[f"model.layers.{layer}.{name}"] == 0).all()
        }
        assert closed == {"norm.bias", "down", "down.bias"}  # a norm's shifts start at zero; what is inside is free
    assert torch.equal(target["model.layers.4.up"][:, :4], grown.source["model.layers.2.up"])


@pytest.mark.parametrize(("gain", "closed"), [("w", 0.0), ("1+w", -1.0)])
def test_a_new_layer_is_closed_at_the_gain_of_what_is_added(gain: Any, closed: float) -> None:
    tensors = {**MODEL.tensors, "model.layers.{layer}.post": "post: * hidden"}
    norms = {role: Norm("hidden", "rms", eps="eps", gain=gain) for role in ("pre", "final")}
    norms["post"] = Norm("hidden", "rms", eps="eps", gain=gain, output="added")
    grown = layers_grown(replace(MODEL, tensors=tensors, norms=norms))
    target, source = grown.target, grown.source
    assert (target["model.layers.0.post"] == closed).all()
    assert (target["model.layers.0.down"] != 0).any()  # closing it too would cost a training step
    # A free gain starts at the mean of the old ones after their factor, of what the model multiplies by.
    offset = int(gain == "1+w")
    like = source["model.layers.0.norm"]
    fill = (like.mean() + offset) * (4 / 7) ** 0.5 - offset
    assert close(target["model.layers.0.norm"], fill.expand(7))
    assert close(target["model.layers.1.norm"][4:], fill.expand(3))
    assert close(target["model.layers.1.norm"][:4], (like + offset) * (4 / 7) ** 0.5 - offset)
    assert grown.plan.by_name["model.layers.1.norm"].offset == offset


def test_layers_of_several_axes() -> None:
    tensors = {
        f"{side}.{{{axis}}}.{name}": text
        for side, axis in (("enc", "layer"), ("dec", "decoder_layer"))
        for name, text in (("up", "mlp <- hidden"), ("down", "hidden <- mlp"))
    }
    model = family(
        ("hidden", "mlp", "layer", "decoder_layer"),
        {"first": "-> hidden", **tensors, "last": "-> hidden"},
        layers=("layer", "decoder_layer"),
    )
    config = {"hidden_size": 4, "mlp_size": 3, "layer_size": 2, "decoder_layer_size": 3}
    request = {"layer_size": 3, "decoder_layer_size": 4}
    at = {"layer": [1], "decoder_layer": [0]}
    grown = grow(model, config, request, layers_at=at)
    assert grown.plan.layers == {"layer": (0, None, 1), "decoder_layer": (None, 0, 1, 2)}
    assert grown.plan.request["layers_at"] == at
    order = [t.name for t in grown.plan.tensors]
    encoder = [f"enc.{i}.{n}" for i in range(3) for n in ("up", "down")]
    decoder = [f"dec.{i}.{n}" for i in range(4) for n in ("up", "down")]
    assert order == ["first", *encoder, *decoder, "last"]
    assert (grown.target["enc.1.down"] == 0).all() and (grown.target["dec.0.down"] == 0).all()
    assert torch.equal(grown.target["dec.3.up"], grown.source["dec.2.up"])
    with pytest.raises(RequestError, match="layers of layer and decoder_layer are new; name the axis"):
        grow(model, config, request, layers_at=[0])
    with pytest.raises(RequestError, match="no new layer was asked for"):
        grow(model, config, {"layer_size": 3}, layers_at={"decoder_layer": [0]})
    with pytest.raises(RequestError, match="no new layer was asked for"):
        grow(model, config, {"mlp_size": 4}, layers_at=[0])
    alone = grow(model, config, {"decoder_layer_size": 4}, layers_at=[1])
    assert alone.plan.layers == {"layer": (0, 1), "decoder_layer": (0, None, 1, 2)}


def test_settled_layers_stay_first() -> None:
    model = replace(MODEL, settled=2)
    for places in ([0, 3], [1, 4]):
        with pytest.raises(RequestError, match=r"the first 2 layer\(s\) .* place new layers from 2 on"):
            layers_grown(model, layers_at=places)
    assert layers_grown(model, layers_at=[2, 4]).plan.layers == {"layer": (0, 1, None, 2, None)}


DENSE = ["model.layers.{layer}.up", "model.layers.{layer}.down"]
SPARSE = {"model.layers.{layer}.sparse.up": "mlp <- hidden", "model.layers.{layer}.sparse.down": "hidden <- mlp"}


@pytest.mark.parametrize(("at", "sparse"), [([0, 3], {4}), ([2, 3], {4}), ([1, 2], {4}), ([3, 4], {2, 3, 4})])
def test_a_new_layer_has_what_the_layer_it_is_like_has(at: Sequence[int], sparse: set[int]) -> None:
    model = replace(
        MODEL, tensors={**MODEL.tensors, **SPARSE}, uneven=(*DENSE, *SPARSE), per_layer={"sparse_layers": "numbers"}
    )
    # Of the source's three layers, the last is sparse.
    without = [n.format(layer=i) for i in range(3) for n in (DENSE if i == 2 else SPARSE)]
    config = {**CONFIG, "sparse_layers": [2]}
    grown = grow(model, config, {"layer_size": 5}, layers_at=at, without=without)
    for layer in range(5):
        has = {name for name in (*DENSE, *SPARSE) if name.format(layer=layer) in grown.target}
        assert has == set(SPARSE if layer in sparse else DENSE)
    assert set(grown.new["sparse_layers"]) == sparse


def test_literal_names_do_not_move() -> None:
    """T5: one table of positions, which block 0 holds for all."""
    tensors = {"blocks.0.table": "_ -> (q: heads)", "blocks.{layer}.down": "hidden <- mlp"}
    model = family(("hidden", "mlp", "heads", "key", "value", "layer"), tensors, {}, Attention())
    config = dict.fromkeys((f"{a}_size" for a in ("hidden", "mlp", "heads", "key", "value", "layer")), 2)
    grown = grow(model, config, {"layer_size": 3, "heads_size": 3}, layers_at=[0])
    table = grown.target["blocks.0.table"]
    assert torch.equal(table[:, :2], grown.source["blocks.0.table"]) and (table[:, 2:] != 0).all()
    assert (grown.target["blocks.0.down"] == 0).all() and "blocks.1.table" not in grown.target


def test_a_scalar_travels() -> None:
    model = family(("hidden",), {"scale": ".", "bias": "-> hidden"})
    grown = grow(model, {"hidden_size": 3}, {"hidden_size": 5})
    assert grown.target["scale"].shape == () and torch.equal(grown.target["scale"], grown.source["scale"])


# --- experts in names ------------------------------------------------------------------------------------------------


def test_experts_of_new_layers_are_all_there() -> None:
    tensors = {"{layer}.{experts}.up": "[experts] mlp <- hidden", "{layer}.{experts}.down": "hidden <- [experts] mlp"}
    model = family(("hidden", "mlp", "experts", "layer"), tensors, experts=Experts(chosen="chosen"))
    config = {"hidden_size": 3, "mlp_size": 4, "experts_size": 2, "layer_size": 2, "chosen": 1}
    grown = grow(model, config, {"experts_size": 4, "layer_size": 3, "mlp_size": 5}, layers_at=[1])
    assert set(grown.target) == {f"{i}.{e}.{n}" for i in range(3) for e in range(4) for n in ("up", "down")}
    for e in range(4):
        assert (grown.target[f"1.{e}.down"] == 0).all() and (grown.target[f"1.{e}.up"] != 0).all()
        assert torch.equal(grown.target[f"2.{e}.up"][:4], grown.source[f"1.{e % 2}.up"])
    # New inner units of copies are draws of their own: they are told apart from the first step.
    assert not torch.equal(grown.target["0.0.up"][4:], grown.target["0.2.up"][4:])


# --- no gain ---------------------------------------------------------------------------------------------------------

BARE = family(
    ("vocab", "hidden", "mlp", "layer"),
    {
        "embed": "vocab -> hidden",
        "{layer}.up": "mlp <- hidden",
        "{layer}.down": "hidden <- mlp",
        "head": "vocab <- hidden",
    },
    {"final": Norm("hidden", "layer", eps="eps", gain=None)},
    tied=Tied("head", "embed", norm="final", field="tie"),
    neutral=("architectures", "tie"),
)


@pytest.mark.parametrize(
    ("config", "without", "said"),
    [
        ({"tie": True}, ["head"], "the head shares the embedding's tensor; hidden stays 4 (untied"),
        ({"tie": True}, [], "the head shares the embedding's tensor"),
        ({"architectures": ["TinyModel"]}, ["head"], "there is no head; hidden stays 4"),
    ],
)
def test_without_a_gain_somebody_must_take_the_rescale_back(
    config: dict[str, Any], without: list[str], said: str
) -> None:
    with pytest.raises(RequestError) as raised:
        grow(BARE, {**CONFIG, **config}, WIDER, without=without)
    assert "hidden 4 -> 7 rescales what the last norm gives" in str(raised.value) and said in str(raised.value)
    # Any other axis grows; and with a head of its own, hidden does.
    assert grow(BARE, {**CONFIG, **config}, {"mlp_size": 8, "layer_size": 4}, without=without).new["mlp_size"] == 8
    assert grow(BARE, {**CONFIG, "tie": False}, WIDER).new["hidden_size"] == 7


# --- rows that softmax cannot see ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "norms", "text", "rows"),
    [
        (Attention(), {}, "-> (q: heads key | k: heads key | v: heads value)", [(6, 12)]),
        (Attention(), {}, "-> (heads (q: key | k: key | v: value))", [(3, 6), (13, 16)]),
        (Attention(), {}, "-> (k: heads key)", [(0, 6)]),
        (Attention(), {}, "-> (q: heads key)", []),
        (Attention(), {}, "(k: heads key) <- hidden", []),
        (Attention(rotary=Rotary()), {}, "-> (k: heads key)", []),
        (Attention(), {"k": Norm("key", "rms", eps="eps")}, "-> (k: heads key)", []),
    ],
)
def test_idle_rows(attention: Attention, norms: dict[str, Norm], text: str, rows: list[tuple[int, int]]) -> None:
    model = family(("hidden", "heads", "key", "value"), {"b": text}, norms, attention)
    sizes = {"hidden": 5, "heads": 2, "key": 3, "value": 4}
    assert idle_rows(model, model.find("b")[1], lambda atom: sizes[str(atom.axis)]) == rows
