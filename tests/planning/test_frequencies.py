"""Frequencies of rotary pairs: the planner's, the certificate's and the stock functions' agree, and stay in a list."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from growformer.errors import RequestError
from growformer.planning.frequencies import attention_factor, listed, periods
from growformer.proof import frequencies as proof
from growformer.proof.float64 import true_float64

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "llama3", **LLAMA3},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", **YARN, "truncate": False},
    {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"rope_type": "yarn", **YARN, "attention_factor": 1.25},
    {"rope_type": "yarn", **YARN, "beta_fast": 1.0},  # a ramp without width
]


@pytest.mark.parametrize("theta", [50.0, 10000.0, 5e6])
@pytest.mark.parametrize("rope", ROPES)
def test_three_ways_agree(rope: dict[str, Any], theta: float) -> None:
    rope = {**rope, "rope_theta": theta}
    mine = 1 / torch.tensor(periods(rope, 24, 12), dtype=torch.float64)
    theirs, times = proof.frequencies(rope, theta, 24)
    with true_float64():
        config = LlamaConfig(head_dim=24, max_position_embeddings=256, rope_parameters=rope)
        stock, stock_times = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    assert stock.dtype == torch.float64
    slack = (8 + 2 * math.log(theta)) * proof.ULP
    for found in (mine, theirs):
        assert bool(((found - stock).abs() <= slack * stock).all())
    assert times == pytest.approx(stock_times, rel=slack) and attention_factor(rope) == pytest.approx(times, rel=slack)
    # The control: one part in a billion is seen.
    assert not bool(((mine * (1 + 1e-9) - stock).abs() <= slack * stock).all())


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, *ROPES])
def test_more_pairs_go_on_as_a_larger_base_does(rope: dict[str, Any]) -> None:
    rope = {**rope, "rope_theta": 10000.0}
    wider = {**rope, "rope_theta": 10000.0 ** (32 / 24)}
    assert periods(rope, 24, 16) == pytest.approx(periods(wider, 32, 16), rel=1e-12)


def test_a_list_holds_the_same_frequencies() -> None:
    rope = {"rope_type": "yarn", **YARN, "rope_theta": 10000.0}
    out = listed(rope, 24, 16, 256)
    assert out == {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": periods(rope, 24, 16),
        "long_factor": periods(rope, 24, 16),
        "attention_factor": 0.1 * math.log(4.0) + 1,
        "factor": 1.0,
        "original_max_position_embeddings": 256,
    }
    found, times = proof.frequencies(out, 1.0, 32)
    assert found[:12].tolist() == pytest.approx(proof.frequencies(rope, 10000.0, 24)[0].tolist(), rel=1e-12)
    assert times == out["attention_factor"]
    # What scales DeepSeek's softmax under every type but the default comes along, and stays away where it did nothing.
    assert listed({**rope, "mscale_all_dim": 1.3}, 24, 16, 256) == {**out, "factor": 4.0, "mscale_all_dim": 1.3}
    plain = {"rope_type": "default", "rope_theta": 100.0, "mscale_all_dim": 1.3}
    assert "mscale_all_dim" not in listed(plain, 24, 16, 256)


@pytest.mark.parametrize("longest", [None, 0, True, "256"])
def test_a_list_needs_a_longest_text(longest: object) -> None:
    with pytest.raises(RequestError, match="max_position_embeddings"):
        listed({"rope_theta": 100.0}, 8, 6, longest)


@pytest.mark.parametrize("rope", [{"rope_type": "linear"}, {"rope_type": "linear", "factor": "x"}])
def test_parameters_without_frequencies_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"rope_parameters .* give no frequencies"):
        listed({"rope_theta": 100.0, **rope}, 8, 6, 32)
