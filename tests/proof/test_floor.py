"""Permuted variants of the source: the same function where patterns are right, and found out where they are not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from growformer.algebra import Attention, Family, Field, Norm, Tied, replace
from growformer.checkpoint.stock import full_config
from growformer.families import FAMILIES
from growformer.planning import Plan
from growformer.proof.bar import BAR
from growformer.proof.case import Case
from growformer.proof.claim_runtime import movable
from growformer.proof.difference import compare_outputs, worst
from growformer.proof.float64 import build64_from
from growformer.proof.floor import Layout, in_order, orders, permuted
from growformer.proof.functional import outputs64
from growformer.proof.inputs import probe_inputs
from tests.proof.every_model import save

SIZES = {"hidden": 3, "mlp": 2, "heads": 2, "key": 2, "experts": 2, "transform": 3, "pooled": 3, "vocab": 5}


def family(**tensors: str) -> Family:
    return Family(
        name="sketch",
        model_types=("sketch",),
        architectures=(),
        axes={axis: Field(axis) for axis in SIZES},
        tensors=tensors,
        norms={"pre": Norm("hidden", "rms", "eps")},
        attention=Attention(value="key"),
    )


def layout(given: Family, **shapes: tuple[int, ...]) -> Layout:
    return Layout(given, SIZES, shapes)


def test_products_concatenations_and_slabs_move_as_their_axes_do() -> None:
    given = family(
        a="[experts] hidden -> (mlp (gate: 1 | up: 1))", b="(q: heads key | hidden) <- mlp", c="_ <- hidden", d=".",
    )  # fmt: skip
    shapes = {"a": (2, 3, 4), "b": (7, 2), "c": (4, 3), "d": ()}
    source = {name: torch.arange(float(torch.Size(shape).numel())).view(shape) for name, shape in shapes.items()}
    order = {"hidden": torch.tensor([2, 0, 1]), "mlp": torch.tensor([1, 0])}
    (moved,) = permuted(layout(given, **shapes), source, [order])
    assert torch.equal(moved["a"], source["a"][:, [2, 0, 1]][:, :, [2, 3, 0, 1]])
    assert torch.equal(moved["b"], source["b"][[0, 1, 2, 3, 6, 4, 5]][:, [1, 0]])
    assert torch.equal(moved["c"], source["c"][:, [2, 0, 1]]) and torch.equal(moved["d"], source["d"])


def groups(given: Family, **shapes: tuple[int, ...]) -> list[tuple[str, ...]]:
    return layout(given, **shapes).groups()


BLOCK = {"in_": "vocab -> hidden", "up": "mlp <- hidden", "down": "hidden <- mlp", "q": "(heads key) <- hidden"}
SHAPES: dict[str, tuple[int, ...]] = {"in_": (5, 3), "up": (2, 3), "down": (3, 2), "q": (4, 3)}


def test_axes_that_mean_something_by_their_order_stay() -> None:
    assert groups(family(**BLOCK), **SHAPES) == [("hidden",), ("mlp",)]
    # Nobody reads pooled: it is an output. With a classifier on it, it is inside the model.
    pooler = BLOCK | {"pool": "pooled <- hidden"}
    shapes = SHAPES | {"pool": (3, 3)}
    assert groups(family(**pooler), **shapes) == [("hidden",), ("mlp",)]
    classifier = family(**pooler, out="2 <- pooled")
    assert groups(classifier, **shapes, out=(2, 3)) == [("hidden",), ("mlp",), ("pooled",)]
    # Layers of another width than the config says.
    assert groups(family(**BLOCK), **SHAPES | {"up": (4, 3), "down": (3, 4)}) == [("hidden",)]


def test_axes_that_one_stored_tensor_stands_for_move_together() -> None:
    tied = Tied("head", "in_", "pre")
    given = replace(family(**BLOCK, change="transform <- hidden", head="vocab <- transform"), tied=tied)
    shapes = SHAPES | {"change": (3, 3)}
    assert groups(given, **shapes, head=(5, 3)) == [("hidden",), ("mlp",), ("transform",)]
    assert groups(given, **shapes) == [("hidden", "transform"), ("mlp",)]
    drawn = orders(layout(given, **shapes), groups(given, **shapes))
    assert len(drawn) == 8 and all(order["hidden"] is order["transform"] for order in drawn)


def case(given: Family, folder: Path) -> Case:
    import json

    raw = json.loads((folder / "config.json").read_text())
    plan = Plan(given.name, "paper", 0, {}, (), raw, raw, ())
    return Case(given, plan, folder, folder, full_config(raw)[0], raw)


@pytest.mark.parametrize("name", ["llama", "llama-base", "qwen3", "gpt2"])
def test_a_permuted_model_is_the_same_function_in_float64(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    of = case(FAMILIES[name.partition("-")[0]], folder)
    source = load_file(folder / "model.safetensors")
    inputs = probe_inputs(folder, 2, 12, 0).batches
    found, axes = movable(of, source, inputs)
    assert axes == [("hidden",), ("mlp",)]
    draws = orders(found, axes, 1)
    (moved,) = permuted(found, source, draws)
    assert all(not torch.equal(moved[key], x) for key, x in source.items() if "mlp" in key and x.dim() == 2)
    base, other = (outputs64(lambda x=x: build64_from(of.plan.source_config, x), inputs) for x in (source, moved))
    assert worst(compare_outputs(base, in_order(base, other, draws[0]))).relative <= BAR
    if name == "llama-base":  # hidden states come out permuted, and are put back
        assert worst(compare_outputs(base, other)).relative > BAR


def test_a_wrong_pattern_is_no_floor_and_takes_its_axis_out(tmp_path: Path) -> None:
    """Left in, it would make the floor as high as any change of the function."""
    folder = save("llama", tmp_path)
    source = load_file(folder / "model.safetensors")
    inputs = probe_inputs(folder, 2, 12, 0).batches
    right = FAMILIES["llama"]
    down = "model.layers.{layer}.mlp.down_proj.weight"
    wrong = replace(right, tensors={**right.tensors, down: "hidden <- 28"})
    assert movable(case(right, folder), source, inputs)[1] == [("hidden",), ("mlp",)]
    given = case(wrong, folder)
    assert Layout(wrong, given.source_full, {k: tuple(x.shape) for k, x in source.items()}).groups() == [("hidden",)]
    bias = "model.layers.{layer}.mlp.up_proj.bias"
    wrong = replace(right, tensors={**right.tensors, bias: "-> 28"})
    assert movable(case(wrong, folder), source, inputs)[1] == [("hidden",)]


def test_an_output_is_put_back_only_if_it_was_permuted() -> None:
    order = {"hidden": torch.tensor([2, 0, 3, 1])}
    base = {"state": torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), "logits": torch.randn(5, 4)}
    found = {"state": base["state"][:, order["hidden"]], "logits": base["logits"]}
    assert worst(compare_outputs(base, in_order(base, found, order))).max_abs == 0
    found["logits"] = base["logits"].flip(1)
    assert compare_outputs(base, in_order(base, found, order))["logits"].max_abs > 0
