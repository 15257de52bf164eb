"""What fades in: exact at growth, in mid-fade what a loop by hand gives, saved at any step, and a line search."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import growformer as gf
from growformer.errors import RequestError
from growformer.optim import rates_of
from growformer.planning import Plan
from growformer.proof.bar import BAR
from growformer.training import line_search
from growformer.training.place import Place
from tests.training.live_kit import LR, Model, Optimizer, adamw, batch, logits64, model, relative, train, wide
from tests.training.train_kit import equal, recipe, training_state, weights
from tests.training.train_kit import train as run

KIND = "llama-tied-bias"
MSG: dict[str, int] = {
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 14,
    "num_hidden_layers": 4,
}
GATED: dict[str, int] = {name: size for name, size in MSG.items() if name != "head_dim"}
STEPS = 3
GAINS = "post-branch norms whose gains are stored less 1"


@pytest.fixture
def float64() -> Iterator[None]:
    """A loop by hand rounds otherwise, which norms and rotary tables in float32 would make much of."""
    with wide():
        yield


def made(kind: str) -> Model:
    """A tiny model; `GAINS`: Gemma 2, whose new layers are closed at a norm's gain."""
    return model("gemma2" if kind == GAINS else kind)


def sgd(of: Model) -> Optimizer:
    return torch.optim.SGD(of.parameters(), lr=1e-2)


def targets(of: Model, method: str, request: dict[str, int]) -> tuple[dict[str, Any], Model]:
    """What fades in, by parameter name, and the model that has grown so, all of it at zero."""
    grown = copy.deepcopy(of)
    gf.grow(grown, None, method=method, fade=0, **request)
    return grown.growformer_behind, grown


CASES = [
    (KIND, "msg", MSG),
    (KIND, "gated", GATED),
    ("gpt2", "msg", {"n_inner": 120, "n_layer": 5}),
    ("gpt2", "gated", {"n_inner": 120, "n_layer": 5}),
    ("mixtral", "msg", {"intermediate_size": 40, "num_hidden_layers": 4}),
    (GAINS, "msg", {"intermediate_size": 40, "num_hidden_layers": 4}),
    (GAINS, "gated", {"num_hidden_layers": 4}),
]


@pytest.mark.parametrize(("kind", "method", "request_"), CASES)
def test_growth_is_exact_and_full_scale_is_not(kind: str, method: str, request_: dict[str, int]) -> None:
    of = made(kind)
    before = logits64(of)
    behind, grown = targets(of, method, request_)
    assert relative(before, logits64(grown)) < BAR
    assert behind and all(bool(each.at.any()) and bool((each.target != 0).all()) for each in behind.values())
    with torch.no_grad():
        for name, each in behind.items():
            x = grown.get_parameter(name)
            assert bool((x[each.at] == -each.offset).all())
            x[each.at] = each.target - each.offset
    assert relative(before, logits64(grown)) > 1e-3


def test_the_target_of_gated_layers_is_the_layer_before() -> None:
    of = model(KIND)
    behind, grown = targets(of, "gated", {"num_hidden_layers": 4})
    (fresh,) = [layer for layer, source in enumerate(grown.growformer_plan.layers["layer"]) if source is None]
    live, old = dict(grown.named_parameters()), dict(of.named_parameters())
    donor = f"model.layers.{fresh - 1}."
    assert {name.removeprefix(f"model.layers.{fresh}.") for name in behind} == {
        f"{part}.{kind}" for part in ("self_attn.o_proj", "mlp.down_proj") for kind in ("weight", "bias")
    }
    for name, x in live.items():
        if name.startswith(f"model.layers.{fresh}."):
            like = old[name.replace(f"model.layers.{fresh}.", donor)]
            there = behind[name].target.reshape(x.shape) if name in behind else x
            assert torch.equal(there, like)


