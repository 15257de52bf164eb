"""A run that grows goes on with its moments, its count of steps and its ages; the old run is left as it was."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from growformer import api
from growformer.errors import SourceError
from growformer.optim.dual import grow_moments
from growformer.proof.prove import new_entries
from growformer.training.loop import Recipe, Run, bits_per_byte

RECIPE = Recipe(warmup=2, batch=2, length=16)
TEXT = torch.randint(0, 37, (500,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
STEPS = 3


def started() -> Run:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=12,
        intermediate_size=14,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    run = Run(LlamaForCausalLM(config), RECIPE)
    go(run, STEPS)
    return run


def go(run: Run, steps: int) -> list[float]:
    losses: list[float] = []
    run.train(TEXT, steps, torch.Generator().manual_seed(run.step), lambda step, loss: losses.append(loss))
    return losses


def grow(run: Run, **request: int) -> tuple[Any, Run]:
    plan, model = api.plan(run.model, **request), api.expand(run.model, **request)
    return plan, run.grown(plan, model)


def state(run: Run) -> dict[str, Any]:
    return {name: run.optimizer.state.get(x) for name, x in run.model.named_parameters()}


def test_state_follows_the_plan() -> None:
    run = started()
    before = {name: {key: x.clone() for key, x in kept.items()} for name, kept in state(run).items()}
    plan, grown = grow(run, hidden_size=20, head_dim=10, num_hidden_layers=3)
    moments = [
        grow_moments(plan, {name: kept[key] for name, kept in before.items()}, power)
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2))
    ]
    new = new_entries(plan)
    parameters = dict(grown.model.named_parameters())
    fresh = set()
    for name, kept in state(grown).items():
        births = grown.ages.births(parameters[name])
        if plan.by_name[name].source is None:
            fresh.add(name)
            assert not kept and not births.any()
            continue
        assert torch.equal(kept["exp_avg"], moments[0][name]) and torch.equal(kept["exp_avg_sq"], moments[1][name])
        assert kept["exp_avg"].abs().sum() > 0
        assert int(kept["step"]) == STEPS
        assert torch.equal(births, STEPS * new[name].long())
    assert len(fresh) == 9 and grown.step == STEPS
    # The old run is as it was, and can go on by itself.
    go(grown, 1)
    for name, kept in state(run).items():
        assert all(torch.equal(kept[key], x) for key, x in before[name].items())
    go(run, 1)


def test_ages_are_kept_through_a_second_growth() -> None:
    run = started()
    first, run = grow(run, intermediate_size=17, num_hidden_layers=3)
    go(run, 2)
    second, run = grow(run, hidden_size=20)
    parameters = dict(run.model.named_parameters())
    oldest = next(t.name for t in first.tensors if t.source and t.name.endswith("0.mlp.up_proj.weight"))
    births = run.ages.births(parameters[oldest])
    assert births.shape == (17, 20)
    assert births[:14, :12].eq(0).all() and births[14:, :12].eq(STEPS).all() and births[:, 12:].eq(STEPS + 2).all()
    # A tensor that began as a whole counts from its own first step.
    (newest,) = {t.name for t in first.tensors if t.source is None and t.name.endswith("up_proj.weight")}
    assert int(run.optimizer.state[parameters[newest]]["step"]) == 2
    births = run.ages.births(parameters[newest])
    assert births[:, :12].eq(0).all() and births[:, 12:].eq(2).all()
    assert second.by_name[newest].source == newest


def test_the_next_step_is_the_old_runs_where_nothing_is_scaled() -> None:
    # MLP growth leaves old gradients as they are, so the same batch moves old entries the same way; a run without the
    # moments is the control. Updates are of the order of the learning rate, differences of float32's rounding.
    run = started()
    plan, grown = grow(run, intermediate_size=17)
    forgetful = Run(api.expand(run.model, intermediate_size=17), RECIPE)
    forgetful.step = run.step
    new = new_entries(plan)
    moved = []
    for r in (run, grown, forgetful):
        before = {name: x.detach().clone() for name, x in r.model.named_parameters()}
        go(r, 1)
        updates = {name: x.detach() - before[name] for name, x in r.model.named_parameters()}
        moved.append(torch.cat([x.flatten() if r is run else x[~new[name]] for name, x in updates.items()]))
    apart = [float((moved[i] - moved[0]).norm() / moved[0].norm()) for i in (1, 2)]
    assert apart[0] * 100 < apart[1]


def test_a_model_that_the_plan_did_not_make_is_refused() -> None:
    run = started()
    plan = api.plan(run.model, intermediate_size=17)
    deeper = api.expand(run.model, num_hidden_layers=3)
    with pytest.raises(SourceError, match=r"layers\..*is a parameter of the grown model, but no tensor of the plan"):
        run.grown(plan, deeper)


def test_gains_and_biases_are_not_decayed() -> None:
    run = started()
    decays = {
        name: group["weight_decay"]
        for group in run.optimizer.param_groups
        for x in group["params"]
        for name, y in run.model.named_parameters()
        if x is y
    }
    assert {name for name, decay in decays.items() if decay == 0} == {name for name in decays if "norm" in name}
    assert len(decays) == len(list(run.model.named_parameters()))


def test_bits_per_byte_of_a_model_that_knows_nothing() -> None:
    run = started()
    with torch.no_grad():
        run.model.model.norm.weight.zero_()
    tokens = torch.randint(0, 37, (5, 16))
    uniform = float(torch.log2(torch.tensor(37.0)))
    assert bits_per_byte(run.model, tokens, batch=2) == pytest.approx(uniform, rel=1e-6)
