"""Every new entry of a grown reference Transformer can learn: it has a gradient within two backward passes.

A chain of growths with no training step between gets three. The counts are of exact zeros, entry by entry.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from reference_kit import (
    ALONE,
    EVERYTHING,
    RAGGED,
    difference,
    edited,
    expand_one,
    growths,
    in_a_row,
    new_entries,
    origins,
    plan_one,
    source_model,
)
from torch import Tensor
from torch.nn import functional as F

from growformer.models import ReferenceConfig, ReferenceTransformer
from growformer.planning.expansions import AttentionExpansion, Expansion, HiddenExpansion, compose
from growformer.proof.alive import covering_tokens, dead_entries
from growformer.proof.bar import BAR


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a dozen channels gain nothing by a second thread, which on a busy machine only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def source_for_learning(config: ReferenceConfig) -> ReferenceTransformer:
    """A source whose ReLU units, old and new, all fire on some token.

    A unit that is silent on all of the data is dead in any Transformer. With small biases the sign of what
    a unit sees follows the tokens.
    """
    model = source_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".b1", ".b2")) and config.activation == "relu":
                parameter.mul_(0.1)
    return model


def dead(model: ReferenceTransformer, mask: Mapping[str, Tensor], passes: int) -> dict[str, int]:
    """How many new entries no gradient reaches, by tensor, where there are any."""
    config = model.config
    shuffles = 12 if config.activation == "relu" else 2
    tokens = torch.cat([covering_tokens(config.vocab, config.positions, seed) for seed in range(shuffles)])
    targets = tokens.roll(-1, dims=1).flatten()

    def loss(network: torch.nn.Module) -> Tensor:
        return F.cross_entropy(network(tokens).flatten(0, 1), targets)

    return {name: count for name, count in dead_entries(model, mask, loss, passes).items() if count}


@pytest.mark.parametrize("name", EVERYTHING)
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"final_norm": False, "eps": 0.0},
        {"activation": "gelu", "tied": True},
        {"activation": "swiglu", "causal": True},
    ],
    ids=["relu", "as in the paper", "gelu tied", "swiglu causal"],
)
def test_every_new_entry_is_alive_within_two_passes(name: str, switches: dict[str, Any]) -> None:
    source = source_for_learning(dataclasses.replace(RAGGED, **switches))
    mask = new_entries(origins(plan_one(source, EVERYTHING[name])))
    assert any(bool(here.any()) for here in mask.values())
    assert dead(expand_one(source, EVERYTHING[name]), mask, passes=2) == {}


@settings(max_examples=60)
@given(growths(activations=("gelu", "swiglu")))
def test_every_new_entry_of_any_composition_is_alive(case: tuple[ReferenceConfig, list[Expansion]]) -> None:
    config, steps = case
    source = source_model(config)
    mask = new_entries(origins(plan_one(source, compose(*steps))))
    assert dead(expand_one(source, compose(*steps)), mask, passes=2) == {}


@settings(max_examples=60)
@given(growths(activations=("gelu", "swiglu")))
def test_every_new_entry_of_a_chain_is_alive_within_three_passes(case: tuple[ReferenceConfig, list[Expansion]]) -> None:
    config, steps = case
    grown, found = in_a_row(source_model(config), steps)
    assert dead(grown, new_entries(found), passes=3) == {}


def test_control_one_pass_is_not_enough() -> None:
    source = source_model(RAGGED)
    step = ALONE["key"]
    found = dead(expand_one(source, step), new_entries(origins(plan_one(source, step))), passes=1)
    assert found and all(name.endswith("w_q") for name in found)


def test_control_zero_on_both_sides_is_dead() -> None:
    source = source_model(RAGGED)
    step = AttentionExpansion(9, layers=[2], heads=[0])
    mask = new_entries(origins(plan_one(source, step)))
    name = "layers.2.heads.0.w_q"

    def close(state: dict[str, Tensor]) -> None:
        state[name][mask[name]] = 0.0

    stuck = edited(expand_one(source, step), close)
    assert difference(source, stuck) <= BAR
    assert dead(stuck, mask, passes=5) == {name: 12 * 8, "layers.2.heads.0.w_k": 12 * 8}


def test_control_zero_gains_are_dead_under_a_final_norm() -> None:
    # The paper's Table 1 lists new gains as zero; under the norms of the layers and a final norm nothing then moves.
    source = source_model(RAGGED)
    step = HiddenExpansion(19)
    mask = new_entries(origins(plan_one(source, step)))

    def close(state: dict[str, Tensor]) -> None:
        for name in state:
            if "norm" in name:
                state[name][12:] = 0.0

    stuck = edited(expand_one(source, step), close)
    assert difference(source, stuck) <= BAR
    assert dead(stuck, mask, passes=5)
