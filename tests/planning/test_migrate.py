"""New layers where a norm stands on the stream: where gains and shifts go, and what a model of them computes."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from growformer.algebra import Norm, replace
from growformer.errors import RequestError
from growformer.planning import Plan
from growformer.planning.migrate import KEPT, chain, holders
from growformer.proof.bar import BAR
from growformer.proof.handing import handed
from tests.planning.tiny_families import family, grow, norm

MODEL = family(
    ("hidden", "mlp", "layer"),
    {
        "embed.gain": "embed: * hidden",
        "embed.shift": "embed: + hidden",
        "{layer}.o": "hidden <- hidden",
        "{layer}.o.bias": "-> hidden",
        "{layer}.attn.gain": "attn: * hidden",
        "{layer}.attn.shift": "attn: + hidden",
        "{layer}.up": "mlp <- hidden",
        "{layer}.down": "hidden <- mlp",
        "{layer}.down.bias": "-> hidden",
        "{layer}.out.gain": "out: * hidden",
        "{layer}.out.shift": "out: + hidden",
    },
    {
        "embed": Norm("hidden", "layer", eps="eps", output="stream", feeds="layer"),
        "attn": Norm("hidden", "layer", eps="eps", output="stream"),
        "out": Norm("hidden", "layer", eps="eps", output="stream", feeds="layer"),
    },
    copied={"hidden": "it is normed"},
)
CONFIG = {"hidden_size": 6, "mlp_size": 5, "layer_size": 3}


def compute(tensors: Mapping[str, Tensor], layers: int, x: Tensor, eps: float) -> Tensor:
    """A post-norm model of linear branches."""

    def normed(name: str, y: Tensor) -> Tensor:
        return norm(y, "layer", eps, tensors[f"{name}.gain"], tensors[f"{name}.shift"])

    x = normed("embed", x)
    for i in range(layers):
        x = normed(f"{i}.attn", x + x @ tensors[f"{i}.o"].T + tensors[f"{i}.o.bias"])
        inner = torch.tanh(x @ tensors[f"{i}.up"].T)
        x = normed(f"{i}.out", x + inner @ tensors[f"{i}.down"].T + tensors[f"{i}.down.bias"])
    return x


def every_map(old: int, new: int) -> list[list[int | None]]:
    out: list[list[int | None]] = []
    for places in itertools.combinations(range(new), new - old):
        olds = iter(range(old))
        out.append([None if i in places else next(olds) for i in range(new)])
    return out


@pytest.mark.parametrize("layers", [m for new in range(2, 6) for m in every_map(2, new)])
def test_each_old_gain_stands_once_behind_the_last_new_layer_after_it(layers: list[int | None]) -> None:
    found = holders(layers)
    assert set(found) == set(range(-1, len(layers)))
    assert sorted(old for old in found.values() if old is not None) == [-1, 0, 1]
    for place, old in found.items():
        new_follows = place + 1 < len(layers) and layers[place + 1] is None
        assert (old is None) == new_follows
    # The certificate has its own words for it, and says the same.
    assert {one.stands: one.source for one in handed(layers)} == {p: s for p, s in found.items() if s is not None}
    assert all(layers[one.stood] == one.source for one in handed(layers) if one.source >= 0)


@pytest.mark.parametrize("at", [[1], [3], [0], [1, 3], [0, 1, 4], [2, 3, 4]])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-2])
def test_the_function_is_the_same_but_for_eps(at: Sequence[int], eps: float) -> None:
    new = 3 + len(at)
    grown = grow(MODEL, {**CONFIG, "eps": eps}, {"layer_size": new, "mlp_size": 9}, layers_at=list(at))
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = compute(grown.source, 3, x, eps), compute(grown.target, new, x, eps)
    relative = float((a - b).abs().max() / a.abs().max())
    if eps == 0:
        assert relative <= BAR
    else:
        assert 1e-3 * eps < relative < 20 * eps
    # The new layers are closed once: what writes the stream, and nothing else but the shifts before them.
    for place in at:
        assert not any(grown.target[f"{place}.{name}"].any() for name in ("o", "o.bias", "down", "down.bias"))
        assert (grown.target[f"{place}.up"] != 0).all()
        assert (grown.target[f"{place}.attn.gain"] == float(KEPT)).all()
        assert not grown.target[f"{place}.attn.shift"].any()


def test_gains_and_shifts_are_moved_bit_for_bit_and_the_rest_is_constant() -> None:
    grown = grow(MODEL, CONFIG, {"layer_size": 6}, layers_at=[0, 2, 3])
    where = {"embed": None, "0.out": "embed", "1.out": None, "2.out": None, "3.out": "0.out", "4.out": "1.out"}
    for name, source in {**where, "5.out": "2.out", "5.attn": "2.attn", "2.attn": None}.items():
        gain, shift = grown.target[f"{name}.gain"], grown.target[f"{name}.shift"]
        if source is None:
            assert (gain == 1).all() and not shift.any()
        else:
            assert torch.equal(gain, grown.source[f"{source}.gain"])
            assert torch.equal(shift, grown.source[f"{source}.shift"])
            assert grown.plan.by_name[f"{name}.gain"].source == f"{source}.gain"
            assert grown.plan.by_name[f"{name}.gain"].fidelity == "identical"
    assert grown.plan.parameters[0] == sum(x.numel() for x in grown.source.values())


def test_moved_gains_grow_with_the_stream() -> None:
    grown = grow(MODEL, {**CONFIG, "eps": 0.0}, {"layer_size": 5, "hidden_size": 12}, layers_at=[0, 2])
    assert torch.equal(grown.target["2.out.gain"], grown.source["0.out.gain"].repeat(2))
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = compute(grown.source, 3, x, 0.0), compute(grown.target, 5, torch.cat([x, x], -1), 0.0)
    assert float((torch.cat([a, a], -1) - b).abs().max() / a.abs().max()) <= BAR


def test_the_plan_says_within_eps_and_its_formula_and_keeps_it() -> None:
    plan = grow(MODEL, CONFIG, {"layer_size": 6}, layers_at=[0, 2, 3]).plan
    assert plan.function == "within eps"
    (said,) = plan.within_eps
    assert said.startswith("layer_size 3 -> 6") and "before the first layer and after the source's layer 0" in said
    assert "eps/2 x |1/v - 1/K^2|" in said and "K = 1" in said and "eps = 0.03" in said
    told = plan.to_json()
    assert told["function"] == "within eps" and told["within_eps"] == [said]
    assert told["axes"]["layer"]["kept"] == "1"
    assert Plan.from_json(told).to_json() == told
    exact = grow(MODEL, CONFIG, {"mlp_size": 9}).plan
    assert exact.function == "exact" and exact.within_eps == () and "kept" not in exact.axes["layer"]


def test_an_offset_counts_in_what_is_kept() -> None:
    norms = {role: replace(one, gain="1+w") for role, one in MODEL.norms.items()}
    grown = grow(replace(MODEL, norms=norms), CONFIG, {"layer_size": 4}, layers_at=[1])
    assert not grown.target["0.out.gain"].any() and not grown.target["1.attn.gain"].any()
    assert torch.equal(grown.target["1.out.gain"], grown.source["0.out.gain"])


def refused(model: Any, config: Mapping[str, Any] = CONFIG, at: list[int] | None = None) -> str:
    with pytest.raises(RequestError) as raised:
        grow(model, config, {"layer_size": 4}, layers_at=at)
    return str(raised.value)


def test_without_a_norm_before_the_first_layer_no_new_one_comes_first() -> None:
    bare = {name: text for name, text in MODEL.tensors.items() if not name.startswith("embed")}
    model = replace(MODEL, tensors=bare)
    assert "place new layers from 1 on" in refused(model, at=[0])
    assert grow(model, CONFIG, {"layer_size": 4}, layers_at=[1]).plan.layers["layer"] == (0, None, 1, 2)


def test_norms_of_several_eps() -> None:
    odd = replace(MODEL, norms={**MODEL.norms, "attn": replace(MODEL.norms["attn"], eps=1e-5)})
    said = refused(odd)
    assert "several eps (1e-05, 0.03)" in said and said.endswith("it stays 3")


def test_a_norm_on_the_stream_that_ends_no_layer_is_refused() -> None:
    lost = replace(MODEL, norms={role: replace(one, feeds="") for role, one in MODEL.norms.items()})
    assert chain(lost, "layer", "gain") is None
    assert "no single norm is declared to end a layer; it stays 3" in refused(lost)
    one = {name: text for name, text in MODEL.tensors.items() if name != "{layer}.out.shift"}
    assert "no single norm is declared to end a layer" in refused(replace(MODEL, tensors=one))
    both = replace(MODEL, norms={role: replace(one, feeds="layer") for role, one in MODEL.norms.items()})
    assert "no single norm is declared to end a layer" in refused(both)
