"""Moments: what the dual carries is the grown model's own gradient, unless `approximate` says that it is not."""

import pytest
from method_kit import CHANGED, KEPT, Grown, grown, past

from growformer.methods import METHODS
from growformer.optim import approximate
from growformer.optim.dual import grow_moments
from growformer.planning import Plan

EXACT = 1e-10
"""Of a tensor's largest gradient at old entries: a sum over copies adds a rounding or two to what the logits have."""

SPREADS = {"hyperclone-noise", "matrix-split", "halves"}
"""Methods whose parts differ from entry to entry."""


def apart(case: Grown, power: int) -> dict[str, float]:
    """For each tensor the largest difference at old entries, relative to its largest there."""
    squares = {name: x**power for name, x in case.before.gradients.items()}
    out = {}
    for name, carried in grow_moments(case.plan, squares, power).items():
        old = past(case.plan, name)
        true = (case.after.gradients[name] ** power)[old]
        if true.numel():
            out[name] = float((carried[old] - true).abs().max() / true.abs().max())
    return out


def last_writer(case: Grown) -> set[str]:
    """What the last layer adds to the stream goes to the tied head alone, which reads every copy alike."""
    if case.plan.target_config.get("tie_word_embeddings") is False:
        return set()
    last = len(next(iter(case.plan.layers.values()))) - 1
    ends = (f".{last}.mlp.down_proj", f".{last}.mlp.c_proj")
    return {name for name in case.plan.by_name if any(end in name for end in ends)}


@pytest.mark.parametrize(("kind", "method", "axis"), KEPT)
def test_gradients_are_carried_or_named(kind: str, method: str, axis: str) -> None:
    case = grown(kind, method, axis)
    named = set(approximate(case.plan))
    for power in (1, 2):
        found = apart(case, power)
        wrong = {name for name, error in found.items() if error > EXACT}
        assert wrong <= named
        assert named & set(found) - wrong <= (last_writer(case) if method in SPREADS else set())


def test_what_is_named_and_what_is_not() -> None:
    for method in METHODS:
        for kind, axis in (("llama", "mlp"), ("llama", "heads"), ("llama-tied-bias", "hidden")):
            if (kind, method, axis) in KEPT:
                assert bool(approximate(grown(kind, method, axis).plan)) == (method in SPREADS), (method, axis)
    # Three uneven copies under a norm, and means under a LayerNorm.
    uneven = approximate(grown("llama", "dyadic", "hidden x 3").plan)
    assert {name for name in uneven if "layers.0" in name} == {
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    }
    assert "unevenly" in uneven["model.embed_tokens.weight"] and "lm_head.weight" not in uneven
    assert "tied head" in approximate(grown("llama-tied-bias", "dyadic", "hidden x 3").plan)["model.norm.weight"]
    means = approximate(grown("gpt2", "lemon", "width").plan)
    assert "mean" in means["transformer.wte.weight"] and "transformer.h.0.mlp.c_fc.weight" not in means
    halves = approximate(grown("llama", "halves", "mlp").plan)
    assert {name.split(".")[-2] for name in halves} == {"up_proj", "gate_proj"}


@pytest.mark.parametrize(("kind", "method", "axis"), CHANGED[:4])
def test_of_another_function_nothing_is_exact(kind: str, method: str, axis: str) -> None:
    plan = grown(kind, method, axis).plan
    named = approximate(plan)
    assert set(named) == {t.name for t in plan.tensors if t.source is not None}
    assert all("function changes" in why for why in named.values())


def test_what_an_optimizer_forgets_is_forgotten() -> None:
    case = grown("llama", "sparkling", "mlp")
    up = "model.layers.0.mlp.up_proj.weight"
    carried = grow_moments(case.plan, case.before.gradients, 1)[up]
    assert carried[:28].any() and not carried[28:].any()


@pytest.mark.parametrize("method", ["lemon", "hyperclone", "staged"])
def test_control_another_power_is_seen(method: str) -> None:
    case = grown("llama", method, "mlp")
    carried = grow_moments(case.plan, case.before.gradients, 0)
    name = "model.layers.1.mlp.up_proj.weight"
    old = past(case.plan, name)
    true = case.after.gradients[name][old]
    assert float((carried[name][old] - true).abs().max() / true.abs().max()) > 1e-2
    assert apart(case, 1)[name] <= EXACT


def test_plans_keep_what_is_not_exact() -> None:
    plan = grown("llama", "halves", "mlp").plan
    again = Plan.from_json(plan.to_json())
    assert approximate(again) == approximate(plan) != {}
    assert again.tensors == plan.tensors


def test_a_copy_has_its_part_of_the_gradient() -> None:
    # 2/3 and 1/3 of every weight of what reads them: so much of the gradient of what writes them.
    case = grown("llama", "lemon", "mlp")
    name = "model.layers.2.mlp.up_proj.weight"
    old, new = case.before.gradients[name], case.after.gradients[name]
    for rows, part in ((slice(0, 13), 2 / 3), (slice(28, 41), 1 / 3)):
        assert float((new[rows] - part * old[:13]).abs().max() / old.abs().max()) <= EXACT
    down = "model.layers.2.mlp.down_proj.weight"
    old, new = case.before.gradients[down], case.after.gradients[down]
    assert float((new[:, 28:] - old[:, :13]).abs().max() / old.abs().max()) <= EXACT
