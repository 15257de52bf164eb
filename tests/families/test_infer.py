"""Drafts of families: what is read off is what the hand-written literal says, and a wrong draft does not pass."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from growformer.algebra import Family, Field, Norm, Ratio
from growformer.api.infer import config_of, failures, run_infer
from growformer.drafts import Draft, infer, shrink, source_of
from growformer.drafts.nodes import Node, align, regroup
from growformer.drafts.sizes import fit
from growformer.errors import RequestError
from growformer.families import FAMILIES


def draft_of(name: str) -> Draft:
    return infer({**FAMILIES[name].sample, "model_type": name})


@pytest.fixture(scope="module")
def qwen3() -> Draft:
    return draft_of("qwen3")


def loaded(text: str) -> Family:
    space: dict[str, Any] = {}
    exec(text, space)
    return next(x for x in space.values() if isinstance(x, Family))


def test_a_draft_says_what_the_hand_written_literal_says(qwen3: Draft) -> None:
    hand, family = FAMILIES["qwen3"], qwen3.family
    assert {n: p for n, p in hand.tensors.items() if n in family.tensors} == dict(family.tensors)
    assert family.norms["q"] == hand.norms["q"] and family.norms["pre"] == hand.norms["pre"]
    assert family.attention == hand.attention
    assert family.tied == hand.tied


def test_the_text_is_the_draft(qwen3: Draft) -> None:
    assert loaded(source_of(qwen3)) == qwen3.family


def test_gpt2_transposed_fused_and_derived() -> None:
    family = draft_of("gpt2").family
    hand = FAMILIES["gpt2"]
    assert dict(family.tensors) == dict(hand.tensors)
    assert family.axes["key"] == Ratio("n_embd", "n_head")
    assert family.attention == hand.attention  # no rotary positions, though queries differ with the position


@pytest.mark.slow
def test_a_right_draft_passes_unedited_and_a_wrong_one_does_not(qwen3: Draft) -> None:
    assert failures(qwen3) == []
    # The control: gains said to be 1 + w, which they are not.
    norms = {role: replace(norm, gain="1+w") for role, norm in qwen3.family.norms.items()}
    wrong = Draft(replace(qwen3.family, norms=norms), [], qwen3.raw)
    assert any("hidden_size" in said for said in failures(wrong))


def test_what_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="neither a config"):
        run_infer("no_such_model_type", tmp_path / "x.py")
    assert not (tmp_path / "x.py").exists()


def test_a_real_size_is_shrunk_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen2")))
    tiny = shrink(config_of(str(tmp_path)))
    assert tiny["num_attention_heads"] % tiny["num_key_value_heads"] == 0
    assert tiny["hidden_size"] < 100 and tiny["num_hidden_layers"] == len(tiny["layer_types"])
    # A small one is taken as it is.
    sample = {**FAMILIES["qwen2"].sample, "model_type": "qwen2"}
    assert shrink(sample) == sample


def test_sizes_are_told_by_what_moves_them() -> None:
    fulls = {"": {"h": 24, "e": 4, "d": None}, "h": {"h": 32, "e": 4, "d": None}, "e": {"h": 24, "e": 6, "d": None}}
    assert fit({"": 24, "h": 32, "e": 24}, fulls) == Field("h")
    assert fit({"": 6, "h": 8, "e": 4}, fulls) == Ratio("h", "e")
    assert fit({"": 6, "h": 6, "e": 6}, fulls) == 6
    assert fit({"": 6, "h": 7, "e": 4}, fulls) is None
    with_d = {**fulls, "d": {"h": 24, "e": 4, "d": 10}}
    assert fit({"": 6, "h": 8, "e": 4, "d": 10}, with_d) == Field("d", default=Ratio("h", "e"))


def test_a_reshape_splits_channels_and_a_sum_unites_them() -> None:
    fused, heads, key = Node(12), Node(3), Node(4)
    outer, inner = regroup([(fused,)], (3, 4))
    assert align([*outer, *inner], [heads, key])
    assert [n.root for n in fused.root.factors] == [heads.root, key.root] or outer[0].root is heads.root
    # The control: sizes that do not fit are not united.
    assert not align([Node(4), Node(3)], [Node(6), Node(2)])
    assert regroup([(Node(4),), (Node(3),)], (6, 2))[0][0].size == 6


def test_norms_are_measured_and_not_believed() -> None:
    import torch

    from growformer.drafts.modules import measure

    class Odd(torch.nn.Module):
        """Called a norm, and scales by 1 + w."""

        def __init__(self, real: bool) -> None:
            super().__init__()
            self.weight, self.eps, self.real = torch.nn.Parameter(torch.rand(6)), 1e-3, real

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            size = x.pow(2).mean(-1, keepdim=True) if self.real else x.abs().mean(-1, keepdim=True)
            return x * torch.rsqrt(size + self.eps) * (1 + self.weight)

    found = measure(Odd(real=True), (5, 6))
    assert (found.kind, found.gain, found.eps) == ("rms", "1+w", 1e-3)
    assert measure(Odd(real=False), (5, 6)).kind == ""
    assert measure(torch.nn.LayerNorm(6), (5, 6)).kind == "layer"
    assert Norm("hidden", "rms", eps=1e-3) != Norm("hidden", "rms", eps=1e-3, gain="1+w")
