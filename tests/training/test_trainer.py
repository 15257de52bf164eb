"""GrowthCallback: a stock Trainer's run grows where a schedule says, and resumes to the same bits."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import growformer
from growformer.errors import RequestError
from growformer.optim.rates import rates_of
from growformer.proof.bar import BAR
from growformer.training import GrowthCallback
from tests.training.live_kit import logits64, relative
from tests.training.trainer_kit import (
    GROWN_AT,
    SIZES,
    STEPS,
    Seen,
    Tensors,
    equal,
    growths,
    loaded,
    model,
    trainer,
    weights,
)

SCHEDULE: dict[int, dict[str, Any]] = {GROWN_AT: {**SIZES, "warmup": 3}}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and wait long for it beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Run:
    """A run that was not interrupted.

    Attributes:
        folder: of its checkpoints.
        weights: at its end.
        seen: what was logged.
        trainer: that ran it.
        before: identities of the model, its parameters and the optimizer when it began.
    """

    folder: Path
    weights: Tensors
    seen: Seen
    trainer: Any
    before: dict[str, Any]

    def at(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"


class Beginning(transformers.TrainerCallback):
    """Notes what objects a run begins with."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        of = kwargs["model"]
        self.found = {"model": of, "parameters": list(of.parameters()), "optimizer": kwargs["optimizer"]}
        self.found |= {"scheduler": kwargs["lr_scheduler"], "groups": kwargs["optimizer"].param_groups}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder, seen, beginning = tmp_path_factory.mktemp("run"), Seen(), Beginning()
    # What sees the logs comes first, as the integrations of report_to do.
    made = trainer(model(), folder, seen, beginning, GrowthCallback(SCHEDULE))
    made.train()
    return Run(folder, weights(made.model), seen, made, beginning.found)


def test_it_grows_in_place(run: Run) -> None:
    before, made = run.before, run.trainer
    assert made.model is before["model"] and made.optimizer is before["optimizer"]
    assert made.lr_scheduler is before["scheduler"] and made.optimizer.param_groups is not None
    assert {id(x) for x in before["parameters"]} < {id(x) for x in made.model.parameters()}
    config = made.model.config
    assert {name: getattr(config, name) for name in SIZES} == SIZES
    held = {x for group in made.optimizer.param_groups for x in group["params"]}
    assert held == set(made.model.parameters())
    states = [made.optimizer.state[x]["exp_avg"].shape == x.shape for x in made.model.parameters()]
    assert all(states)


def test_every_integration_is_told(run: Run) -> None:
    (told,) = growths(run.seen)
    assert told["growth/step"] == GROWN_AT and told["growth/stage"] == 1
    assert told["growth/parameters"] == run.trainer.model.num_parameters()
    assert {name: told[f"growth/{name}"] for name in SIZES} == SIZES
    assert told["growth/seconds"] > 0 and told["growth/difference"] >= 0
    assert run.seen.steps("growth/step") == [GROWN_AT]
    # The steps' own lines are all there, that of the growth's step too.
    assert run.seen.steps("loss") == list(range(1, STEPS + 1))
    assert [line["step"] for line in run.trainer.state.log_history if "growth/step" in line] == [GROWN_AT]


def test_the_function_is_kept(tmp_path: Path) -> None:
    for name, callbacks in (("small", []), ("grown", [GrowthCallback(SCHEDULE)])):
        trainer(model(torch.float64), tmp_path / name, *callbacks, max_steps=GROWN_AT + 1).train()
    small, grown = (loaded(tmp_path / name / f"checkpoint-{GROWN_AT}") for name in ("small", "grown"))
    assert grown.config.hidden_size == SIZES["hidden_size"] and grown.dtype == torch.float64
    assert relative(logits64(small), logits64(grown)) <= BAR
    with torch.no_grad():
        grown.model.norm.weight.mul_(1 + 2 * BAR)
    assert relative(logits64(small), logits64(grown)) > BAR


def test_the_difference_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # New layers add zeros, so no bit of a logit changes.
    schedule, grow, found = {1: {"num_hidden_layers": 5}}, growformer.grow, []

    def wrong(of: Any, *rest: Any, **request: Any) -> None:
        grow(of, *rest, **request)
        with torch.no_grad():
            of.model.layers[0].mlp.up_proj.weight[0, 0] += 1

    for how in (grow, wrong):
        monkeypatch.setattr(growformer, "grow", how, raising=False)
        seen = Seen()
        trainer(model(), tmp_path, seen, GrowthCallback(schedule), max_steps=2, save_strategy="no").train()
        found.append(growths(seen)[0]["growth/difference"])
    assert found[0] == 0 and found[1] > 0


