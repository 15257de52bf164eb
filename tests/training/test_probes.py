"""Growths of a recipe that ask a loss on the run's next text: GradMax, and how far a line search opens gated ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import growformer as gf
from growformer.errors import RequestError
from growformer.proof.bar import BAR
from growformer.training import saving
from growformer.training.data import Windows, byte_tokens
from growformer.training.flops import lift_flops, size_of_model
from growformer.training.log import read_log
from growformer.training.place import Place
from growformer.training.run import Run
from tests.training.test_train_shared import told, torchrun
from tests.training.train_kit import equal, recipe, train, training_state, weights

GROWN_AT, SEQUENCES, LENGTH = 4, 4, 16
GRADMAX: dict[str, Any] = {"at": {"step": GROWN_AT}, "to": {"intermediate_size": 28}, "method": "gradmax"}
SEARCHED: dict[str, Any] = {
    "at": {"step": GROWN_AT},
    "to": {"num_hidden_layers": 2},
    "method": "gated",
    "fade": "line-search",
}
OFTEN = {"every": 1, "keep": 99}


def growths(place: Place) -> list[dict[str, Any]]:
    return [line for line in read_log(place.log) if line["kind"] == "growth"]


def checkpoint(place: Place, step: int = GROWN_AT) -> Path:
    return place.checkpoints / f"step-{step:09d}"


def batches(path: Path, first: int, count: int) -> torch.Tensor:
    """The batches from a step on, [batch, sequence, token], as the text's order has them."""
    windows = Windows(byte_tokens([path.parent / "train.txt"]), LENGTH, 0)
    return windows.batch(first * SEQUENCES, count * SEQUENCES).reshape(count, SEQUENCES, LENGTH)


def loss_on(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([model(input_ids=each, labels=each, use_cache=False).loss for each in rows]).mean()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Place]:
    """The same run without a growth: its checkpoints are the growing ones' until they grow."""
    folder = tmp_path_factory.mktemp("small")
    path = recipe(folder, grow=[], checkpoint=OFTEN)
    return path, train(path, folder / "run")[0]


@pytest.mark.parametrize("count", [1, 2])
def test_gradmax_asks_the_next_batches(count: int, small: tuple[Path, Place], tmp_path: Path) -> None:
    path = recipe(tmp_path, grow=[{**GRADMAX, "probe_batches": count}], checkpoint=OFTEN)
    place, watcher = train(path, tmp_path / "run")
    before = saving.read_model(checkpoint(small[1]))
    rows = batches(path, GROWN_AT, count)
    request: dict[str, Any] = {"method": "gradmax", "intermediate_size": 28}
    wanted = gf.expand(before, closure=lambda: loss_on(before, rows), **request)
    found = dict(saving.read_model(checkpoint(place)).named_parameters())
    assert all(torch.equal(x, found[name]) for name, x in wanted.named_parameters())
    # Other text gives other columns.
    rows = batches(path, GROWN_AT + count, count)
    other = dict(gf.expand(before, closure=lambda: loss_on(before, rows), **request).named_parameters())
    reads = "model.layers.0.mlp.down_proj.weight"
    assert not torch.allclose(other[reads], found[reads])
    (line,) = growths(place)
    assert line["bits_per_byte"][0] == pytest.approx(line["bits_per_byte"][1], rel=1e-5)
    assert f"asked the loss on the next {64 * count} tokens" in " ".join(watcher.said)
    # The text goes on as if nothing had asked.
    states = [json.loads((checkpoint(p, 12) / "state.json").read_text())["progress"] for p in (place, small[1])]
    assert [state["position"] for state in states] == [12 * SEQUENCES] * 2


