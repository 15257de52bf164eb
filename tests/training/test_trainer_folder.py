"""`growformer expand` on a checkpoint of the Hugging Face Trainer: as if it had grown in the running Trainer."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import growformer as gf
from growformer.errors import RequestError, SourceError
from growformer.training import GrowthCallback
from tests.cli.harness import Cli
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

WORDS = [f"{name}={size}" for name, size in SIZES.items()]
LATER = {"intermediate_size": 44}
SCHEDULE: dict[int, dict[str, Any]] = {GROWN_AT: {**SIZES, "warmup": 3}, 6: LATER}
QUICK: Any = {"prove_level": "structure"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and wait long for it beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run that never grows, at the step at which the other one does."""
    folder = tmp_path_factory.mktemp("small")
    trainer(model(), folder).train()
    return folder / f"checkpoint-{GROWN_AT}"


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """The checkpoint that the running Trainer has written right after it grew, and the weights at its end."""
    folder = tmp_path_factory.mktemp("grown")
    made = trainer(model(), folder, GrowthCallback(SCHEDULE))
    made.train()
    return folder / f"checkpoint-{GROWN_AT}", weights(made.model)


@pytest.fixture(scope="module")
def expanded(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint, expanded."""
    out = tmp_path_factory.mktemp("expanded") / "out"
    made = gf.expand_checkpoint(small, out, warmup=3, **QUICK, **SIZES)
    assert made.training.startswith("the moments of torch.AdamW grew along; ")
    return out


def optimizer(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(folder / "optimizer.pt", weights_only=True)
    return saved


def alike(one: Any, other: Any) -> bool:
    """Plain data and tensors, to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def test_it_is_what_the_running_trainer_saves(grown: tuple[Path, Tensors], expanded: Path) -> None:
    there = grown[0]
    assert equal(weights(loaded(there)), weights(loaded(expanded)))
    one, two = optimizer(there), optimizer(expanded)
    left, right = (saved["param_groups"][0]["growformer"] for saved in (one, two))
    sizes = [left.pop("first"), right.pop("first")]
    assert {name: sizes[0][name] for name in SIZES} == {name: sizes[1][name] for name in SIZES}
    assert alike(one, two) and len(two["state"]) > 20
    assert alike(*(torch.load(folder / "scheduler.pt", weights_only=True) for folder in (there, expanded)))
    random = [torch.load(folder / "rng_state.pth", weights_only=False) for folder in (there, expanded)]
    assert alike(*(states["cpu"] for states in random)) and alike(*(states["python"] for states in random))
    assert (expanded / "trainer_state.json").is_file() and (expanded / "training_args.bin").is_file()


@pytest.mark.parametrize("built", ["small", "from the folder"])
def test_it_goes_on_as_if_it_had_grown_there(
    grown: tuple[Path, Tensors], expanded: Path, built: str, tmp_path: Path
) -> None:
    seen = Seen()
    of = model() if built == "small" else loaded(expanded)
    made = trainer(of, tmp_path, seen, GrowthCallback(SCHEDULE))
    made.train(resume_from_checkpoint=str(expanded))
    assert equal(weights(made.model), grown[1])
    assert [told["growth/step"] for told in growths(seen)] == [6]


def test_a_stock_trainer_goes_on(grown: tuple[Path, Tensors], expanded: Path, tmp_path: Path) -> None:
    made = trainer(loaded(expanded), tmp_path)
    made.train(resume_from_checkpoint=str(expanded))
    assert made.state.global_step == STEPS
    assert {id(x) for x in made.model.parameters()} == {
        id(x) for group in made.optimizer.param_groups for x in group["params"]
    }
    # New blocks in old tensors, without ages of their own, take other steps.
    assert not equal(weights(made.model), grown[1])


def test_a_checkpoint_that_has_grown_grows_again(grown: tuple[Path, Tensors], expanded: Path, tmp_path: Path) -> None:
    # The rates of the first growth are carried through the second one.
    for name, source in (("one", grown[0]), ("two", expanded)):
        gf.expand_checkpoint(source, tmp_path / name, **QUICK, **LATER)
    one, two = optimizer(tmp_path / "one"), optimizer(tmp_path / "two")
    tables = [saved["param_groups"][0].pop("growformer")["rates"] for saved in (one, two)]
    assert alike(one, two) and alike(*tables)
    blocks = tables[0]["parameters"]["model.layers.0.mlp.up_proj.weight"]["blocks"]
    assert {block["warmup"] for block in blocks} == {0, 3} and len(blocks) > 2


def test_the_command_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli, out = Cli(tmp_path, {}, monkeypatch, capsys), tmp_path / "out"
    said = cli("expand", small, out, *WORDS, "--prove", "structure", "--warmup", 3)
    assert said.code == 0
    assert "training state: the moments of torch.AdamW grew along; trainer_state.json, scheduler.pt" in said.out
    receipt = json.loads((out / "growformer.json").read_text())
    for where in ("source", "target"):
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(receipt[where]["files"])
    verified = cli("verify", small, out, "--prove", "structure")
    assert verified.code == 0 and "every hash as in the receipt" in verified.out
    data = bytearray((out / "optimizer.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (out / "optimizer.pt").write_bytes(data)
    verified = cli("verify", small, out, "--prove", "structure")
    assert verified.code == 1 and "optimizer.pt in the grown folder" in verified.out


def test_what_is_approximate_is_said(small: Path, tmp_path: Path) -> None:
    made = gf.expand_checkpoint(small, tmp_path / "out", **QUICK, num_key_value_heads=4)  # copies
    assert "grew along (12 of them approximately" in made.training


def test_the_model_alone(small: Path, tmp_path: Path) -> None:
    made = gf.expand_checkpoint(small, tmp_path / "out", model_only=True, **QUICK, **LATER)
    assert made.training == ""
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "growformer.json", "model.safetensors"}


def test_a_checkpoint_without_an_optimizer(small: Path, tmp_path: Path) -> None:
    source = shutil.copytree(small, tmp_path / "source")
    (source / "optimizer.pt").unlink()
    made = gf.expand_checkpoint(source, tmp_path / "out", **QUICK, **LATER)
    assert made.training.endswith("there was no optimizer") and (tmp_path / "out" / "scheduler.pt").is_file()


class Bomb:
    """Runs code where a pickle of it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def rewritten(folder: Path, **changes: Any) -> None:
    saved = optimizer(folder)
    torch.save(saved | changes, folder / "optimizer.pt")


def swapped(folder: Path) -> None:
    """Two tensors change places, as another order of parameters would have them."""
    state = optimizer(folder)["state"]
    first, other = 0, next(i for i in state if state[i]["exp_avg"].shape != state[0]["exp_avg"].shape)
    rewritten(folder, state=state | {first: state[other], other: state[first]})


def foreign(folder: Path) -> None:
    state = {i: {"state1": x["exp_avg"], "state2": x["exp_avg_sq"]} for i, x in optimizer(folder)["state"].items()}
    rewritten(folder, state=state)


def other_class(folder: Path) -> None:
    rewritten(folder, param_groups=[group | {"trust": 0.1} for group in optimizer(folder)["param_groups"]])


def one_group(folder: Path) -> None:
    groups = optimizer(folder)["param_groups"]
    rewritten(folder, param_groups=[groups[0] | {"params": [n for group in groups for n in group["params"]]}])


def later_format(folder: Path) -> None:
    groups = optimizer(folder)["param_groups"]
    rewritten(folder, param_groups=[groups[0] | {"growformer": {"format": 9}}, *groups[1:]])


DAMAGE: dict[str, tuple[Any, type[Exception], str]] = {
    "code": (
        lambda folder: (folder / "optimizer.pt").write_bytes(pickle.dumps(Bomb(folder.parent / "ran"))),
        SourceError,
        "only plain data and tensors are",
    ),
    "code in a zip": (
        lambda folder: torch.save({"state": Bomb(folder.parent / "ran")}, folder / "optimizer.pt"),
        SourceError,
        "only plain data and tensors are",
    ),
    "no state": (
        lambda folder: torch.save({"a": 1}, folder / "optimizer.pt"),
        SourceError,
        "is no optimizer's state_dict",
    ),
    "order": (swapped, RequestError, r"number 0 holds 'exp_avg' of shape .* has model\.embed_tokens\.weight there"),
    "state": (foreign, RequestError, "keeps state1, state2 beside each parameter.*no declared optimizer"),
    "class": (other_class, RequestError, "keeps exp_avg, exp_avg_sq, step beside.*trust.*no declared optimizer"),
    "groups": (one_group, RequestError, r"hold \d+ parameters, and the Trainer's own for this model \d+ and \d+"),
    "format": (later_format, SourceError, "has format 9; this version reads format 1"),
    "step": (
        lambda folder: (folder / "trainer_state.json").write_text('{"global_step": "x"}'),
        SourceError,
        "global_step is 'x'",
    ),
    "DeepSpeed": (lambda folder: (folder / "global_step3").mkdir(), RequestError, r"global_step3: is DeepSpeed's form"),
    "FSDP": (lambda folder: (folder / "optimizer_0").mkdir(), RequestError, r"optimizer_0: is FSDP's form"),
    "FSDP, whole": (lambda folder: (folder / "optimizer.bin").touch(), RequestError, r"optimizer\.bin: is FSDP's form"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_cannot_grow_is_refused_by_name(small: Path, what: str, tmp_path: Path) -> None:
    damage, kind, said = DAMAGE[what]
    source = shutil.copytree(small, tmp_path / "source")
    damage(source)
    with pytest.raises(kind, match=said):
        gf.expand_checkpoint(source, tmp_path / "out", **QUICK, **LATER)
    assert not (tmp_path / "ran").exists() and {path.name for path in tmp_path.iterdir()} == {"source"}
    if what == "code":
        gf.expand_checkpoint(source, tmp_path / "out", model_only=True, **QUICK, **LATER)
        assert not (tmp_path / "ran").exists()


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    of = model()
    of.model.embed_tokens.requires_grad_(False)
    trainer(of, tmp_path, max_steps=2).train()
    with pytest.raises(RequestError, match=r"are some frozen.*--model-only"):
        gf.expand_checkpoint(tmp_path / "checkpoint-1", tmp_path / "out", **QUICK, **LATER)


@pytest.mark.parametrize("optim", ["adafactor", "adagrad", "sgd"])
def test_other_optimizers_of_the_trainer(optim: str, tmp_path: Path) -> None:
    for name, callbacks in (("small", []), ("grown", [GrowthCallback({1: SIZES})])):
        trainer(model(), tmp_path / name, *callbacks, max_steps=2, optim=optim).train()
    gf.expand_checkpoint(tmp_path / "small" / "checkpoint-1", tmp_path / "out", **QUICK, **SIZES)
    one, two = optimizer(tmp_path / "grown" / "checkpoint-1"), optimizer(tmp_path / "out")
    for saved in (one, two):
        saved["param_groups"][0]["growformer"].pop("first")
    assert alike(one, two)