def test_the_first_update_of_new_blocks_is_warmed_up(run: Run) -> None:
    saved = torch.load(run.at(GROWN_AT) / "optimizer.pt", weights_only=True)
    blocks = saved["param_groups"][0]["growformer"]["rates"]["parameters"]["model.layers.0.mlp.up_proj.weight"]
    assert {block["warmup"] for block in blocks["blocks"]} == {0, 3}


@pytest.mark.parametrize("step", [2, GROWN_AT, 5])
@pytest.mark.parametrize("built", ["small", "from the checkpoint"])
def test_it_resumes_to_the_same_bits(run: Run, tmp_path: Path, built: str, step: int) -> None:
    of = model() if built == "small" else loaded(run.at(step))
    seen = Seen()
    made = trainer(of, tmp_path, seen, GrowthCallback(SCHEDULE))
    made.train(resume_from_checkpoint=str(run.at(step)))
    assert equal(weights(made.model), run.weights)
    assert len(growths(seen)) == (1 if step < GROWN_AT else 0)


def test_rates_come_back_without_a_schedule(run: Run, tmp_path: Path) -> None:
    made = trainer(loaded(run.at(5)), tmp_path, GrowthCallback())
    made.train(resume_from_checkpoint=str(run.at(5)))
    assert equal(weights(made.model), run.weights)


def test_without_the_callback_it_resumes_at_other_rates(run: Run, tmp_path: Path) -> None:
    # The control of the three tests above: bits that are equal are so for the rates.
    made = trainer(loaded(run.at(5)), tmp_path)
    made.train(resume_from_checkpoint=str(run.at(5)))
    assert made.state.global_step == STEPS and not equal(weights(made.model), run.weights)


def test_it_resumes_in_mid_fade(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 40, "num_hidden_layers": 4}
    schedule = {GROWN_AT: {**sizes, "method": "msg", "fade": 3}}
    whole = trainer(model(), tmp_path / "whole", GrowthCallback(schedule))
    whole.train()
    for step in (GROWN_AT, GROWN_AT + 1):  # before its first step what fades in is saved as well
        at = tmp_path / "whole" / f"checkpoint-{step}"
        for of in (model(), loaded(at)):
            again = trainer(of, tmp_path / "again", GrowthCallback(schedule))
            again.train(resume_from_checkpoint=str(at))
            assert equal(weights(again.model), weights(whole.model))
    other = trainer(loaded(at), tmp_path / "again")
    other.train(resume_from_checkpoint=str(at))
    assert not equal(weights(other.model), weights(whole.model))


def test_a_model_alone_resumes(tmp_path: Path) -> None:
    first = trainer(model(), tmp_path, GrowthCallback(SCHEDULE), save_only_model=True)
    first.train()
    at = tmp_path / "checkpoint-5"
    for of in (model(), loaded(at)):
        seen = Seen()
        made = trainer(of, tmp_path, seen, GrowthCallback({**SCHEDULE, 6: {"intermediate_size": 44}}))
        made.train(resume_from_checkpoint=str(at))
        assert [told["growth/step"] for told in growths(seen)] == [6] and made.model.config.intermediate_size == 44


def test_a_checkpoint_of_no_stage_is_refused(run: Run, tmp_path: Path) -> None:
    for callback in (GrowthCallback({GROWN_AT: {"hidden_size": 48}}), GrowthCallback()):
        of = model()
        before = weights(of)
        made = trainer(of, tmp_path, callback)
        with pytest.raises(RequestError, match=r"\[37, 36\], and the model has it as \[37, 24\].*from_pretrained"):
            made.train(resume_from_checkpoint=str(run.at(5)))
        assert equal(weights(of), before)
    made = trainer(loaded(run.at(5)), tmp_path, GrowthCallback(SCHEDULE))
    with pytest.raises(RequestError, match=r"\[37, 24\], and the model has it as \[37, 36\].*from_pretrained"):
        made.train(resume_from_checkpoint=str(run.at(2)))


def test_one_file_of_several_is_refused(run: Run, tmp_path: Path) -> None:
    loaded(run.at(5)).save_pretrained(tmp_path / "in-parts", max_shard_size="50kB")
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"):
        shutil.copyfile(run.at(5) / name, tmp_path / "in-parts" / name)
    made = trainer(model(), tmp_path, GrowthCallback(SCHEDULE))
    with pytest.raises(RequestError, match="from_pretrained"):
        made.train(resume_from_checkpoint=str(tmp_path / "in-parts"))


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    ends = []
    for at in (None, 5):
        of = model()
        own = torch.optim.Adam(of.parameters(), lr=1e-2)
        made = trainer(of, tmp_path, GrowthCallback(SCHEDULE), optimizers=(own, None))
        made.train(resume_from_checkpoint=None if at is None else str(tmp_path / f"checkpoint-{at}"))
        ends.append(weights(of))
    assert equal(*ends)


