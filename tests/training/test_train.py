"""`growformer train`: a run grows where its recipe says, and resumes to the same bits wherever it was cut."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from growformer.errors import ChangedError, RequestError, TargetError
from growformer.optim import rates_of
from growformer.planning import Applier
from growformer.report.train import render
from growformer.training import saving
from growformer.training.log import read_log
from growformer.training.place import Place
from tests.training.train_kit import MODEL, Watcher, equal, recipe, text, train, training_state, weights


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and wait long for it beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Place, Watcher]:
    """An unbroken run: its recipe, its folder, what it said."""
    folder = tmp_path_factory.mktemp("whole")
    path = recipe(folder)
    return path, *train(path, folder / "run")


def lines(place: Place, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_log(place.log) if line["kind"] == kind]


def test_it_grows_where_the_recipe_says(whole: tuple[Path, Place, Watcher]) -> None:
    _, place, watcher = whole
    growths = lines(place, "growth")
    # 0.6 of twelve steps is first reached by the eighth.
    assert [(g["step"], g["to"]) for g in growths] == [
        (4, {"intermediate_size": 28, "num_hidden_layers": 2}),
        (8, {"hidden_size": 24}),
    ]
    (start,) = lines(place, "start")
    sizes = [start["stages"][0]["parameters"], *(g["parameters"][1] for g in growths)]
    assert sizes == [stage["parameters"] for stage in start["stages"]] and sizes == sorted(set(sizes))
    for growth in growths:
        before, after = growth["bits_per_byte"]
        assert after == pytest.approx(before, rel=1e-5)
    steps = lines(place, "step")
    assert [line["step"] for line in steps] == list(range(1, 13))
    spent = [steps[0]["flops"]] + [b["flops"] - a["flops"] for a, b in itertools.pairwise(steps)]
    per_token = [start["stages"][(step > 4) + (step > 8)]["flops_per_token"] for step in range(1, 13)]
    assert spent == pytest.approx([64 * each for each in per_token])
    # WSD over twelve steps, halved by the second growth: the last decays from 0.8 of the budget.
    assert [line["lr"] for line in steps[:8]] == [0.01] * 8
    assert [line["lr"] for line in steps[8:]] == pytest.approx([0.005, 0.005, 0.005 * 5 / 6, 0.005 * 5 / 12])
    looks = lines(place, "evaluation")
    assert [line["step"] for line in looks] == [0, 5, 10, 12]
    assert looks[-1]["bits_per_byte"] < looks[0]["bits_per_byte"] - 1
    assert any(f"{looks[-1]['bits_per_byte']:.4f}" in said for said in watcher.said)


def test_the_model_loads_with_stock_transformers(whole: tuple[Path, Place, Watcher]) -> None:
    path, place, _ = whole
    model, report = AutoModelForCausalLM.from_pretrained(place.model, output_loading_info=True)
    assert not any(report.values())
    assert model.config.hidden_size == 24 and model.config.num_hidden_layers == 2
    data = (path.parent / "valid.txt").read_bytes()
    starts = torch.linspace(0, len(data) // 16 - 1, 8, dtype=torch.float64).round().long().tolist()
    tokens = torch.tensor([list(data[16 * i : 16 * i + 16]) for i in starts])
    with torch.no_grad():
        bits = float(model(input_ids=tokens, labels=tokens).loss) / math.log(2)
    assert bits == pytest.approx(lines(place, "evaluation")[-1]["bits_per_byte"], rel=1e-5)


def test_only_the_last_checkpoints_stay(whole: tuple[Path, Place, Watcher]) -> None:
    place = whole[1]
    assert sorted(p.name for p in place.checkpoints.iterdir()) == ["step-000000009", "step-000000012"]
    assert sorted(p.name for p in place.out.iterdir()) == ["checkpoints", "log.jsonl", "model", "recipe.yaml"]


# Cut in the first stage before and after a checkpoint, between growth and checkpoint, and in each stage.
@pytest.mark.parametrize("cut_at", [2, 3, 5, 7, 8, 10, 12])
def test_a_run_that_is_cut_resumes_to_the_same_bits(
    cut_at: int, whole: tuple[Path, Place, Watcher], tmp_path: Path
) -> None:
    path, place, _ = whole
    again, _ = train(path, tmp_path / "run", cut_at=cut_at)
    assert not again.model.exists()
    _, watcher = train(path, again.out, resume=True)
    done = (cut_at - 1) // 3 * 3
    assert watcher.said[0].startswith(f"Resuming at step {done}:" if done else "LlamaForCausalLM, ")
    assert weights(again.model) == weights(place.model)
    assert equal(training_state(again), training_state(place))
    logs = [[{k: v for k, v in line.items() if k != "seconds"} for line in read_log(p.log)] for p in (again, place)]
    assert logs[0] == logs[1]


def forget_moments(state: dict[str, Any]) -> None:
    for optimizer in state["optimizers"]:
        for kept in optimizer["state"]["state"].values():
            kept["exp_avg"].zero_()


def forget_rates(state: dict[str, Any]) -> None:
    for optimizer in state["optimizers"]:
        assert optimizer["rates"]["parameters"]
        optimizer["rates"]["parameters"] = {}


def forget_order(state: dict[str, Any]) -> None:
    for optimizer in state["optimizers"]:
        for names in optimizer["groups"]:
            names.reverse()


@pytest.mark.parametrize("forget", [forget_moments, forget_rates, forget_order])
def test_a_checkpoint_that_forgets_is_another_run(
    forget: Callable[[dict[str, Any]], None], whole: tuple[Path, Place, Watcher], tmp_path: Path
) -> None:
    path, place, _ = whole
    again, _ = train(path, tmp_path / "run", cut_at=8)
    last = saving.checkpoints(again.checkpoints)[-1]
    state = torch.load(last / "training.pt", weights_only=True)
    forget(state)
    torch.save(state, last / "training.pt")
    try:
        train(path, again.out, resume=True)
    except (RuntimeError, ValueError):
        assert forget is forget_order  # moments of other shapes than the weights'
        return
    assert weights(again.model) != weights(place.model)


@pytest.mark.parametrize(("key", "value"), [("position", 0), ("multiplier", 1.5), ("step", 7), ("stage", 2)])
def test_a_checkpoint_that_is_wrong_is_another_run(
    key: str, value: Any, whole: tuple[Path, Place, Watcher], tmp_path: Path
) -> None:
    path, place, _ = whole
    again, _ = train(path, tmp_path / "run", cut_at=8)
    file = saving.checkpoints(again.checkpoints)[-1] / "state.json"
    state = json.loads(file.read_text())
    assert state["progress"][key] != value
    state["progress"][key] = value
    file.write_text(json.dumps(state))
    train(path, again.out, resume=True)
    assert weights(again.model) != weights(place.model)


def test_what_a_rule_remembers_is_resumed(tmp_path: Path) -> None:
    rule = {"plateau": {"window": 3, "improvement": 0.5, "patience": 2}}
    path = recipe(tmp_path, grow=[{"at": rule, "to": {"intermediate_size": 28}}])
    place, _ = train(path, tmp_path / "whole")
    # The first window sets the mark, and two in a row do not halve it.
    assert [line["step"] for line in lines(place, "growth")] == [9]
    again, _ = train(path, tmp_path / "again", cut_at=8)
    train(path, again.out, resume=True)
    assert [line["step"] for line in lines(again, "growth")] == [9]
    assert weights(again.model) == weights(place.model)


def test_two_growths_after_one_step(tmp_path: Path) -> None:
    plateau = {"plateau": {"window": 2, "improvement": 0.9, "patience": 1}}
    grow = [
        {"at": {"step": 3}, "to": {"intermediate_size": 28}},
        {"at": {"tokens": 3 * 64}, "to": {"num_hidden_layers": 2}},
        {"at": plateau, "to": {"hidden_size": 24}},
        {"at": plateau, "to": {"hidden_size": 32}},
        {"at": {"tokens_per_parameter": 1000}, "to": {"hidden_size": 48}},
    ]
    place, watcher = train(recipe(tmp_path, grow=grow), tmp_path / "run")
    # A plateau's windows begin with the step after the growth before it: 4-5 and 6-7, then 8-9 and 10-11.
    assert [line["step"] for line in lines(place, "growth")] == [3, 3, 7, 11]
    assert "grow[4] did not come: the budget ended before tokens_per_parameter: 1000" in watcher.said


def test_growths_are_proved(tmp_path: Path) -> None:
    path = recipe(tmp_path, prove=True, budget={"steps": 9})
    place, watcher = train(path, tmp_path / "run")
    proofs = [line["proof"] for line in lines(place, "growth")]
    assert [[claim["name"] for claim in proof["claims"]] for proof in proofs] == [
        ["structure", "algebra", "stored", "alive"]
    ] * 2
    assert all(claim["passed"] for proof in proofs for claim in proof["claims"])
    assert sum("proved: logits in float64 differ by" in said for said in watcher.said) == 2
    html = render(read_log(place.log), place.recipe.read_text())
    assert html.count('class="holds"') == 2 and "intermediate_size 28" in html and "nan" not in html.lower().split()
    assert "<script" not in html and "http" not in html.split("<pre>")[0]


def test_a_growth_that_changes_the_function_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Applier._old

    def off(self: Applier, tensor: Any, block: Any) -> torch.Tensor:
        values = honest(self, tensor, block)
        return values * 1.001 if tensor.name.endswith("layers.0.mlp.up_proj.weight") else values

    monkeypatch.setattr(Applier, "_old", off)
    path = recipe(tmp_path, prove=True)
    with pytest.raises(ChangedError, match=r"grow\[0\] at step 4: not the same function: structure"):
        train(path, tmp_path / "run")
    place = Place(tmp_path / "run")
    assert not place.model.exists() and lines(place, "growth") == []
    # It stands at the checkpoint before the growth, and goes on from there once growth is right.
    monkeypatch.undo()
    _, watcher = train(path, place.out, resume=True)
    assert watcher.said[0].startswith("Resuming at step 3") and place.model.is_dir()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9}}, id="SGD"),
        pytest.param(
            {"optimizer": {"name": "Muon", "lr": 0.02, "others": {"name": "AdamW", "lr": 0.01}}}, id="Muon and AdamW"
        ),
        pytest.param({"precision": "bf16"}, id="bf16"),
        pytest.param({"micro_batch": 2, "clip_norm": None}, id="two passes a step"),
        pytest.param({"learning_rate": {"shape": "cosine", "warmup": 0.3, "floor": 0.1}}, id="cosine"),
        pytest.param({"budget": {"flops": 3.0e7}}, id="FLOPs"),
        pytest.param(
            {
                "model": {"model_type": "gpt2", "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 16},
                "grow": [{"at": {"step": 4}, "to": {"n_layer": 2}}, {"at": {"step": 8}, "to": {"n_inner": 80}}],
            },
            id="gpt2 with dropout",
        ),
    ],
)
def test_every_kind_of_run_resumes(changes: dict[str, Any], tmp_path: Path) -> None:
    path = recipe(tmp_path, changes)
    place, _ = train(path, tmp_path / "whole")
    again, _ = train(path, tmp_path / "again", cut_at=8)
    train(path, again.out, resume=True)
    assert len(lines(place, "growth")) == 2
    assert weights(again.model) == weights(place.model)
    assert equal(training_state(again), training_state(place))


def test_a_budget_in_flops_ends_with_it(tmp_path: Path) -> None:
    path = recipe(tmp_path, budget={"flops": 3.0e7})
    place, _ = train(path, tmp_path / "run")
    spent = [line["flops"] for line in lines(place, "step")]
    assert spent[-2] < 3e7 <= spent[-1]


def test_old_entries_are_held_and_let_go(tmp_path: Path) -> None:
    grow = [{"at": {"step": 3}, "to": {"intermediate_size": 28}, "freeze_old": 3}]
    path = recipe(tmp_path, grow=grow, checkpoint={"every": 1, "keep": 99}, budget={"steps": 8})
    place, _ = train(path, tmp_path / "run")
    name = "model.layers.0.mlp.up_proj.weight"
    seen = [
        AutoModelForCausalLM.from_pretrained(saved / "model").get_parameter(name).detach()
        for saved in saving.checkpoints(place.checkpoints)
    ]
    old = [x[:20] for x in seen]
    held = [torch.equal(a, b) for a, b in itertools.pairwise(old)]
    # Steps 2 to 8; the growth comes after step 3.
    assert held == [False, False, True, True, True, False, False]
    new = [x[20:] for x in seen[2:]]
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(new))


def test_a_run_from_a_checkpoint(whole: tuple[Path, Place, Watcher], tmp_path: Path) -> None:
    source = whole[1].model
    path = recipe(tmp_path, model={"from": str(source)}, grow=[], budget={"steps": 1})
    place, _ = train(path, tmp_path / "run")
    first = lines(place, "evaluation")[0]["bits_per_byte"]
    assert first == pytest.approx(lines(whole[1], "evaluation")[-1]["bits_per_byte"], rel=1e-6)


def test_a_tokenizer(stories: Path, tmp_path: Path) -> None:
    data = {"train": "train.txt", "valid": "valid.txt", "tokenizer": str(stories)}
    path = recipe(tmp_path, data=data, budget={"steps": 6}, grow=[{"at": {"step": 4}, "to": {"intermediate_size": 28}}])
    place, _ = train(path, tmp_path / "whole")
    assert len(list(place.tokens.iterdir())) == 2
    assert (place.model / "tokenizer.json").is_file()
    (start,) = lines(place, "start")
    assert start["text"]["bytes"] == 8000 > start["text"]["tokens"]
    again, _ = train(path, tmp_path / "again", cut_at=5)
    train(path, again.out, resume=True)
    assert weights(again.model) == weights(place.model)


def test_a_checkpoint_brings_its_tokenizer(stories: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, model={"from": str(stories)}, grow=[{"at": {"step": 1}, "to": {"num_hidden_layers": 6}}])
    place, _ = train(path, tmp_path / "run", cut_at=2)
    (start,) = lines(place, "start")
    assert start["text"]["bytes"] == 8000 > start["text"]["tokens"]
    assert start["stages"][0]["parameters"] == 260_032


def test_a_folder_of_a_run_is_not_taken_twice(whole: tuple[Path, Place, Watcher], tmp_path: Path) -> None:
    path, place, _ = whole
    with pytest.raises(TargetError, match="holds a run that has ended; --resume goes on with it"):
        train(path, place.out)
    before = weights(place.model)
    _, watcher = train(path, place.out, resume=True)
    assert watcher.said == [f"{place.out}: this run has ended; its model is {place.model}"]
    assert weights(place.model) == before
    (tmp_path / "mine.txt").write_text("keep")
    for resume in (False, True):
        with pytest.raises(TargetError, match="is no folder of a run, and is left as it is"):
            train(path, tmp_path, resume=resume)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_another_recipe_does_not_resume(whole: tuple[Path, Place, Watcher], tmp_path: Path) -> None:
    path = recipe(tmp_path)
    place, _ = train(path, tmp_path / "run", cut_at=4)
    recipe(tmp_path, optimizer={"name": "AdamW", "lr": 0.02}, checkpoint={"every": 5})
    with pytest.raises(RequestError, match=r"optimizer\.lr: 0\.01 was, 0\.02 is") as caught:
        train(path, place.out, resume=True)
    assert "checkpoint" not in str(caught.value).split("says other things")[1]
    recipe(tmp_path)
    text(tmp_path, "train.txt", 8001, 5)
    with pytest.raises(RequestError, match="is of another training text"):
        train(path, place.out, resume=True)


def test_a_run_can_change_how_it_is_saved(whole: tuple[Path, Place, Watcher], tmp_path: Path) -> None:
    path = recipe(tmp_path)
    shutil.copy(whole[0].parent / "train.txt", tmp_path)
    place, _ = train(path, tmp_path / "run", cut_at=7)
    recipe(tmp_path, checkpoint={"every": 4, "keep": 1})
    train(path, place.out, resume=True)
    assert [p.name for p in saving.checkpoints(place.checkpoints)] == ["step-000000012"]
    assert weights(place.model) == weights(whole[1].model)


def test_text_that_runs_out(tmp_path: Path) -> None:
    path = recipe(tmp_path, budget={"steps": 1000})
    with pytest.raises(RequestError, match=r"500 sequences of 16; 4,000 are asked for.*budget of 8,000 tokens fits"):
        train(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # Where the loss decides how long a stage is, only the run itself can tell.
    grow = [{"at": {"plateau": {}}, "to": {"intermediate_size": 28}}]
    path = recipe(tmp_path, budget={"flops": 1e10}, grow=grow, checkpoint={"every": 1000})
    with pytest.raises(RequestError, match="no byte is used twice"):
        train(path, tmp_path / "run")
    place = Place(tmp_path / "run")
    assert [p.name for p in saving.checkpoints(place.checkpoints)] == ["step-000000125"]
    with pytest.raises(RequestError, match="no byte is used twice"):
        train(path, place.out, resume=True)
    recipe(
        tmp_path,
        data={"train": "train.txt", "valid": "valid.txt", "repeat": True},
        budget={"flops": 1e10},
        grow=grow,
    )
    _, watcher = train(path, place.out, cut_at=130, resume=True)
    assert watcher.said[0].startswith("Resuming at step 125")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {**MODEL, "hiden_size": 3}}, r"line \d+: model\.hiden_size: is no field.*did you mean hidden_size"),
        ({"model": {**MODEL, "model_type": "lama"}}, r"model\.model_type: 'lama' is none.*did you mean llama"),
        ({"model": {**MODEL, "vocab_size": 100}}, r"vocab_size: 100 is too small for the 256 bytes"),
        ({"model": {**MODEL, "max_position_embeddings": 8}}, r"sequence_length: 16 tokens.*max_position_embeddings=8"),
        ({"model": {"model_type": "bert"}}, r"bert is no causal language model"),
        ({"optimizer": {"name": "Adamw"}}, r"optimizer\.name: 'Adamw' is no optimizer here"),
        (
            {"optimizer": {"name": "SGD", "betas": [1, 2]}},
            r"optimizer\.betas: torch\.optim\.SGD takes no such argument",
        ),
        ({"optimizer": {"name": "Muon"}}, r"Muon is for matrices between layers; say what trains"),
        ({"data": {"train": "none.txt", "valid": "valid.txt"}}, r"none\.txt: cannot be read"),
        ({"grow": [{"at": {"step": 12}, "to": {"hidden_size": 24}}]}, r"grow\[0\]\.at\.step: 12 is not before the bud"),
        ({"grow": [{"at": {"tokens": 800}, "to": {"hidden_size": 24}}]}, r"800 is not before the budget's end"),
        ({"grow": [{"at": {"step": 2}, "to": {"hidden_sise": 24}}]}, r"grow\[0\]\.to\.hidden_sise: the model's config"),
        ({"grow": [{"at": {"step": 2}, "to": {"head_dim": 13}}]}, r"line \d+: grow\[0\]: .*head_dim"),
        ({"data": {"train": "train.txt", "valid": "train.txt"}}, r"line \d+: data\.valid: .* is trained on as well"),
        ({"micro_batch": 3}, r"micro_batch: 3 sequences a pass, and 4 a step"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = recipe(tmp_path, changes)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Exception, match=says) as caught:
        train(path, tmp_path / "run")
    assert getattr(caught.value, "exit_code", None) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_rates_are_those_of_the_optimizer(whole: tuple[Path, Place, Watcher]) -> None:
    # The warm-up of the second stage's new entries was still on at step 6, and is in that checkpoint.
    path, place, _ = whole
    again, _ = train(path, place.out.parent / "rates", cut_at=8)
    model = saving.read_model(saving.checkpoints(again.checkpoints)[-1])
    optimizer = torch.optim.AdamW([{"params": [x for _, x in sorted(model.named_parameters())]}])
    assert rates_of(optimizer, model).tables == {}
    saved = training_state(again)["optimizers"][0]["rates"]["parameters"]
    assert any(block["warmup"] == 3 for table in saved.values() for block in table["blocks"])


def test_a_compiled_run_compiles_anew_after_each_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    compiler, wrapped = torch.compile, []

    def compiled(of: torch.nn.Module) -> Any:
        wrapped.append((of, of.config.hidden_size, counters["stats"]["unique_graphs"]))
        return compiler(of, backend="eager")  # which needs no C++ compiler

    monkeypatch.setattr(torch, "compile", compiled)
    counters.clear()
    grow = [{"at": {"step": 3}, "to": {"hidden_size": 24}}]
    place, _ = train(recipe(tmp_path, compile=True, budget={"steps": 6}, grow=grow), tmp_path / "run")
    losses = [line["loss"] for line in lines(place, "step")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    # One model, compiled for each of its sizes: after the growth there is a graph more.
    assert wrapped[0][0] is wrapped[1][0]
    assert [width for _, width, _ in wrapped] == [16, 24]
    assert [graphs for *_, graphs in wrapped] == [0, 1] and counters["stats"]["unique_graphs"] == 2
    train(recipe(tmp_path / "plain"), tmp_path / "plain" / "run", cut_at=1)
    assert len(wrapped) == 2
