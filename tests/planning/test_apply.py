"""Running a plan: pieces, shares, gains stored as 1+w, and the way back."""

import dataclasses
import itertools
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from growformer.algebra import HALVES, Attention, Experts, Factor, Family, Fill, Lift, Norm, Power, Run, Tied, shared
from growformer.planning import Applier, Plan, TensorPlan, apply, pull_back
from tests.planning.tiny_families import Grown, close, family, grow

AXES = ("vocab", "hidden", "mlp", "experts", "heads", "key", "value", "layer")
SIZES = {"vocab": 5, "hidden": 4, "mlp": 6, "experts": 2, "heads": 2, "key": 3, "value": 2, "layer": 2}
CONFIG: dict[str, Any] = {f"{axis}_size": size for axis, size in SIZES.items()} | {"chosen": 1}
TENSORS = {
    "embed": "vocab -> (embed: hidden)",
    "{layer}.norm": "pre: * hidden",
    "{layer}.norm.bias": "pre: + hidden",
    "{layer}.qkv": "(heads (q: key | k: key | v: value)) <- hidden",
    "{layer}.q.gain": "q: * key",
    "{layer}.k.gain": "k: * key",
    "{layer}.o": "hidden <- (heads value)",
    "{layer}.router": "experts <- hidden",
    "{layer}.up": "[experts] hidden -> mlp",
    "{layer}.down": "[experts] mlp -> hidden",
    "{layer}.{experts}.out": "hidden <- [experts] mlp",
    "head": "vocab <- hidden",
    "table": "_ -> (q: heads)",
}
REQUEST = {
    "vocab_size": 8,
    "mlp_size": 7,
    "experts_size": 6,
    "heads_size": 3,
    "key_size": 7,
    "value_size": 3,
    "layer_size": 3,
}


def model(kind: Any = "rms", gain: Any = "w", copied: bool = False) -> Family:
    norms = {
        "pre": Norm("hidden", kind, eps="eps", gain=gain),
        "q": Norm("key", "rms", eps="other", gain=gain),
        "k": Norm("key", "rms", eps="other", gain=gain),
    }
    return family(
        AXES,
        TENSORS,
        norms,
        Attention(),
        experts=Experts(chosen="chosen"),
        tied=Tied("head", "embed", norm="none"),
        powers={"embed": Power("hidden", Fraction(1, 2))},
        copied={"hidden": "a test says so"} if copied else {},
    )


def grown(kind: str = "rms", gain: str = "w", copied: bool = False, seed: int = 0) -> Grown:
    request = {**REQUEST, "hidden_size": 12 if copied else 7}
    return grow(model(kind, gain, copied), {**CONFIG, "other": 0.1}, request, seed=seed)


KINDS = {
    "rms": {},
    "layer": {"kind": "layer"},
    "1+w": {"gain": "1+w"},
    "copies": {"copied": True},
    "layer, copies, 1+w": {"kind": "layer", "copied": True, "gain": "1+w"},
}


def applier(grown: Grown, dtype: torch.dtype | None = None) -> Applier:
    def read(name: str, rows: slice | None) -> Tensor:
        return grown.source[name] if rows is None else grown.source[name][rows]

    return Applier(grown.plan, read, dtype)