def test_what_asking_costs_is_the_run_s(tmp_path: Path) -> None:
    place, _ = train(recipe(tmp_path, grow=[{**GRADMAX, "probe_batches": 2}], checkpoint=OFTEN), tmp_path / "run")
    log = read_log(place.log)
    (line,) = growths(place)
    config = json.loads((checkpoint(place, 3) / "model" / "config.json").read_text())
    passes = size_of_model(config, LENGTH).flops_per_token
    # One layer; each of eight gated units takes the matrix of its own, [hidden, hidden] over tokens.
    assert line["probe_flops"] == 2 * 64 * (passes + 8 * 2 * 16 * 16) and line["probe_tokens"] == 128
    flops = {each["step"]: each["flops"] for each in log if each["kind"] == "step"}
    assert line["flops"] - flops[GROWN_AT] == pytest.approx(line["probe_flops"])
    after = size_of_model({**config, "intermediate_size": 28}, LENGTH).flops_per_token
    assert flops[GROWN_AT + 1] - flops[GROWN_AT] == pytest.approx(line["probe_flops"] + 64 * after)


# At this learning rate copied units help at once, and copied layers do not.
@pytest.mark.parametrize(("to", "count", "opens"), [("mlp", 1, True), ("mlp", 3, True), ("layer", 1, False)])
def test_a_line_search_takes_the_scale_of_the_lowest_loss(to: str, count: int, opens: bool, tmp_path: Path) -> None:
    sizes = {"mlp": {"intermediate_size": 40}, "layer": {"num_hidden_layers": 2}}[to]
    grow = [{**SEARCHED, "to": sizes, "probe_batches": count}]
    path = recipe(tmp_path, grow=grow, checkpoint=OFTEN, prove=True, optimizer={"name": "AdamW", "lr": 0.1})
    place, watcher = train(path, tmp_path / "run")
    (line,) = growths(place)
    tried = dict(map(tuple, line["line_search"]["losses"]))
    scale = line["line_search"]["scale"]
    assert tried[scale] == min(tried.values()) <= tried[0.0] and len(tried) == 5
    # It is folded in: the stock model on disk has that loss on those batches, and no other scale's.
    rows = batches(path, GROWN_AT, count)
    with torch.no_grad():
        found = float(loss_on(saving.read_model(checkpoint(place)).eval(), rows))
    assert found == pytest.approx(tried[scale], abs=1e-5)
    assert (scale > 0) == opens and all(abs(found - loss) > 1e-4 for other, loss in tried.items() if other != scale)
    # Proved is the growth, with all that is new at zero.
    assert line["proof"]["exit_code"] == 0 and line["proof"]["measured"]["algebra"]["relative"] < BAR
    config = json.loads((checkpoint(place) / "model" / "config.json").read_text())
    assert line["probe_flops"] == pytest.approx(5 * 64 * count * size_of_model(config, LENGTH).flops_per_token / 3)
    assert f"new entries at {scale:g} of their target" in " ".join(watcher.said)


