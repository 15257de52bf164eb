"""Two processes that train together: the same weights on both, and growth at the same step."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from growformer.training.log import read_log
from growformer.training.machines import Machines
from growformer.training.place import Place
from tests.training.train_kit import recipe, train, weights

# Each process writes down what it ends with.
WORKER = """
import json, os, sys
from pathlib import Path
from growformer import api
from growformer.training import run
from growformer.training.machines import digest

rank, grown = int(os.environ["RANK"]), []
honest, ended = run.Run._grow, run.Run._finish

def grow(self):
    honest(self)
    grown.append([self.progress.step, self.model.num_parameters()])

def finish(self):
    told = {"grown": grown, "weights": digest(self.model), "lr": self.learner.rate}
    Path(sys.argv[2] + f".{rank}.json").write_text(json.dumps(told))
    ended(self)

run.Run._grow, run.Run._finish = grow, finish
if "apart" in sys.argv and rank == 1:
    # The second process draws other new entries than the first.
    asked = run.request_of
    run.request_of = lambda growth, seed: asked(growth, seed + 1)
api.train(sys.argv[1], sys.argv[2], resume="resume" in sys.argv)
"""


def torchrun(folder: Path, path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", worker, path, folder / "run"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command), *words], capture_output=True, text=True, env=env, timeout=300, check=False
    )


def told(folder: Path) -> list[dict[str, object]]:
    return [json.loads((folder / f"run.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(tmp_path: Path) -> None:
    rule = {"plateau": {"window": 2, "improvement": 0.5, "patience": 1}}
    grow = [
        {"at": rule, "to": {"intermediate_size": 28, "num_hidden_layers": 2}, "warmup": 3},
        {"at": {"step": 7}, "to": {"hidden_size": 24}},
    ]
    path = recipe(tmp_path, grow=grow, prove=True, micro_batch=1)
    done = torchrun(tmp_path, path)
    assert done.returncode == 0, done.stderr
    first, second = told(tmp_path)
    assert first == second
    assert [step for step, _ in first["grown"]] == [4, 7]  # type: ignore[attr-defined]
    place = Place(tmp_path / "run")
    proofs = [line["proof"]["exit_code"] for line in read_log(place.log) if line["kind"] == "growth"]
    assert proofs == [0, 0]
    # From the checkpoint before the last, both processes get to the same bits again.
    before = weights(place.model)
    for gone in (place.model, place.checkpoints / "step-000000012"):
        shutil.rmtree(gone)
    done = torchrun(tmp_path, path, "resume")
    assert done.returncode == 0, done.stderr
    assert [each["weights"] for each in told(tmp_path)] == [first["weights"]] * 2 and weights(place.model) == before
    # Sums in another order are rounded otherwise; what is learned is what one process learns.
    alone, _ = train(path, tmp_path / "alone")
    losses = [[line["loss"] for line in read_log(p.log) if line["kind"] == "step"] for p in (place, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert weights(place.model)[:8] == weights(alone.model)[:8]  # the same header length: the same tensors


@pytest.mark.slow
def test_processes_that_draw_other_entries_are_stopped(tmp_path: Path) -> None:
    done = torchrun(tmp_path, recipe(tmp_path), "apart")
    assert done.returncode != 0
    assert "after the growth: process 1 has other weights than process 0" in done.stderr
    assert not (tmp_path / "run" / "model").exists()


def test_alone_there_is_nothing_to_agree_on() -> None:
    import torch

    alone = Machines(0, 1, torch.device("cpu"))
    model = torch.nn.Linear(2, 2)
    assert alone.wrap(model) is model and alone.all(3) == [3] and alone.on_first(lambda: 4) == 4
    assert alone.mean(torch.tensor(2.5)) == 2.5 and alone.decided(lambda: True)
