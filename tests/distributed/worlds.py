"""Worlds of several processes for tests: each runs scenarios in turn, and says what became of them."""

import datetime
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

Scenario = Callable[[Path], None]
PATIENCE = datetime.timedelta(seconds=120)


def run(ranks: int, scenarios: list[Scenario], folder: Path) -> dict[str, str]:
    """Run scenarios in a new world of `ranks` processes.

    Args:
        scenarios: functions of a module; each is called by every rank with `folder`, where files may be put.

    Returns:
        By scenario, what went wrong on which rank; "" where nothing did.
    """
    report = folder / f"report-{ranks}.json"
    torch.multiprocessing.spawn(_rank, (ranks, scenarios, folder, report), nprocs=ranks)
    found: dict[str, str] = json.loads(report.read_text())
    return found


def _rank(rank: int, ranks: int, scenarios: list[Scenario], folder: Path, report: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    meeting = f"file://{folder}/meeting-{ranks}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=PATIENCE)
    outcome = {}
    for scenario in scenarios:
        problem = ""
        try:
            scenario(folder)
        except BaseException:
            problem = f"rank {rank}:\n{traceback.format_exc()}"
        problems = [problem] * ranks
        dist.all_gather_object(problems, problem)
        outcome[scenario.__name__] = "\n".join(filter(None, problems))
    if rank == 0:
        report.write_text(json.dumps(outcome))
    dist.barrier()
    os._exit(0)  # all is said: threads of the process group now and then abort a process whose interpreter shuts down


def failing(folder: Path) -> None:
    """A control: a scenario that fails on one rank."""
    assert dist.get_rank() == 0, "only here"