GPT2: Mapping[str, Any] = {
    "model": {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 16},
    "grow": [
        {"at": {"step": GROWN_AT}, "to": {"n_inner": 80}, "method": "gradmax", "probe_batches": 2},
        {"at": {"step": 7}, "to": {"n_layer": 2}, "method": "gated", "fade": "line-search"},
    ],
}
LIGO: dict[str, Any] = {
    "at": {"step": GROWN_AT},
    "to": {"hidden_size": 32, "num_hidden_layers": 2},
    "method": "ligo",
    "allow_change": True,
    "lift_steps": 3,
}
LLAMA: Mapping[str, Any] = {"grow": [{**GRADMAX, "probe_batches": 2}, {**SEARCHED, "at": {"step": 7}}]}
KINDS: dict[str, Mapping[str, Any]] = {
    "llama": LLAMA,
    "gpt2 with dropout": GPT2,
    "bf16": {**LLAMA, "precision": "bf16"},
    "FLOPs": {**LLAMA, "budget": {"flops": 3.0e7}},
    "ligo": {"grow": [LIGO, {**SEARCHED, "at": {"step": 7}, "to": {"num_hidden_layers": 3}}]},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_that_is_cut_resumes_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    path = recipe(tmp_path, KINDS[kind])
    place, _ = train(path, tmp_path / "whole")
    assert [line["step"] for line in growths(place)] == [GROWN_AT, 7]
    again, _ = train(path, tmp_path / "again", cut_at=GROWN_AT + 1)  # after the growth, before its checkpoint
    train(path, again.out, cut_at=8, resume=True)
    train(path, again.out, resume=True)
    assert weights(again.model) == weights(place.model)
    assert equal(training_state(again), training_state(place))
    logs = [[{k: v for k, v in each.items() if k != "seconds"} for each in read_log(p.log)] for p in (again, place)]
    assert logs[0] == logs[1]


def test_ligo_learns_its_lift_on_the_next_batches_each_once(small: tuple[Path, Place], tmp_path: Path) -> None:
    path = recipe(tmp_path, grow=[LIGO], checkpoint=OFTEN, prove=True)
    place, watcher = train(path, tmp_path / "run")
    before = saving.read_model(checkpoint(small[1])).eval()

    def grown(first: int) -> dict[str, torch.Tensor]:
        ahead = iter(batches(path, first, 3))
        loss: Any = lambda forward: loss_on(forward, next(ahead).unsqueeze(0))  # noqa: E731
        made = gf.expand(before, closure=loss, steps=3, method="ligo", allow_change=True, **LIGO["to"])
        return dict(made.named_parameters())

    found = dict(saving.read_model(checkpoint(place)).named_parameters())
    assert all(torch.equal(x, found[name]) for name, x in grown(GROWN_AT).items())
    assert not all(torch.equal(x, found[name]) for name, x in grown(GROWN_AT + 1).items())
    (line,) = growths(place)
    config = json.loads((checkpoint(place) / "model" / "config.json").read_text())
    plan = gf.plan(before, method="ligo", **LIGO["to"])
    per_step = 64 * size_of_model(config, LENGTH).flops_per_token + lift_flops(plan)
    assert line["probe_tokens"] == 3 * 64 and line["probe_flops"] == pytest.approx(3 * per_step)
    # It is another function, which nothing proves; the log says what that did to the loss.
    assert line["proof"] is None and line["bits_per_byte"][0] != line["bits_per_byte"][1]
    assert "another function, as asked for (hidden 16 -> 32: the lift is learned" in " ".join(watcher.said)


def test_a_growth_that_changes_the_function_is_not_proved(tmp_path: Path) -> None:
    grow = [{"at": {"step": GROWN_AT}, "to": {"num_hidden_layers": 2}, "method": "stack", "allow_change": True}]
    place, watcher = train(recipe(tmp_path, grow=grow, prove=True), tmp_path / "run")
    (line,) = growths(place)
    assert line["proof"] is None and line["parameters"][0] < line["parameters"][1]
    assert "another function, as asked for (layer 1 -> 2: whole layers stand again" in " ".join(watcher.said)


def test_a_resumed_run_that_asks_other_text_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, grow=[GRADMAX])
    place, _ = train(path, tmp_path / "whole")
    again, _ = train(path, tmp_path / "again", cut_at=GROWN_AT + 1)
    ahead = Run._ahead
    monkeypatch.setattr(Run, "_ahead", lambda self, count: ahead(self, count + 1)[1:])
    train(path, again.out, resume=True)
    assert weights(again.model) != weights(place.model)


