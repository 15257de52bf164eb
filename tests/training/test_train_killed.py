"""kill -9 at random moments of a three-stage run on real text: it resumes to the weights of the unbroken run."""

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from growformer import api
from growformer.training.log import read_log
from growformer.training.place import Place
from tests.api.forked import forked
from tests.conftest import ON_CI, ROOT
from tests.training.train_kit import MODEL, equal, recipe, training_state, weights

KILLS = 5
STEPS = 90


@pytest.fixture(scope="module")
def novels() -> Path:
    """Public-domain novels, 54 MB to train on."""
    data = os.environ.get("GROWFORMER_DATA")
    folder = (Path(data) if data else ROOT.parent / "shared" / "data") / "novels"
    if not (folder / "train.txt").is_file():
        reason = f"no text at {folder}: set GROWFORMER_DATA to the folder that holds novels"
        pytest.fail(reason, pytrace=False) if ON_CI else pytest.skip(reason)
    return folder


def three_stages(folder: Path, novels: Path) -> Path:
    return recipe(
        folder,
        model={**MODEL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        data={"train": str(novels / "train.txt"), "valid": str(novels / "valid.txt")},
        sequence_length=64,
        batch_tokens=512,
        budget={"steps": STEPS},
        checkpoint={"every": 10, "keep": 2},
        evaluate={"every": 30, "tokens": 1024},
        prove=True,
        grow=[
            {"at": {"step": STEPS // 3}, "to": {"intermediate_size": 96, "num_hidden_layers": 3}, "warmup": 15},
            {
                "at": {"tokens": 2 * STEPS // 3 * 512},
                "to": {"hidden_size": 48},
                "warmup": 15,
                "keep_dynamics": True,
                "prove": False,
            },
        ],
    )


def reached(place: Place) -> int:
    """The last step in the log; the last line may be half written."""
    whole = place.log.read_text().splitlines()[:-1] if place.log.exists() else []
    return int(json.loads(whole[-1])["step"]) if whole else 0


@pytest.mark.slow
def test_five_kills(novels: Path, tmp_path: Path) -> None:
    path = three_stages(tmp_path, novels)

    def train(out: Path, kill_when: Callable[[], bool] | None = None) -> int:
        def look() -> bool:
            time.sleep(0.005)  # a watcher that never rests would take a processor
            return kill_when is not None and kill_when()

        return os.waitstatus_to_exitcode(forked(lambda: api.train(path, out, resume=True) and None, look))

    whole, again = Place(tmp_path / "whole"), Place(tmp_path / "again")
    began = time.monotonic()
    assert train(whole.out) == 0
    took = time.monotonic() - began
    assert [line["step"] for line in read_log(whole.log) if line["kind"] == "growth"] == [STEPS // 3, 2 * STEPS // 3]

    def after(step: int, wait: float) -> Callable[[], bool]:
        seen: list[float] = []

        def look() -> bool:
            if reached(again) >= step:
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] >= wait

        return look

    # A random step in each fifth of the run, and a random part of a step after it. Two more are aimed at where most is
    # half done: a growth being proved, a checkpoint being written.
    draw = random.Random(0)
    step = took / STEPS
    moments = [
        after(draw.randrange(i * STEPS // KILLS, (i + 1) * STEPS // KILLS - 2), draw.uniform(0, step))
        for i in range(KILLS)
    ]
    moments[1:1] = [lambda: (again.out / ".proof" / "grown").exists()]
    moments[4:4] = [lambda: any(again.checkpoints.glob(".step-*.partial/model/*"))]
    stood = []
    for moment in moments:
        assert train(again.out, moment) == -9
        stood.append(max((int(p.name.split("-")[1]) for p in again.checkpoints.glob("step-*")), default=0))
    print(f"killed {len(stood)} times, at checkpoints {stood}; the unbroken run took {took:.1f} s")
    assert len(set(stood)) >= 4
    assert train(again.out) == 0
    assert weights(again.model) == weights(whole.model)
    assert equal(training_state(again), training_state(whole))
    assert [p.name for p in (*again.out.iterdir(), *again.checkpoints.iterdir()) if p.name.startswith(".")] == []
