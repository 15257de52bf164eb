"""The paper's six expansions on its own Transformer: in any order, per layer and per head, at once or in a row.

Two properties: the function is preserved, and every source entry arrives once and by the same exact factor, whether the
growth is one plan or many. Each rule, left out, is shown to change the function.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from reference_kit import (
    ALL_SIX,
    EVERYTHING,
    RAGGED,
    alike,
    difference,
    edited,
    expand_one,
    growths,
    in_a_row,
    new_entries,
    old_entries,
    origins,
    plan_one,
    relative,
    some_tokens,
    source_model,
)
from torch import Tensor

from growformer.algebra import Factor
from growformer.models import ReferenceConfig
from growformer.planning import Block, Plan
from growformer.planning.expansions import (
    AttentionExpansion,
    Expansion,
    HeadAddition,
    HeadsExpansion,
    HiddenExpansion,
    LayerAddition,
    MLPExpansion,
    compose,
)
from growformer.proof.bar import BAR


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a dozen channels gain nothing by a second thread, which on a busy machine only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- preserved -------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(growths())
def test_any_composition_preserves_the_function(case: tuple[ReferenceConfig, list[Expansion]]) -> None:
    config, steps = case
    source = source_model(config)
    grown = expand_one(source, compose(*steps))
    assert difference(source, grown) <= BAR


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_each_expansion_preserves_the_function(name: str, activation: str) -> None:
    source = source_model(dataclasses.replace(RAGGED, activation=activation, causal=True))
    grown = expand_one(source, EVERYTHING[name])
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in source.parameters())
    assert difference(source, grown) <= BAR
    # The new entries are not all zero: free blocks are filled.
    mask = new_entries(origins(plan_one(source, EVERYTHING[name])))
    assert any(bool(value[mask[key]].any()) for key, value in grown.state_dict().items())


@pytest.mark.parametrize("order", list(itertools.permutations(range(6), 6))[::48])
def test_the_six_in_any_order(order: tuple[int, ...]) -> None:
    source = source_model(RAGGED)
    steps = [ALL_SIX.steps[i] for i in order]
    # Uniform targets commute: whatever the order, the grown sizes are the same unless a new head or layer comes late.
    assert difference(source, expand_one(source, compose(*steps))) <= BAR


def test_the_source_is_left_as_it_is_and_no_random_number_is_drawn() -> None:
    source = source_model(RAGGED)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    state = torch.random.get_rng_state()
    grown = expand_one(source.eval(), ALL_SIX)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(source.state_dict()[name], value) for name, value in before.items())
    assert not grown.training and all(p.requires_grad for p in grown.parameters())


def test_the_seed_decides_the_new_entries_and_nothing_else() -> None:
    source = source_model(RAGGED)
    plan = plan_one(source, ALL_SIX)
    a, b, c = (expand_one(source, ALL_SIX, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[name], b[name]) for name in a)
    mask = new_entries(origins(plan))
    assert all(torch.equal(a[name][~mask[name]], c[name][~mask[name]]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


# --- at once and one by one ------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(growths())
def test_at_once_and_one_by_one_place_every_source_entry_alike(case: tuple[ReferenceConfig, list[Expansion]]) -> None:
    config, steps = case
    source = source_model(config)
    chained, step_by_step = in_a_row(source, steps)
    at_once = origins(plan_one(source, compose(*steps)))
    grown = expand_one(source, compose(*steps))
    assert grown.config == chained.config  # sizes, and eps as an exact fraction
    assert alike(at_once, step_by_step)
    # Every source entry arrives, and arrives once.
    entries = {(name, index) for name, value in source.state_dict().items() for index in np.ndindex(*value.shape)}
    places = [entry[:2] for entry in old_entries(at_once)]
    assert len(places) == len(entries) and set(places) == entries
    assert difference(source, grown) <= BAR
    assert difference(source, chained) <= BAR


def test_origins_control() -> None:
    # Two orders in which an index means another head must not look alike.
    source = source_model(RAGGED)
    first = HeadAddition(1, layers=[0], at=[0])
    second = AttentionExpansion(9, layers=[0], heads=[1])
    _, there = in_a_row(source, [first, second])
    _, back = in_a_row(source, [second, first])
    assert {entry[:2] for entry in old_entries(there)} == {entry[:2] for entry in old_entries(back)}
    assert not alike(there, back)
    assert alike(there, origins(plan_one(source, compose(first, second))))


def test_factors_compose_exactly() -> None:
    source = source_model(RAGGED)
    steps = [
        HiddenExpansion(13),
        AttentionExpansion(15),
        HiddenExpansion(17),
        AttentionExpansion(17),
        HiddenExpansion(19),
    ]
    grown, found = in_a_row(source, [*steps])
    assert {factor for name, _, factor in old_entries(found) if "norm" in name} == {Factor.sqrt(12, 19)}
    assert found["layers.2.heads.0.w_k"][0, 0] == ("layers.2.heads.0.w_k", (0, 0), Factor.sqrt(17, 1))
    assert grown.config.eps == Fraction(0.03) * Fraction(12, 19)


# --- many in a row ---------------------------------------------------------------------------------------------------


def small_growth(config: ReferenceConfig, rng: random.Random) -> Expansion:
    """One or two units more of something, somewhere."""
    kinds = ["mlp", "heads", "value", "key", "hidden", "layers"]
    kind = rng.choices(kinds, weights=[10, 4, 10, 10, 10, 3])[0]
    more, layer = rng.randint(1, 2), rng.randrange(len(config.layers))
    sizes = config.layers[layer]
    head = rng.randrange(len(sizes.heads))
    if kind == "hidden":
        return HiddenExpansion(config.hidden + more)
    if kind == "layers":
        return LayerAddition(1, at=[rng.randint(0, len(config.layers))])
    if kind == "mlp":
        return MLPExpansion(sizes.mlp + more, [layer])
    if kind == "heads":
        return HeadAddition(1, [layer], at=[rng.randint(0, len(sizes.heads))])
    if kind == "key":
        return AttentionExpansion(sizes.heads[head].key + more, [layer], [head])
    return HeadsExpansion(sizes.heads[head].value + more, [layer], [head])


@pytest.mark.parametrize("seed", range(3))
def test_fifty_growths_in_a_row(seed: int) -> None:
    rng = random.Random(seed)
    switches: dict[str, Any] = {"activation": ["relu", "gelu", "swiglu"][seed], "tied": seed == 1, "causal": seed == 2}
    source = source_model(dataclasses.replace(RAGGED, hidden=6, **switches))
    model = source
    for step in range(50):
        model = expand_one(model, small_growth(model.config, rng), seed=step)
    assert model.config.hidden > source.config.hidden and len(model.config.layers) > len(source.config.layers)
    assert sum(p.numel() for p in model.parameters()) > 2 * sum(p.numel() for p in source.parameters())
    assert difference(source, model) <= 10 * BAR


# --- negative controls: each rule left out changes the function -----------------------------------------------------


def test_control_key_scale() -> None:
    source = source_model(RAGGED)
    step = AttentionExpansion(9, layers=[2], heads=[0])
    grown = expand_one(source, step)
    name = "layers.2.heads.0.w_k"

    def leave_out(state: dict[str, Tensor]) -> None:
        state[name][:, :1] = source.state_dict()[name]

    assert difference(source, edited(grown, lambda state: None)) <= BAR
    assert difference(source, edited(grown, leave_out)) > BAR


@pytest.mark.parametrize("name", [n for n in source_model(RAGGED).state_dict() if "norm" in n])
def test_control_gain_scale(name: str) -> None:
    source = source_model(RAGGED)
    grown = expand_one(source, HiddenExpansion(19))

    def leave_out(state: dict[str, Tensor]) -> None:
        state[name][:12] = source.state_dict()[name]

    assert difference(source, edited(grown, leave_out)) > BAR


@pytest.mark.parametrize("eps", [0.03, 1e-5])
def test_control_eps(eps: float) -> None:
    source = source_model(dataclasses.replace(RAGGED, eps=eps))
    grown = expand_one(source, HiddenExpansion(19))
    assert difference(source, grown) <= BAR
    assert difference(source, edited(grown, lambda state: None, eps=eps)) > BAR


def closed_blocks(plan: Plan) -> list[tuple[str, Block]]:
    """New entries that must be zero, box by box."""
    return [(t.name, b) for t in plan.tensors for b in t.blocks() if b.source is None and not b.free]


@pytest.mark.parametrize("name", EVERYTHING)
def test_control_each_closed_block(name: str) -> None:
    source = source_model(RAGGED)
    plan = plan_one(source, EVERYTHING[name])
    grown = expand_one(source, EVERYTHING[name])
    # Many sequences: under ReLU a new unit is silent on some tokens, and its row of W2 then says nothing.
    tokens = some_tokens(RAGGED, sequences=20)
    generator = torch.Generator().manual_seed(5)
    closed = closed_blocks(plan)
    assert closed
    with torch.no_grad():
        wanted = source(tokens)
        for tensor, block in closed:
            box = tuple(slice(a, a + n) for a, n in zip(block.start, block.shape, strict=True))
            there = grown.get_parameter(tensor)[box]
            assert not there.any()
            there.normal_(generator=generator)
            assert relative(wanted, grown(tokens)) > BAR, (tensor, block)
            there.zero_()
        assert relative(wanted, grown(tokens)) <= BAR


def test_only_the_closed_side_is_zero() -> None:
    # Of the new entries, those that no closure needs are free: w_q, w_v, w1, b1, gains and what reads hidden.
    plan = plan_one(source_model(RAGGED), ALL_SIX)
    leaves = {tensor.rsplit(".", 1)[-1] for tensor, _ in closed_blocks(plan)}
    assert leaves == {"embedding", "positions", "w_k", "w_o", "w2", "b2"}