def test_probes_that_use_up_the_budget_end_the_run(tmp_path: Path) -> None:
    flops = size_of_model({**GPT2["model"], "vocab_size": 256}, LENGTH).flops_per_token * 64
    grow = [{**GPT2["grow"][0], "at": {"step": 3}}]
    path = recipe(tmp_path, model=GPT2["model"], grow=grow, budget={"flops": 4.5 * flops})
    place, _ = train(path, tmp_path / "run")
    log = read_log(place.log)
    assert [each["step"] for each in log if each["kind"] == "step"] == [1, 2, 3]
    assert log[-1]["kind"] == "evaluation" and log[-1]["flops"] >= 4.5 * flops and place.model.is_dir()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grow": [{**GRADMAX, "method": "ligo"}]}, r"line \d+: grow\[0\]: .*the lift is learned.*allow_change: true"),
        (
            {"grow": [{**LIGO, "probe_batches": 2}]},
            r"grow\[0\]: probe_batches: 2: ligo asks no loss on them",
        ),
        ({"grow": [{**LIGO, "prove": True}]}, r"grow\[0\]: prove: true: ligo makes another function"),
        ({"grow": [{**GRADMAX, "lift_steps": 5}]}, r"grow\[0\]: lift_steps: 5: gradmax learns no lift; ligo does"),
        (
            {"grow": [{**GRADMAX, "to": {"intermediate_size": 28, "num_hidden_layers": 2}}]},
            r"line \d+: grow\[0\]: .*gradmax .* says nothing of that",
        ),
        (
            {
                "grow": [
                    {
                        **GRADMAX,
                        "method": "gradmax,layer=paper",
                        "to": {"intermediate_size": 28, "num_hidden_layers": 2},
                    }
                ]
            },
            r"grow\[0\]: gradmax.*: mlp grows alone by it, and .*layer.* grow; do one, then the other",
        ),
        ({"grow": [{**GRADMAX, "method": "paper", "probe_batches": 2}]}, r"grow\[0\]: probe_batches: 2: paper asks no"),
        ({"grow": [{**SEARCHED, "fade": 3, "probe_batches": 2}]}, r"grow\[0\]: probe_batches: 2: gated asks no loss"),
        ({"grow": [{**SEARCHED, "method": "paper"}]}, r"fade: line-search: paper has nothing that fades in"),
        (
            {"model": {**GPT2["model"], "activation_function": "relu"}, "grow": GPT2["grow"][:1]},
            r"grow\[0\]: n_inner 64 -> 80: .*activation_function=relu has no slope.*mlp=paper is alive",
        ),
        ({"grow": [{**SEARCHED, "fade": None}]}, r"say how many: fade: K in the recipe, or fade: line-search"),
        ({"grow": [{**SEARCHED, "probe_batches": 0}]}, r"grow\[0\]\.probe_batches: 0 is given; it must be"),
        (
            {"grow": [{**GRADMAX, "probe_batches": 3}], "budget": {"steps": 124}},
            r"budget: the text has .* 500 sequences of 16; 504 are asked for",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = recipe(tmp_path, changes)
    with pytest.raises(RequestError, match=says):
        train(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_trainer_s_callback_has_no_batches_to_ask() -> None:
    from growformer.training.trainer import GrowthCallback

    for more, key in (({"fade": "line-search"}, "fade: line-search"), ({"probe_batches": 2}, "probe_batches")):
        with pytest.raises(RequestError, match=rf"grow\[0\]\.{key}: the Trainer hands its batches to no callback"):
            GrowthCallback({5: {"num_hidden_layers": 2, "method": "gated", **more}})


@pytest.mark.slow
def test_two_processes_choose_alike(tmp_path: Path) -> None:
    path = recipe(tmp_path, GPT2, micro_batch=1)
    done = torchrun(tmp_path, path)
    assert done.returncode == 0, done.stderr
    first, second = told(tmp_path)
    assert first == second
    alone, _ = train(path, tmp_path / "alone")
    pairs = list(zip(growths(Place(tmp_path / "run")), growths(alone), strict=True))
    # Both processes ask GradMax's loss on all of the text; what the search tries, the first one measures for both.
    assert [two["probe_flops"] / one["probe_flops"] for two, one in pairs] == [2.0, 1.0]
    assert pairs[1][0]["line_search"]["scale"] == pairs[1][1]["line_search"]["scale"]
