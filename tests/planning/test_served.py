"""What a family cannot do: frozen axes, and depth where the stream itself is normed."""

from typing import Any

import pytest

from growformer.algebra import Attention, Family, Frozen, Norm, replace
from growformer.errors import RequestError
from growformer.planning.served import check_served
from growformer.planning.sizes import resolve_sizes
from tests.planning.tiny_families import family

AXES = ("hidden", "mlp", "heads", "key", "value", "layer", "decoder_layer")
CONFIG = {f"{axis}_size": 4 for axis in AXES}
NORMS = {"pre": Norm("hidden", "rms", eps="eps"), "embed": Norm("hidden", "rms", eps="eps", output="stream")}
TENSORS = {"embed": "embed: * hidden", "{layer}.pre": "pre: * hidden", "{decoder_layer}.pre": "pre: * hidden"}
LAYERS = ("layer", "decoder_layer")
MODEL = family(AXES, TENSORS, NORMS, Attention(), layers=LAYERS)


def check(model: Family, full: dict[str, Any] | None = None, **request: int) -> None:
    config = {**CONFIG, **(full or {})}
    check_served(model, config, resolve_sizes(model, config, request))


def refused(model: Family, full: dict[str, Any] | None = None, **request: int) -> str:
    with pytest.raises(RequestError) as raised:
        check(model, full, **request)
    return str(raised.value)


def test_frozen_for_ever() -> None:
    model = replace(MODEL, frozen=(Frozen(("key", "mlp"), "it cannot be told apart"),))
    assert refused(model, mlp_size=5) == "mlp_size 4 -> 5: it cannot be told apart; it stays 4"
    assert refused(model, hidden_size=5, key_size=6) == "key_size 4 -> 6: it cannot be told apart; it stays 4"
    check(model, hidden_size=5, value_size=7)


def test_frozen_unless() -> None:
    model = replace(MODEL, frozen=(Frozen(("key",), "keys are clipped", unless={"clip": None, "part.mode": "x"}),))
    check(model, {"clip": None, "part": {"mode": "x"}}, key_size=5)
    odd = {"clip": 3, "part": {"mode": "y"}}
    assert refused(model, odd, key_size=5) == (
        "key_size 4 -> 5: keys are clipped (config.json: clip=3, part.mode='y'); it stays 4"
    )
    assert refused(model, {"clip": None}, key_size=5).endswith("(config.json: part.mode=None); it stays 4")
    check(model, odd, mlp_size=5)


def test_a_size_without_a_field_is_named_by_its_axis() -> None:
    from growformer.algebra import Ratio

    axes = {**MODEL.axes, "key": Ratio("hidden_size", "heads_size")}
    model = replace(MODEL, axes=axes, frozen=(Frozen(("key",), "no"),))
    assert refused(model, hidden_size=8).startswith("the key size 1 -> 2: no")


def test_depth_where_each_layer_ends_in_a_norm_on_the_stream() -> None:
    tensors = {**TENSORS, "{decoder_layer}.out": "out: * hidden"}
    norms = {**NORMS, "out": Norm("hidden", "layer", eps="other", output="stream")}
    model = replace(MODEL, tensors=tensors, norms=norms)
    message = refused(model, decoder_layer_size=5)
    assert message.startswith("decoder_layer_size 4 -> 5: tiny normalises the stream itself in each layer")
    assert message.endswith("it stays 4")
    fed = {**norms, "out": replace(norms["out"], feeds="decoder_layer")}
    check(replace(model, norms=fed), {"other": 1e-5}, decoder_layer_size=5)
    check(model, layer_size=5)  # the encoder's layers have none
    check(model, hidden_size=5)
    check(MODEL, decoder_layer_size=5)  # an embedding norm stands in no layer


def test_a_norm_over_the_values_of_all_heads_has_no_recipe() -> None:
    norms = {**NORMS, "sub": Norm(("heads", "value"), "rms", eps="other")}
    model = replace(MODEL, tensors={**TENSORS, "{layer}.sub": "sub: * (heads value)"}, norms=norms)
    message = refused(model, value_size=5)
    assert message.startswith("value_size 4 -> 5: the norm sub reads heads and value together") and "stays 4" in message
    assert refused(model, heads_size=5).startswith("heads_size 4 -> 5: the norm sub")
    check(model, mlp_size=5, hidden_size=6)
    # The control: over the queries of all heads it has one.
    queries = {**NORMS, "q": Norm(("heads", "key"), "rms", eps="other")}
    check(replace(MODEL, norms=queries), heads_size=5)
