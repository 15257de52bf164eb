"""Drafts of families: what is read off is what the hand-written literal says, and a wrong draft does not pass."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from growformer.algebra import Family, Field, Norm, Ratio
from growformer.api.checks.results import FamilyReport, Growth
from growformer.api.infer import Checked, check_draft, config_of, failures, run_infer, settle
from growformer.drafts import Draft, infer, shrink, source_of
from growformer.drafts.nodes import Node, align, regroup
from growformer.drafts.probe import Probe
from growformer.drafts.settled import blanked, frozen
from growformer.drafts.sizes import fit
from growformer.drafts.trace import watch
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
    assert failures(check_draft(qwen3)) == []
    # The control: gains said to be 1 + w, which they are not.
    norms = {role: replace(norm, gain="1+w") for role, norm in qwen3.family.norms.items()}
    wrong = Draft(replace(qwen3.family, norms=norms), [], qwen3.raw)
    assert any("hidden_size" in said for said in failures(check_draft(wrong)))


def report(*growths: Growth) -> FamilyReport:
    good = Growth("vocab_size", "Qwen3ForCausalLM", "float64", {"vocab_size": 9}, "exact")
    return FamilyReport("qwen3", growths=(good, *growths))


def test_what_the_check_refutes_is_taken_back(qwen3: Draft) -> None:
    bad = Growth("head_dim", "Qwen3ForCausalLM", "float64", {"head_dim": 20}, "fails", "algebra: 1.0e+00")
    every = replace(bad, what="all together", request={"head_dim": 20, "vocab_size": 9})

    def check(draft: Draft) -> Checked:
        return report() if draft.family.frozen else report(bad, every)

    settled, found = settle(qwen3, check)
    assert failures(found) == []
    assert [frozen.axes for frozen in settled.family.frozen] == [("key", "value")]
    assert "algebra: 1.0e+00" in settled.family.frozen[0].reason
    assert "# ? key and value: taken back" in source_of(settled)
    # The controls: what no axis has alone stays a failure, and what holds is left alone.
    assert failures(settle(qwen3, lambda draft: report(every))[1]) != []
    assert settle(qwen3, lambda draft: report())[0] is qwen3
    broken = settle(qwen3, lambda draft: KeyError("x"))
    assert broken[0] is qwen3 and failures(broken[1]) == ["KeyError: 'x'"]


def test_sizes_that_patterns_do_not_explain_are_found() -> None:
    family = Family(
        "tiny", ("tiny",), ("Tiny",), {"hidden": Field("h"), "mlp": Field("m")},
        {"up": "mlp <- hidden", "odd": "_ <- hidden"}, {}, (),
    )  # fmt: skip

    def probe(h: int, m: int, odd: int) -> Probe:
        return Probe({}, {"h": h, "m": m}, {"up": (m, h), "odd": (odd, h)})

    base, right = probe(4, 6, 5), probe(4, 7, 5)
    assert frozen(family, base, {"h": probe(5, 6, 5), "m": right}) == ()
    found = frozen(family, base, {"h": probe(5, 6, 9), "m": right})
    assert [one.axes for one in found] == [("hidden",)] and "odd is [9, 5]" in found[0].reason
    # A field that the class takes only with another.
    both = frozen(family, base, {"h+m": probe(8, 12, 5)})
    assert [one.axes for one in both] == [("hidden",), ("mlp",)] and "only with another m" in both[0].reason
    assert fit(
        {"": 4, "h+m": 8, "h+o": 8}, {"": {"h": 4, "m": 6}, "h+m": {"h": 8, "m": 12}, "h+o": {"h": 8, "m": 6}}
    ) == (Field("h"))


def test_dims_that_are_not_understood_stay_as_they_are() -> None:
    named = re.compile(r"\b(heads|key)\b")
    assert blanked("(q: heads key | v: value) <- hidden", named) == "_ <- hidden"
    assert blanked("[experts] hidden <- (heads key)", named) == "[experts] hidden <- _"
    assert blanked("q: * key", named) == "-> _"
    assert blanked("pre: * hidden", named) == "pre: * hidden"


def test_a_stream_is_what_is_added_to_what_was_computed_from_it() -> None:
    import torch

    class Tower(torch.nn.Module):
        """Embeddings of size 3, added up, projected to 5; then x + f(x)."""

        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.kinds = torch.nn.Embedding(7, 3), torch.nn.Embedding(7, 3)
            self.wide, self.f = torch.nn.Linear(3, 5), torch.nn.Linear(5, 5)
            self.table = torch.arange(20.0).reshape(4, 5)

        def forward(self, ids: torch.Tensor, loose: bool = False) -> torch.Tensor:
            x = self.wide(self.tokens(ids) + self.kinds(ids))
            x = x + self.f(x)
            return x + self.table * 2 if loose else x

    ids = {"ids": torch.tensor([[1, 2, 4, 3]])}
    trace = watch(Tower(), ids)
    assert [[node.size for node in dim] for dim in trace.residual] == [[5]]
    assert len(trace.streams) == 2  # the sum of embeddings as well
    assert all(a and b for _, a, b in trace.sides)
    # Numbers that nothing stores, on the stream, keep it as it is; a table that has two names is stored.
    family = Family("tiny", ("tiny",), ("Tiny",), {"hidden": Field("h")}, {"f": "hidden <- hidden"}, {}, ())
    tower = Tower()
    tower.wide, tower.kinds = torch.nn.Linear(3, 5), tower.tokens
    for loose, axes in ((False, []), (True, [("hidden",)])):
        base = Probe({}, {"h": 5}, {}, trace=watch(tower, {**ids, "loose": loose}), model=tower)
        assert [one.axes for one in frozen(family, base, {})] == axes


def test_biases_and_angles_say_nothing_of_the_scale_of_scores() -> None:
    import torch

    class Scores(torch.nn.Module):
        """Queries and keys times a table that was divided by 8; scores times 1/2, plus a bias times 3."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            angles = torch.arange(12.0).reshape(3, 4) / 8
            scores = (self.q(x) * angles) @ (self.k(x) * angles).transpose(-1, -2) * 0.5
            return (scores + torch.arange(3.0) * 3).softmax(-1) @ self.v(x)

    (score,) = watch(Scores(), {"x": torch.randn(2, 3, 4)}).scores
    assert score.used and score.scale == 0.5