def test_what_msg_draws_is_what_the_seed_says() -> None:
    of = model(KIND)
    plan = gf.plan(of, method="msg", **MSG)
    assert plan.behind and Plan.from_json(plan.to_json()).behind == plan.behind
    found = []
    for seed in (0, 0, 1):
        grown = gf.expand(of, method="msg", seed=seed, **MSG)
        found.append(grown.growformer_behind)
    for name, each in found[0].items():
        assert torch.equal(each.target, found[1][name].target) and not torch.equal(each.target, found[2][name].target)
        assert float(each.target.std()) > 0 or each.target.numel() == 1
    live = targets(of, "msg", MSG)[0]
    assert all(torch.equal(each.target, live[name].target) for name, each in found[0].items())


def snapshot(of: Model) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in of.named_parameters()}


class ByHand:
    """Trains with T beside the weights: they are c T at every pass, and an update of T counts as c times that.

    SGD, or AdamW (betas 0.9 and 0.999, eps 1e-8, decay 0.1 of matrices) where every entry has the age of its own.
    """

    def __init__(self, of: Model, behind: dict[str, Any], adam: bool) -> None:
        self.of, self.adam = of, adam
        self.at = {name: each.at for name, each in behind.items()}
        self.held = {name: each.target.clone() for name, each in behind.items()}
        assert not any(each.offset for each in behind.values())
        self.m = {name: torch.zeros_like(x) for name, x in of.named_parameters()}
        self.v = {name: torch.zeros_like(x) for name, x in of.named_parameters()}

    def updated(self, name: str, j: int, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        if not self.adam:
            return x - LR * gradient
        m, v = self.m[name], self.v[name]
        m.mul_(0.9).add_(0.1 * gradient)
        v.mul_(0.999).add_(0.001 * gradient**2)
        kept = x * (1 - LR * (0.1 if x.dim() > 1 else 0.0))
        return kept - LR * (m / (1 - 0.9**j)) / ((v / (1 - 0.999**j)).sqrt() + 1e-8)

    def train(self, steps: range, fade: int) -> list[dict[str, torch.Tensor]]:
        """The weights after each step."""
        seen = []
        for j, number in enumerate(steps, 1):
            tokens = batch(number)
            self.of(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            with torch.no_grad():
                for name, x in self.of.named_parameters():
                    assert x.grad is not None
                    full = x.detach().clone()
                    if name in self.held:
                        full[self.at[name]] = self.held[name]
                    full = self.updated(name, j, full, x.grad)
                    if name in self.held:
                        # At c = 0 the update counts as nothing.
                        self.held[name] = full[self.at[name]] if j > 1 else self.held[name]
                        full[self.at[name]] = min(1.0, j / fade) * self.held[name]
                    x.copy_(full)
            self.of.zero_grad()
            seen.append(snapshot(self.of))
        return seen


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("method", "adam"), [("msg", False), ("gated", True)])
def test_in_mid_fade_it_is_the_loop_by_hand(method: str, adam: bool) -> None:
    of = model(KIND)
    request = MSG if method == "msg" else GATED
    behind, twin = targets(of, method, request)
    optimizer = adamw(of) if adam else sgd(of)
    gf.grow(of, optimizer, method=method, fade=STEPS, **request)
    seen: list[dict[str, torch.Tensor]] = []
    train(of, optimizer, range(STEPS + 1), lambda _: seen.append(snapshot(of)))
    wanted = ByHand(twin, behind, adam).train(range(STEPS + 1), STEPS)
    for one, other in zip(wanted, seen, strict=True):
        for name, x in one.items():
            assert relative(x, other[name]) < BAR, name
    assert not rates_of(optimizer).tables
    # The loop that fades in over one step more is another one.
    twin = targets(model(KIND), method, request)[1]
    slower = ByHand(twin, behind, adam).train(range(1), STEPS + 1)
    assert max(relative(x, seen[0][name]) for name, x in slower[0].items()) > 1e-3


def resumed(of: Model, optimizer: Optimizer, make: Any, folder: Path, rated: bool = True) -> tuple[Model, Optimizer]:
    """What a plain loop saves, read back."""
    of.save_pretrained(folder)
    torch.save([optimizer.state_dict(), rates_of(optimizer).state_dict()], folder / "training.pt")
    twin = type(of).from_pretrained(folder, dtype=torch.float64).train()
    other = make(twin)
    state, rates = torch.load(folder / "training.pt", weights_only=True)
    other.load_state_dict(state)
    if rated:
        rates_of(other, twin).load_state_dict(rates)
    return twin, other


@pytest.mark.parametrize(("make", "taken"), [(adamw, 0), (adamw, 2), (sgd, 0), (sgd, 1)])
def test_a_run_that_stops_in_mid_fade_resumes_to_the_same_bits(make: Any, taken: int, tmp_path: Path) -> None:
    of = model(KIND)
    optimizer = make(of)
    train(of, optimizer, range(2))
    gf.grow(of, optimizer, method="msg", fade=STEPS, warmup=2, **MSG)
    train(of, optimizer, range(2, 2 + taken))
    twin, other = resumed(of, optimizer, make, tmp_path / "all")
    without, bare = resumed(of, optimizer, make, tmp_path / "none", rated=False)
    rest = range(2 + taken, STEPS + 3)
    losses = train(of, optimizer, rest)
    assert losses == train(twin, other, rest) != train(without, bare, rest)
    assert equal(snapshot(of), snapshot(twin)) and not equal(snapshot(of), snapshot(without))


def test_train_resumes_in_mid_fade(tmp_path: Path) -> None:
    grow = [
        {"at": {"step": 3}, "to": {"intermediate_size": 28, "num_hidden_layers": 2}, "method": "msg", "fade": 5},
        {"at": {"step": 6}, "to": {"num_hidden_layers": 3}, "method": "gated", "fade": 2},
    ]
    path = recipe(tmp_path, checkpoint={"every": 3, "keep": 2}, budget={"steps": 10}, grow=grow)
    whole, _ = run(path, tmp_path / "whole")
    run(path, tmp_path / "again", cut_at=8)
    # The first growth is half way then, and the second has not begun.
    saved = training_state(Place(tmp_path / "again"))["optimizers"][0]["rates"]["parameters"]
    assert {"target" in each for each in saved.values() if any(b["fade"] for b in each["blocks"])} == {True, False}
    again, watcher = run(path, tmp_path / "again", resume=True)
    assert any("Resuming at step 6" in said for said in watcher.said)
    assert weights(whole.model) == weights(again.model)
    assert equal(training_state(whole), training_state(again))


def test_a_second_growth_in_mid_fade_leaves_it_going() -> None:
    of = model(KIND)
    optimizer = sgd(of)
    gf.grow(of, optimizer, method="msg", fade=STEPS, intermediate_size=40)
    with pytest.raises(RequestError, match="has not begun to fade in; take a step"):
        gf.grow(of, optimizer, hidden_size=36)
    train(of, optimizer, range(2))
    with pytest.raises(RequestError, match=r"freeze_old: .*down_proj.* still fade in"):
        gf.grow(of, optimizer, freeze_old=True, hidden_size=36)
    alone, before = copy.deepcopy(of), snapshot(of)
    twin = sgd(alone)
    rates_of(twin, alone).load_state_dict(rates_of(optimizer).state_dict())
    gf.grow(of, optimizer, hidden_size=36)
    # Without a rate of learning all that moves is the mask: from 2/3 to 1.
    for each in (optimizer, twin):
        each.param_groups[0]["lr"] = 0.0
    train(of, optimizer, range(2, 3))
    train(alone, twin, range(2, 3))
    name = "model.layers.0.mlp.down_proj.weight"
    for model_ in (of, alone):
        now = model_.get_parameter(name).detach()[:24]
        old = before[name] * now[0, 0] / before[name][0, 0]  # the stream may have been rescaled
        assert relative(old[:, :28], now[:, :28]) < BAR
        assert relative(old[:, 28:] * 1.5, now[:, 28:]) < BAR


@pytest.mark.usefixtures("float64")
def test_a_line_search_keeps_what_lowers_the_loss_most() -> None:
    of = model(KIND)
    tokens = batch(0)

    def loss(which: Model) -> Any:
        return lambda: which(input_ids=tokens, labels=tokens, use_cache=False).loss

    before = float(loss(of)().detach())
    tried = (0.5, 1.0, -0.5, -1.0)
    for method in ("gated", "msg"):
        grown = gf.expand(of, method=method, **GATED)
        targets_ = grown.growformer_behind
        found = line_search(grown, loss(grown), tried)
        assert list(found.losses) == [0.0, *tried] and abs(found.losses[0.0] / before - 1) < BAR
        assert (
            found.losses[found.scale]
            == min(found.losses.values())
            == float(loss(grown)().detach())
            <= before * (1 + BAR)
        )
        for name, each in targets_.items():
            assert torch.equal(grown.get_parameter(name)[each.at], each.target * found.scale)
        assert str(found).startswith(f"new entries at {found.scale:g} of their target")
        with pytest.raises(RequestError, match="left nothing to search"):
            line_search(grown, loss(grown))
    # Where every other scale is worse, zero stays.
    grown = gf.expand(of, method="gated", **GATED)
    at = {name: each.at for name, each in grown.growformer_behind.items()}

    def size() -> float:
        return sum(float(grown.get_parameter(name)[here].abs().sum()) for name, here in at.items())

    assert line_search(grown, size).scale == 0.0
    grown = gf.expand(of, method="gated", **GATED)
    assert line_search(grown, lambda: -size(), [0.5, 1, float(2)]).scale == 2.0


def test_a_line_search_leaves_the_model_as_it_was_when_it_fails() -> None:
    of = model(KIND)
    optimizer = adamw(of)
    gf.grow(of, optimizer, method="gated", fade=0, num_hidden_layers=4)
    before = snapshot(of)
    calls = iter([1.0])
    with pytest.raises(StopIteration):
        line_search(of, lambda: next(calls))
    assert equal(before, snapshot(of)) and of.training
    with pytest.raises(RequestError, match="the loss is nan with the new entries at zero"):
        line_search(of, lambda: float("nan"))
    train(of, optimizer, range(1))
    with pytest.raises(RequestError, match="has been trained since"):
        line_search(of, lambda: 0.0)


def test_what_cannot_fade_in_is_refused_by_name(tmp_path: Path) -> None:
    of = model(KIND)
    before = snapshot(of)
    for request, said in (
        ({"method": "msg", "hidden_size": 36, "fade": 3}, r"hidden_size.*masks new hidden channels inside every norm"),
        ({"method": "msg", "intermediate_size": 40}, r"msg: new entries of 3 tensors fade in.*fade=K"),
        ({"intermediate_size": 40, "fade": 3}, "paper has nothing that fades in; msg and gated do"),
        ({"method": "msg", "intermediate_size": 40, "fade": -1}, "at least 0"),
        ({"method": "gated", "head_dim": 14, "fade": 3}, r"gated .* says nothing of that"),
    ):
        with pytest.raises(RequestError, match=said):
            gf.grow(of, adamw(of), **request)
    with pytest.raises(RequestError, match=r"down_proj.weight would fade in over steps, and there is no optimizer"):
        gf.grow(of, None, method="msg", fade=3, intermediate_size=40)
    frozen = model(KIND)
    frozen.get_parameter("model.layers.1.mlp.down_proj.weight").requires_grad_(False)
    with pytest.raises(RequestError, match=r"layers.1.mlp.down_proj.weight would fade in over steps, and is frozen"):
        gf.grow(frozen, adamw(frozen), method="msg", fade=3, intermediate_size=40)
    assert equal(before, snapshot(of))
    with pytest.raises(RequestError, match="a norm reads queries and keys"):
        gf.grow(model("qwen3"), None, method="msg", fade=0, head_dim=20)
    with pytest.raises(RequestError, match=r"line \d+: grow\[0\]: msg: .*fade: K in the recipe"):
        run(
            recipe(tmp_path, grow=[{"at": {"step": 4}, "to": {"intermediate_size": 28}, "method": "msg"}]),
            tmp_path / "o",
        )