# What to grow, what the Trainer is told, when growth comes, and where the run is resumed.
RULES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[int], int]] = {
    "plateau": (
        [{"at": {"plateau": {"window": 2, "patience": 1, "improvement": 0.9}}, "to": {"intermediate_size": 40}}],
        {},
        [5],  # windows end after steps 2 and 4, and the loss of 4 is logged after the callback has its turn
        3,
    ),
    "counted": (
        [
            {"at": {"tokens": 90}, "to": {"intermediate_size": 40}},
            {"at": {"share": 0.7}, "to": {"hidden_size": 36}, "freeze_old": 1, "learning_rate": 0.5},
        ],
        {"include_num_input_tokens_seen": True},
        [2, 5],  # 48 tokens a step; 0.7 of 7 steps
        5,
    ),
    "sequence": (
        [{"at": {"step": [2, 4]}, "to": {"intermediate_size": 40}, "sequence": "linear", "keep_dynamics": True}],
        {},
        [2, 4],
        3,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str, tmp_path: Path) -> None:
    schedule, options, steps, resumed = RULES[name]
    seen = Seen()
    whole = trainer(model(), tmp_path, seen, GrowthCallback(schedule), **options)
    whole.train()
    assert [told["growth/step"] for told in growths(seen)] == steps
    rates = [logs["learning_rate"] for _, logs in seen.logs if "learning_rate" in logs]
    alone = [logs["learning_rate"] for logs in whole.state.log_history if "learning_rate" in logs]
    assert rates == alone and (name != "counted" or rates[-1] == pytest.approx(0.5 * cosine(STEPS - 1)))
    made = trainer(model(), tmp_path / "again", GrowthCallback(schedule), **options)
    made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resumed}"))
    assert equal(weights(made.model), weights(whole.model))


def cosine(step: int) -> float:
    """The Trainer's learning rate after so many steps: two of warm-up, then a half cosine."""
    return float(1e-2 * 0.5 * (1 + torch.cos(torch.tensor((step - 2) / (STEPS - 2)).double() * torch.pi)))


def test_old_entries_held_still_and_thawed(tmp_path: Path) -> None:
    made = trainer(model(), tmp_path, GrowthCallback({2: {"intermediate_size": 40, "freeze_old": 2}}))
    made.train()
    name = "model.layers.0.mlp.up_proj.weight"
    old = [loaded(tmp_path / f"checkpoint-{step}").state_dict()[name][:28] for step in (2, 4, 5)]
    assert torch.equal(old[0], old[1]) and not torch.equal(old[1], old[2])


def test_averages_grow_along(tmp_path: Path) -> None:
    average = torch.optim.swa_utils.AveragedModel(model())

    class Average(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            average.update_parameters(model)

    made = trainer(model(), tmp_path, GrowthCallback(SCHEDULE, averages=[average]), Average(), save_strategy="no")
    made.train()
    assert average.module.config.hidden_size == SIZES["hidden_size"]
    assert not equal(weights(average.module), weights(made.model))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 4}, marks=pytest.mark.slow
        ),
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"optim": "adafactor"},
    ],
    ids=lambda options: next(iter(options)) if options else None,
)
def test_what_the_trainer_puts_around_a_model(options: dict[str, Any], tmp_path: Path) -> None:
    seen = Seen()
    made = trainer(model(), tmp_path, seen, GrowthCallback({2: SIZES}), save_strategy="no", **options)
    made.train()
    assert len(growths(seen)) == 1
    assert made.model.config.hidden_size == SIZES["hidden_size"]
    losses = [logs["loss"] for _, logs in seen.logs if "loss" in logs]
    assert len(losses) == made.state.max_steps and all(0 < loss < 6 for loss in losses)


