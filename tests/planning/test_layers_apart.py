"""Layers that differ: sizes by type, lenders of keys and values, and what config.json says of single layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from growformer.algebra import Field, Layered, Lends, lookup
from growformer.api import plan
from growformer.api.checks.samples import raw_config, save_tiny
from growformer.checkpoint.stock import full_config, stock_tensors
from growformer.errors import PatternError, RequestError
from growformer.families import FAMILIES
from growformer.methods import METHODS
from growformer.planning import Plan, make_plan
from growformer.planning.config import per_layer
from growformer.planning.resolve import layer_growth, spread
from growformer.planning.sizes import resolve_sizes, size_of

PAPER = METHODS["paper"]
GEMMA4 = FAMILIES["gemma4_text"]
CONFIG: dict[str, Any] = {
    "head_dim": 8,
    "layer_types": ["near", "far", "near", "far"],
    "per_layer_config": {"01": {"head_dim": 12}, "3": {"head_dim": 12}},
}


def grown(request: dict[str, int], changes: dict[str, Any] | None = None, **how: Any) -> Plan:
    raw = raw_config(GEMMA4, "Gemma4ForCausalLM", changes)
    raw |= how.pop("raw", {})
    full, defaults = full_config(raw)
    shapes = stock_tensors(raw)
    family = GEMMA4.of({**full, "architectures": raw["architectures"]})
    return make_plan(family, PAPER, raw, full, defaults, shapes, request, **how)


# --- new layers and those that lend -----------------------------------------------------------------------------------


@given(st.integers(2, 30), st.integers(1, 30), st.data())
def test_no_new_layer_follows_a_barred_one(old: int, extra: int, data: st.DataObject) -> None:
    barred = data.draw(st.sets(st.integers(0, old - 1), max_size=old - 1))
    growth = layer_growth(old, old + extra, None, PAPER.ways["layer"], barred=barred)
    assert [source for source in growth.sources if source is not None] == list(range(old))
    assert growth.sources.count(None) == extra
    assert not {growth.like[i] for i, source in enumerate(growth.sources) if source is None} & barred
    assert spread(old, old + extra, ()) == spread(old, old + extra)


def test_a_new_layer_behind_a_lender_is_refused() -> None:
    with pytest.raises(
        RequestError, match="a new layer at 3 would follow old layer 2, which lends its keys and values"
    ):
        grown({"num_hidden_layers": 7}, layers_at=[3])
    plan = grown({"num_hidden_layers": 8}, layers_at=[0, 7])
    assert plan.target_config["num_kv_shared_layers"] == 3  # the new layer at 7 is like the borrower before it
    types = plan.target_config["layer_types"]
    assert [t[0] for t in types] == list("ssfsfsff") and list(plan.target_config["per_layer_config"]) == list("2467")
    assert "model.layers.7.self_attn.k_proj.weight" not in plan.by_name  # nor has it keys of its own
    assert "model.layers.0.self_attn.k_proj.weight" in plan.by_name
    # Without borrowers there are no lenders.
    assert grown({"num_hidden_layers": 7}, {"num_kv_shared_layers": 0}, layers_at=[3]).layers["layer"][3] is None


def test_lenders_are_the_last_of_their_type_before_the_borrowers() -> None:
    types = ["near", "far", "near", "near", "far"]
    assert Lends("types", "count").lenders({"types": types, "count": 2}) == {1, 2}
    assert Lends("types", "count").lenders({"types": types, "count": 0}) == set()
    assert Lends("types", "count").lenders({}) == set()


# --- what config.json says of single layers ---------------------------------------------------------------------------


def test_counts_and_entries_of_layers_move_with_them() -> None:
    growth = layer_growth(4, 6, [1, 5], PAPER.ways["layer"])  # 0 new 1 2 3 new
    assert per_layer(1, "last", growth) == 2 and per_layer(2, "last", growth) == 3 and per_layer(0, "last", growth) == 0
    assert per_layer(1, "first", growth) == 2
    assert per_layer({"3": "c", "00": "a"}, "keyed", growth) == {"0": "a", "1": "a", "4": "c", "5": "c"}
    wide = layer_growth(4, 12, None, PAPER.ways["layer"])
    assert list(per_layer({"0": "a", "3": "d"}, "keyed", wide)) == ["00", "01", "02", "09", "10", "11"]


def test_the_size_that_layers_of_a_type_have() -> None:
    far, near = Layered("head_dim", "far"), Layered("head_dim", "near")
    assert (size_of(far, CONFIG), size_of(near, CONFIG)) == (12, 8)
    assert size_of(Field("far_dim", default=far), CONFIG) == 12
    assert size_of(Field("far_dim", default=far), {**CONFIG, "far_dim": 16}) == 16
    assert size_of(far, {"head_dim": 8, "layer_types": ["far"], "per_layer_config": {}}) == 8
    with pytest.raises(RequestError, match=r"layers of far head_dims of \[8, 12\]"):
        size_of(far, {**CONFIG, "per_layer_config": {"1": {"head_dim": 12}}})


def test_sizes_are_written_for_every_layer_of_the_type() -> None:
    both = grown({"head_dim": 20, "global_head_dim": 28, "num_hidden_layers": 7}).target_config
    assert both["head_dim"] == 20 and both["global_head_dim"] == 28
    assert both["per_layer_config"] == {i: {"head_dim": 28} for i in "1356"}
    # Where all layers had one size, the others keep it by their own entry.
    one = grown({"head_dim": 20}, {"global_head_dim": 10})
    assert one.target_config["per_layer_config"] == {i: {"head_dim": 10} for i in "135"}
    assert any("global_head_dim is written as 10" in said for said in one.moved)


def test_what_no_size_of_the_family_is_is_refused() -> None:
    # It is one where keys are the values as well, and the others follow the common field.
    own = {i: {"head_dim": 14, "num_key_value_heads": 1} for i in "135"}
    with pytest.raises(RequestError, match=r"gives layer 1 a num_key_value_heads of its own \(1\), which no fact"):
        grown({"hidden_size": 36}, {"per_layer_config": own})


def test_frequencies_of_one_type_alone_move() -> None:
    ropes = grown({"global_head_dim": 28}).target_config["rope_parameters"]
    assert ropes["sliding_attention"] == {"rope_type": "default", "rope_theta": 100.0}
    assert ropes["full_attention"]["rope_theta"] == 1000.0**2
    fraction = ropes["full_attention"]["partial_rotary_factor"]
    assert int(fraction * 28 // 2) == 3 == int(0.5 * 14 // 2)  # as many pairs as before


def test_a_type_without_frequencies_is_refused() -> None:
    full = full_config(raw_config(GEMMA4, "Gemma4ForCausalLM"))[0]
    flat = {**full, "rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}
    assert resolve_sizes(GEMMA4.of(full), full, {"head_dim": 20}).new["key"] == 20
    with pytest.raises(RequestError, match="rope_parameters has no set for sliding_attention"):
        resolve_sizes(GEMMA4.of(flat), flat, {"head_dim": 20})


def test_embeddings_of_each_layer_cannot_widen() -> None:
    with pytest.raises(RequestError, match="hidden_size_per_layer_input 6 -> 12: a norm over it stands before one"):
        grown({"hidden_size_per_layer_input": 12})


def test_keys_of_borrowers_in_the_files_are_left_behind(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_tiny(GEMMA4, "Gemma4ForCausalLM", tmp_path / "model")
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    names = [f"model.layers.4.self_attn.{n}.weight" for n in ("k_proj", "v_proj", "k_norm")]
    save_file(tensors | {n: tensors[n.replace(".4.", ".2.")].clone() for n in names}, path, metadata={"format": "pt"})
    assert sorted(plan(folder, intermediate_size=30).dropped) == sorted(names)
    # The control: what is none of these is unknown.
    odd = {"model.layers.4.self_attn.x": torch.ones(10, dtype=torch.float64)}
    save_file(tensors | odd, path, metadata={"format": "pt"})
    with pytest.raises(PatternError, match=r"layers\.4\.self_attn\.x'?: no pattern covers it"):
        plan(folder, intermediate_size=30)


def test_kinds_of_layers_are_the_config_s() -> None:
    raw = raw_config(GEMMA4, "Gemma4ForCausalLM")
    family = GEMMA4.of(full_config(raw)[0])
    assert family.placed["full"] == {1, 3, 5} and family.placed["own_sliding"] == {0, 2}
    assert family.placed["borrowing"] == {4, 5} and family.lenders == {2, 3}
    assert family.find("model.layers.1.self_attn.q_proj.weight")[1].text.startswith("(full_q")
    assert family.find("model.layers.2.self_attn.q_proj.weight")[1].text.startswith("(q:")
    assert lookup(raw, "per_layer_config") == {i: {"head_dim": 14} for i in "135"}