def test_vectors_on_what_branches_add_are_roles_of_their_own() -> None:
    family = draft_of("dinov2").family
    layer = "encoder.layer.{layer}"
    assert family.tensors[f"{layer}.layer_scale1.lambda1"] == "scale1: * hidden"
    assert family.tensors[f"{layer}.attention.output.dense.weight"] == "(scale1: hidden) <- (heads value)"
    assert family.tensors[f"{layer}.attention.output.dense.bias"] == "scale1: -> hidden"
    assert family.tensors[f"{layer}.layer_scale2.lambda1"] == "scale2: * hidden"
    assert family.tensors["embeddings.mask_token"] == "-> 1 hidden"  # nothing uses it: known by its size alone


def test_queries_and_keys_of_one_weight_have_norms_of_their_own() -> None:
    family = infer(shrink(config_of("persimmon"))).family
    texts = {name.rpartition("self_attn.")[2]: text for name, text in family.tensors.items()}
    assert texts["q_layernorm.weight"] == "q: * key" and texts["k_layernorm.weight"] == "k: * key"
    assert family.norms["q"].axis == "key"


def test_a_tiny_config_turns_whole_pairs() -> None:
    tiny = shrink(config_of("glm"))
    part = tiny["rope_parameters"]["partial_rotary_factor"]
    assert part < 1 and tiny["head_dim"] * part % 2 == 0


def test_a_model_of_parts_is_refused_with_what_to_do() -> None:
    with pytest.raises(RequestError, match="draft each by itself: clip_text_model, clip_vision_model"):
        draft_of("clip")


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