def test_a_growth_that_fails_leaves_all_as_it_was(tmp_path: Path) -> None:
    of, found = model(), {}

    class Gradient(transformers.TrainerCallback):
        """Leaves a gradient behind where the growth comes."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == GROWN_AT:
                of.model.norm.weight.grad = torch.zeros_like(of.model.norm.weight)
                found.update(weights(of))
                found["rates"] = torch.tensor(len(rates_of(kwargs["optimizer"]).tables))

    made = trainer(of, tmp_path, Gradient(), GrowthCallback(SCHEDULE), save_strategy="no")
    with pytest.raises(RequestError, match=r"model\.norm\.weight has a gradient"):
        made.train()
    assert found.pop("rates") == 0 and equal(weights(of), found) and of.config.hidden_size == 24
    assert not rates_of(made.optimizer).tables


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({4.5: SIZES}, r"4\.5 for a step"),
        (5, "the schedule is a int"),
        ({4: 7}, r"after step 4 the schedule has 7"),
        ([{"at": {"step": 3}}], r"grow\[0\]\.to: Field required"),
        ({4: {"hidden_size": 36, "prove": True}}, r"grow\[0\]\.prove: .*growformer expand"),
        ({4: {"hidden_size": 36, "warmup": -1}}, r"grow\[0\]\.warmup: .*greater than or equal to 0; got -1"),
        ([{"at": {"flops": 1e9}, "to": {"hidden_size": 36}}], r"grow\[0\]\.at\.flops: .*only estimates FLOPs"),
        ([{"at": {"slope": {"per_decade": 1.0}}, "to": {"hidden_size": 36}}], r"grow\[0\]\.at\.slope: .*use plateau"),
    ],
)
def test_a_schedule_that_says_nothing_possible(schedule: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        GrowthCallback(schedule)


@pytest.mark.parametrize(
    ("schedule", "options", "said"),
    [
        ({STEPS: SIZES}, {}, rf"grow\[0\]\.at\.step: {STEPS} is not before the end of training \({STEPS} steps\)"),
        ({4: {"hidden_size": 25}}, {}, r"grow\[0\]: hidden_size=25 is no multiple"),
        ({2: {"hidden_size": 36}, 4: {"hidden_size": 37}}, {}, r"grow\[1\]: hidden_size=37"),
        ({4: {"hidden_siez": 36}}, {}, r"grow\[0\]\.to\.hidden_siez"),
        ([{"at": {"tokens": 5}, "to": SIZES}], {}, r"grow\[0\]\.at\.tokens: .*include_num_input_tokens_seen=True"),
        ([{"at": {"plateau": {}}, "to": SIZES}], {"logging_strategy": "no"}, r"at\.plateau: .*logging_steps"),
        (
            {4: SIZES},
            {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1},
            "load_best_model_at_end=False",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(
    schedule: Any, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    made = trainer(model(), tmp_path, GrowthCallback(schedule), **options)
    with pytest.raises(RequestError, match=said):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"fsdp": True}, "FSDP"),
        ({"deepspeed": "ds.json"}, "DeepSpeed"),
        ({"world_size": 2}, "DistributedDataParallel"),
        ({"n_gpu": 2}, "DataParallel"),
    ],
)
def test_wrappers_that_hold_old_parameters_are_refused(odd: dict[str, Any], said: str) -> None:
    of = model()
    optimizer = torch.optim.AdamW(of.parameters())
    plain = {"fsdp": None, "deepspeed": None, "world_size": 1, "n_gpu": 1, "load_best_model_at_end": False}
    plain |= {"include_num_input_tokens_seen": "no", "logging_strategy": "steps"}
    state = SimpleNamespace(global_step=0, max_steps=STEPS)

    def begin(**arguments: Any) -> None:
        callback = GrowthCallback(SCHEDULE)
        told: Any = SimpleNamespace(**plain | arguments)
        callback.on_train_begin(told, state, None, model=of, optimizer=optimizer)  # type: ignore[arg-type]

    begin()
    with pytest.raises(RequestError, match=rf"^{said} .*growformer expand CHECKPOINT OUT hidden_size=36"):
        begin(**odd)


def test_a_schedule_without_base_rates_is_refused(tmp_path: Path) -> None:
    of = model()
    own = torch.optim.AdamW(of.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(own, 0.9)
    callback = GrowthCallback({2: {"hidden_size": 36, "learning_rate": 0.5}})
    made = trainer(of, tmp_path, callback, optimizers=(own, schedule))
    with pytest.raises(RequestError, match=r"grow\[0\]\.learning_rate: ExponentialLR has no base rates"):
        made.train()


def test_a_trainer_that_trains_again_goes_on_from_its_stage(tmp_path: Path) -> None:
    seen = Seen()
    callback = GrowthCallback({2: {"intermediate_size": 40, "freeze_old": 50}, 3: {"hidden_size": 36}})
    made = trainer(model(), tmp_path, seen, callback, max_steps=4)
    made.train(resume_from_checkpoint=None)
    made.train()
    assert [told["growth/step"] for told in growths(seen)] == [2, 3]
    # What was held is let go: its 50 steps were those of a training that is over.
    assert not any(block.still for table in rates_of(made.optimizer).tables.values() for block in table.blocks)


def test_an_undeclared_optimizer_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        pass

    of = model()
    made = trainer(of, tmp_path, GrowthCallback(SCHEDULE), optimizers=(Odd(of.parameters(), lr=1e-2), None))
    with pytest.raises(RequestError, match=r"Odd keeps beside each parameter is not declared"):
        made.train()