@pytest.mark.parametrize("name", KINDS)
def test_pieces_are_the_whole_in_parts(name: str) -> None:
    """Of one row or of many: shares and draws know where an entry is, not what it was asked for with."""
    made = grown(**KINDS[name])  # type: ignore[arg-type]
    one = applier(made)
    for tensor in made.plan.tensors:
        edges = sorted({0, 1, tensor.shape[0] // 2, tensor.shape[0]})
        parts = [one.piece(tensor, a, b) for a, b in itertools.pairwise(edges)]
        assert torch.equal(torch.cat(parts), made.target[tensor.name]), tensor.name


@pytest.mark.parametrize("name", KINDS)
def test_the_way_back(name: str) -> None:
    made = grown(**KINDS[name])  # type: ignore[arg-type]
    back = pull_back(made.plan, made.target)
    assert set(back) == set(made.source)
    for tensor, source in made.source.items():
        assert close(back[tensor], source)
    # The control: what is pulled back is of the target.
    moved = {name: tensor + 0.01 for name, tensor in made.target.items()}
    assert not close(pull_back(made.plan, moved)["embed"], made.source["embed"])


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_on_paper_makes_the_same(name: str) -> None:
    made = grown(**KINDS[name])  # type: ignore[arg-type]
    again = apply(Plan.from_json(made.plan.to_json()), made.source)
    assert all(torch.equal(again[tensor], made.target[tensor]) for tensor in made.target)
    assert Plan.from_json(made.plan.to_json()) == dataclasses.replace(made.plan, layers={"layer": [0, 1, None]})


def test_another_seed_shares_and_draws_otherwise() -> None:
    one = grown(copied=True)
    other = apply(dataclasses.replace(one.plan, seed=1), one.source)
    for tensor in ("0.up", "0.down", "0.router"):
        assert not torch.equal(other[tensor], one.target[tensor])
    assert torch.equal(other["0.norm"], one.target["0.norm"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shares_round_nothing_in_any_dtype(dtype: torch.dtype) -> None:
    made = grown(copied=True)
    source = {name: tensor.to(dtype) for name, tensor in made.source.items()}
    router = apply(made.plan, source)["0.router"]
    assert router.dtype == dtype
    old = source["0.router"].double()
    parts = router.double()[:2].reshape(2, 3, 4).unbind(1)
    assert torch.equal(sum(parts, torch.zeros(())), old)
    assert all(bool(((part == 0) | (part == old / 2) | (part == old)).all()) for part in parts)
    assert all(not torch.equal(a, b) for i, a in enumerate(parts) for b in parts[:i])


def test_what_is_closed_adds_up_to_zero() -> None:
    made = grown(gain="1+w")
    gain = made.target["0.k.gain"]
    # Of a normed key, the gain closes the new channels: 1 + w = 0.
    assert (gain[3:] == -1).all() and (made.target["0.q.gain"][3:] != -1).all()
    # The scores' root of the head size; and both sides' scale, which the query's gain leaves to the key's.
    factor = Factor.sqrt(7, 3)
    scale = Fraction(made.plan.axes["key"]["scale"])
    assert close(gain[:3], (made.source["0.k.gain"] + 1) * float(factor / Factor(scale**2)) - 1)
    assert (made.target["0.o"][:, -3:] == 0).all()  # everything else is closed at zero


def test_copies_by_name_are_read_once() -> None:
    """StableLM: a norm for each head, under a name of its own; a copied head has the source's, which is unread."""
    norms = {role: Norm("key", "layer", eps="eps") for role in "qk"}
    tensors = {"k": "(k: kv_heads key) <- hidden", "k.{kv_heads}": "k: * key", "q.{heads}": "q: * key"}
    attention = Attention(kv_heads="kv_heads")
    axes = ("hidden", "heads", "kv_heads", "key", "value")
    config = {"hidden_size": 3, "heads_size": 4, "kv_heads_size": 2, "key_size": 5, "value_size": 2}
    made = grow(family(axes, tensors, norms, attention), config, {"kv_heads_size": 4})
    assert torch.equal(made.target["k.1"], made.source["k.0"]) and torch.equal(made.target["k.2"], made.source["k.1"])
    back = pull_back(made.plan, made.target)
    assert set(back) == set(made.source) and all(torch.equal(back[name], made.source[name]) for name in back)


def tensor_plan(fill: Fill, dims: tuple[Lift, ...], offset: int = 0) -> Plan:
    made = TensorPlan("w", "w", dims, False, fill, "w", offset)
    return Plan("tiny", "paper", 0, {}, (), {"initializer_range": 0.5}, {}, (made,))


def run(plan: Plan, source: Mapping[str, Tensor]) -> Tensor:
    return apply(plan, source)["w"]


FREE = Lift(3, (Run(3, 0), Run(4, None, back=None, free=True)))


def test_fills() -> None:
    w = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    mean = tensor_plan(Fill("mean", "w", None, Factor.sqrt(4)), (FREE,))
    assert run(mean, {"w": w}).tolist() == [1.0, 2.0, 6.0, 6.0, 6.0, 6.0, 6.0]
    stored = tensor_plan(Fill("mean", "w", None, Factor.sqrt(4)), (FREE,), offset=1)
    assert run(stored, {"w": w}).tolist()[3:] == [7.0] * 4  # 2 x (3 + 1) - 1
    constant = tensor_plan(Fill("constant", "w", None, Factor.of(3)), (FREE,), offset=1)
    assert run(constant, {"w": w}).tolist() == [1.0, 2.0, 6.0, 2.0, 2.0, 2.0, 2.0]
    assert Applier(constant, lambda name, rows: w).measured() == []
    given = run(tensor_plan(Fill("normal", None, 0.0), (FREE,)), {"w": w})
    assert given.tolist()[3:] == [0.0] * 4
    plan = tensor_plan(Fill("normal", "w"), (FREE,))
    one = Applier(plan, lambda name, rows: w if rows is None else w[rows])
    assert one.measured() == [("w", "normal")]
    assert one.measure("w", "normal") == pytest.approx(float(w.std(correction=0)), rel=1e-15)
    closed = tensor_plan(Fill("normal", "w"), (FREE.freed(False),))
    assert Applier(closed, one.read).measured() == []
    assert run(closed, {"w": w}).tolist()[3:] == [0.0] * 4


def test_a_constant_matrix_is_filled_by_the_config_s_range_and_a_constant_vector_by_itself() -> None:
    matrix, vector = torch.full((3, 3), 2.0, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)
    plan = tensor_plan(Fill("normal", "w"), (FREE, Lift.identity(3)))
    assert Applier(plan, lambda _, rows: matrix[rows or slice(None)]).measure("w", "normal") == 0.5
    plan = tensor_plan(Fill("normal", "w"), (FREE,))
    assert Applier(plan, lambda _, rows: vector[rows or slice(None)]).measure("w", "normal") == 0.0


def test_fidelity_is_of_what_the_model_adds_up() -> None:
    dims = (Lift(3, (Run(3, 0, Factor.of(2), Factor.of(1, 2)),)),)
    assert tensor_plan(Fill("normal", "w"), dims).tensors[0].fidelity == "scaled"
    assert tensor_plan(Fill("normal", "w"), dims, offset=1).tensors[0].fidelity == "rounded"
    plain = (Lift.identity(3),)
    assert tensor_plan(Fill("normal", "w"), plain, offset=1).tensors[0].fidelity == "identical"
    halves = (shared(Lift.copies(3, 2)),)
    assert tensor_plan(Fill("normal", "w"), halves).tensors[0].fidelity == "scaled"
    odd = (shared(Lift.copies(3, 3), HALVES, Factor.of(3)),)
    assert tensor_plan(Fill("normal", "w"), odd).tensors[0].fidelity == "rounded"


def test_a_single_number_of_a_new_layer_is_its_neighbour_s() -> None:
    made = grow(family(("hidden",), {"{layer}.eps": "."}), {"hidden_size": 3, "layer_size": 2}, {"layer_size": 3})
    assert sorted(made.target) == ["0.eps", "1.eps", "2.eps"]
    new = next(tensor for tensor in made.plan.tensors if tensor.source is None)
    assert torch.equal(made.target[new.name], made.source[str(new.fill.like)])
