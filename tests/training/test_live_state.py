"""A run that grew is the run that its saved files make: weights, moments, counts, groups and rates."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import growformer as gf
from growformer.errors import RequestError
from growformer.optim import RULES, StateRule, declare, rates_of, rule_of
from growformer.optim.dual import grow_moments
from growformer.proof.bar import BAR
from growformer.proof.claim_alive import new_entries
from tests.training.live_kit import GROWTHS, adamw, batch, model, named_state, train

KIND = "llama-tied-bias"
ALL = GROWTHS[KIND]["all"]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda of: adamw(of),
    "AdamW, foreach, amsgrad": lambda of: adamw(of, foreach=True, amsgrad=True),
    "AdamW, fused": lambda of: adamw(of, fused=True),
    "AdamW, maximize, capturable off": lambda of: torch.optim.AdamW(of.parameters(), lr=1e-3, maximize=True),
    "Adam": lambda of: torch.optim.Adam(of.parameters(), lr=1e-3, weight_decay=0.1),
    "NAdam": lambda of: torch.optim.NAdam(of.parameters(), lr=1e-3),
    "RAdam": lambda of: torch.optim.RAdam(of.parameters(), lr=1e-3),
    "Adamax": lambda of: torch.optim.Adamax(of.parameters(), lr=1e-3),
    "SGD": lambda of: torch.optim.SGD(of.parameters(), lr=1e-3),
    "SGD, momentum": lambda of: torch.optim.SGD(of.parameters(), lr=1e-3, momentum=0.9, nesterov=True),
    "Adagrad": lambda of: torch.optim.Adagrad(of.parameters(), lr=1e-3, initial_accumulator_value=0.1),
    "RMSprop": lambda of: torch.optim.RMSprop(of.parameters(), lr=1e-3, momentum=0.9, centered=True),
    "Adafactor": lambda of: torch.optim.Adafactor(of.parameters(), lr=1e-3),
    "Muon": lambda of: torch.optim.Muon([x for x in of.parameters() if x.dim() == 2], lr=1e-3),
}


@pytest.fixture
def float64() -> Iterator[None]:
    """Products that optimizers keep are of the default dtype, and are loaded in the parameter's."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_as_its_saved_files_do(name: str, tmp_path: Path) -> None:
    make = OPTIMIZERS[name]
    of = model(KIND)
    optimizer = make(of)
    train(of, optimizer, range(3))
    gf.grow(of, optimizer, warmup=3, **ALL)
    train(of, optimizer, range(3, 4))

    of.save_pretrained(tmp_path)
    twin = type(of).from_pretrained(tmp_path, dtype=torch.float64).train()
    other = make(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rates_of(other, twin).load_state_dict(rates_of(optimizer).state_dict())
    losses = train(of, optimizer, range(4, 8))
    assert losses == train(twin, other, range(4, 8))
    live, rebuilt = dict(of.named_parameters()), dict(twin.named_parameters())
    assert list(live) == list(rebuilt)
    assert all(torch.equal(live[name], rebuilt[name]) for name in live)


def test_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    of = model(KIND)
    optimizer = adamw(of)
    train(of, optimizer, range(3))
    gf.grow(of, optimizer, warmup=3, **ALL)
    of.save_pretrained(tmp_path)
    torch.save([optimizer.state_dict(), rates_of(optimizer).state_dict()], tmp_path / "optimizer.pt")
    script = f"""
import torch
from transformers import AutoModelForCausalLM
from growformer.optim import rates_of
from tests.training.live_kit import adamw, train
of = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float64).train()
optimizer = adamw(of)
state, rates = torch.load({str(tmp_path / "optimizer.pt")!r}, weights_only=True)
optimizer.load_state_dict(state)
rates_of(optimizer, of).load_state_dict(rates)
print(train(of, optimizer, range(3, 6)))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(train(of, optimizer, range(3, 6)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_follows_the_plan(name: str) -> None:
    of = model(KIND)
    optimizer = OPTIMIZERS[name](of)
    rule = rule_of(optimizer)
    train(of, optimizer, range(3))
    before = named_state(of, optimizer)
    gf.grow(of, optimizer, **ALL)
    plan, after = of.growformer_plan, named_state(of, optimizer)
    new = new_entries(plan)
    shapes = {name: x.shape for name, x in of.named_parameters()}
    for name, kept in after.items():
        source = plan.by_name[name].source
        if source is None:
            assert set(kept) <= (rule.keys if rule.eager else set())
            continue
        assert set(kept) == set(before[source])
        for key, power in rule.moments.items():
            if not isinstance(kept.get(key), torch.Tensor):
                continue
            wanted = grow_moments(plan, {source: before[source][key]}, power)[name]
            old, start = ~new[name], optimizer.defaults.get(rule.start.get(key, ""), 0.0)
            assert torch.equal(kept[key][old], wanted[old]) and kept[key].shape == shapes[name]
            assert (kept[key][~old] == start).all()
        for key in rule.counts:
            assert key not in kept or float(kept[key]) == float(before[source][key])
    carried = [x for kept in after.values() for x in kept.values() if isinstance(x, torch.Tensor) and x.dim()]
    assert all(x.untyped_storage().data_ptr() for x in carried)


@pytest.mark.parametrize("tall", [True, False])
def test_factored_moments_keep_their_estimates(tall: bool) -> None:
    # Adafactor's v[i, j] = rows[i] columns[j] / mean(rows): at old entries it must be the old estimate, carried.
    of = model(KIND)
    optimizer = torch.optim.Adafactor(of.parameters(), lr=1e-3)
    train(of, optimizer, range(3))

    def estimates() -> dict[str, torch.Tensor]:
        found = {}
        for name, kept in named_state(of, optimizer).items():
            if "row_var" in kept:
                rows, columns = kept["row_var"], kept["col_var"]
                found[name] = rows * columns / rows.mean(-2, keepdim=True)
        return found

    before = estimates()
    gf.grow(of, optimizer, **(GROWTHS[KIND]["hidden"] if tall else GROWTHS[KIND]["mlp"]))
    new = new_entries(of.growformer_plan)
    wanted = grow_moments(of.growformer_plan, before, 2)
    for name, found in estimates().items():
        old = ~new[name]
        assert float((found - wanted[name])[old].abs().max() / wanted[name].abs().max()) < BAR
        assert found[~old].numel() == 0 or float(found[~old].min()) > 0, "no new entry starts with a variance of 0"


def test_new_parameters_join_their_neighbours_group() -> None:
    of = model(KIND)
    optimizer = adamw(of)
    train(of, optimizer, range(2))
    gf.grow(of, optimizer, num_hidden_layers=5, layers_at=[0, 3])
    wide, flat = ({id(x) for x in group["params"]} for group in optimizer.param_groups)
    for x in of.parameters():
        assert (id(x) in wide) == (x.dim() > 1) and (id(x) in flat) == (x.dim() <= 1)
    # In the model's order, as an optimizer made for the grown model has them.
    assert [list(map(id, g["params"])) for g in adamw(of).param_groups] == [
        list(map(id, g["params"])) for g in optimizer.param_groups
    ]


def test_groups_in_another_order_and_parameters_of_others() -> None:
    of = model(KIND)
    stranger = torch.nn.Parameter(torch.ones(3))
    backwards = [*reversed(list(of.parameters())), stranger]
    optimizer = torch.optim.AdamW([{"params": backwards, "param_names": [str(i) for i in range(len(backwards))]}])
    train(of, optimizer, range(1))
    gf.grow(of, optimizer, num_hidden_layers=4, intermediate_size=40)
    params = optimizer.param_groups[0]["params"]
    assert {id(x) for x in params} == {id(x) for x in of.parameters()} | {id(stranger)}
    names = {x: name for name, x in of.named_parameters()}
    plan = of.growformer_plan
    for before, after in pairwise(params):
        if after in names and plan.by_name[names[after]].source is None:
            assert names[before].rpartition("layers.")[2][2:] == names[after].rpartition("layers.")[2][2:]
    train(of, optimizer, range(1, 3))


def test_names_that_the_optimizer_keeps_are_the_grown_models() -> None:
    of = model(KIND)
    optimizer = torch.optim.AdamW([(f"module.{name}", x) for name, x in of.named_parameters()])
    gf.grow(of, optimizer, num_hidden_layers=5)
    assert optimizer.param_groups[0]["param_names"] == [f"module.{name}" for name, _ in of.named_parameters()]


def test_a_frozen_tensor_stays_frozen_and_out_of_the_optimizer() -> None:
    of = model(KIND)
    for name, x in of.named_parameters():
        x.requires_grad_("mlp" not in name)
    optimizer = torch.optim.AdamW([x for x in of.parameters() if x.requires_grad])
    train(of, optimizer, range(2))
    gf.grow(of, optimizer, **ALL)
    held = {id(x) for x in optimizer.param_groups[0]["params"]}
    for name, x in of.named_parameters():
        assert x.requires_grad == ("mlp" not in name) == (id(x) in held)
    train(of, optimizer, range(2, 4))


def test_before_the_first_step_there_is_nothing_to_carry() -> None:
    of, twin = model(KIND), model(KIND)
    optimizer = adamw(of)
    gf.grow(of, optimizer, **ALL)
    gf.grow(twin, **ALL)
    assert train(of, optimizer, range(4)) == train(twin, adamw(twin), range(4))


def test_ages_are_kept_through_a_second_growth() -> None:
    of = model(KIND)
    optimizer = adamw(of)
    rates = rates_of(optimizer)
    train(of, optimizer, range(3))
    gf.grow(of, optimizer, intermediate_size=40, num_hidden_layers=4)
    train(of, optimizer, range(3, 5))
    first = of.growformer_plan
    gf.grow(of, optimizer, hidden_size=36)
    second = of.growformer_plan
    named = dict(of.named_parameters())
    oldest = next(t.name for t in first.tensors if t.source and t.name.endswith("0.mlp.up_proj.weight"))
    births = rates.births(named[oldest])
    assert births[:28, :24].eq(0).all() and births[28:, :24].eq(3).all() and births[:, 24:].eq(5).all()
    # A tensor that began as a whole counts from its own first step.
    (newest,) = {t.name for t in first.tensors if t.source is None and t.name.endswith("up_proj.weight")}
    assert second.by_name[newest].source == newest
    assert int(optimizer.state[named[newest]]["step"]) == 2
    births = rates.births(named[newest])
    assert births[:, :24].eq(0).all() and births[:, 24:].eq(2).all()
    saved = rates.state_dict()
    assert set(saved["parameters"]) <= set(named)


class Lion(torch.optim.Optimizer):
    """Keeps one tensor beside each parameter, and is known to nobody."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    kept = self.state[x].setdefault("slow", torch.zeros_like(x))
                    x.data.sub_(group["lr"] * torch.sign(0.9 * kept + 0.1 * x.grad))
                    kept.lerp_(x.grad, 0.01)


def test_an_unknown_optimizer_is_refused_until_it_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growformer.optim.rules.RULES", dict(RULES))
    of = model(KIND)
    optimizer = Lion(of.parameters())
    train(of, optimizer, range(2))
    before = {name: x.detach().clone() for name, x in of.named_parameters()}
    with pytest.raises(RequestError, match=r"Lion keeps beside each parameter is not declared.*declare\(Lion"):
        gf.grow(of, optimizer, intermediate_size=40)
    declare(Lion, StateRule(moments={}, counts=()))
    with pytest.raises(RequestError, match=r"Lion keeps 'slow' beside model\.embed_tokens\.weight.*'slow'"):
        gf.grow(of, optimizer, intermediate_size=40)
    assert all(torch.equal(x, before[name]) for name, x in of.named_parameters())
    declare(Lion, StateRule(moments={"slow": 1}, counts=()))
    kept = named_state(of, optimizer)
    gf.grow(of, optimizer, head_dim=14)
    name = "model.layers.0.self_attn.k_proj.weight"
    wanted = grow_moments(of.growformer_plan, {name: kept[name]["slow"]}, 1)[name]
    assert torch.equal(optimizer.state[of.get_parameter(name)]["slow"], wanted)
    train(of, optimizer, range(2, 4))


def test_a_subclass_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growformer.optim.rules.RULES", dict(RULES))

    class Mine(torch.optim.AdamW):
        pass

    of = model(KIND)
    with pytest.raises(RequestError, match=r"Mine"):
        gf.grow(of, Mine(of.parameters()), intermediate_size=40)
    declare(Mine, rule_of(torch.optim.AdamW))
    gf.grow(of, Mine(of.parameters()), intermediate_size=40)


def test_averages_grow_along_with_the_same_new_entries() -> None:
    of = model(KIND)
    optimizer = adamw(of)
    mean = torch.optim.swa_utils.AveragedModel(of, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    copied = copy.deepcopy(of).eval()
    train(of, optimizer, range(3), lambda _: mean.update_parameters(of))
    tokens = batch(9)
    before = [each(input_ids=tokens).logits.detach() for each in (mean, copied)]
    ids = list(map(id, mean.parameters()))
    gf.grow(of, optimizer, averages=[mean, copied], **ALL)
    after = [each(input_ids=tokens).logits.detach() for each in (mean, copied)]
    for one, other in zip(before, after, strict=True):
        assert float((one - other).abs().max() / one.abs().max()) < 1e-5  # float32 norms and rotary tables inside
    assert set(ids) <= set(map(id, mean.parameters())) and not copied.training
    new = gf.new_parameters(of)
    live = dict(of.named_parameters())
    for each in (mean.module, copied):
        for name, x in each.named_parameters():
            mask = new.get(name, torch.zeros(x.shape, dtype=torch.bool))
            assert torch.equal(x[mask], live[name][mask])
        assert any(not torch.equal(x, live[name]) for name, x in each.named_parameters())
    train(of, optimizer, range(3, 5), lambda _: mean.update_parameters(of))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
def test_first_updates_of_new_entries_are_a_fresh_optimizers(betas: tuple[float, float]) -> None:
    of = model(KIND)
    optimizer = adamw(of, betas=betas)
    train(of, optimizer, range(2))
    for kept in optimizer.state.values():
        kept["step"].fill_(1000)
    gf.grow(of, optimizer, **ALL)
    new, before = gf.new_parameters(of), {name: x.detach().clone() for name, x in of.named_parameters()}

    def updates(rated: bool, fresh: bool) -> torch.Tensor:
        twin = copy.deepcopy(of)
        other = adamw(twin, betas=betas)
        if not fresh:
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if rated:
            rates_of(other, twin).load_state_dict(rates_of(optimizer).state_dict())
        train(twin, other, range(2, 3))
        named = dict(twin.named_parameters())
        return torch.cat([(named[name].detach() - before[name])[mask] for name, mask in new.items()])

    wanted = updates(rated=False, fresh=True)
    assert float((updates(rated=True, fresh=False) - wanted).abs().max() / wanted.abs().max()) < BAR
    without = updates(rated=False, fresh=False)
    ratio = float(without.abs().max() / wanted.abs().max())
    assert ratio > 2 if betas[1] == 0.999 else ratio < 1.01
    assert float((without - wanted).abs().max() / wanted.abs().max()) > 0.5
