"""Worlds of several processes for tests: each runs scenarios in turn, and says what became of them."""

import datetime
import faulthandler
import json
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException

Scenario = Callable[[Path], None]
PATIENCE = datetime.timedelta(seconds=120)
CRASHES = {-signal.SIGABRT, -signal.SIGBUS, -signal.SIGSEGV}


def run(ranks: int, scenarios: list[Scenario], folder: Path) -> dict[str, str]:
    """Run scenarios in a new world of `ranks` processes.

    Args:
        scenarios: functions of a module; each is called by every rank with `folder`, where files may be put.

    Returns:
        By scenario, what went wrong on which rank; "" where nothing did.
    """
    report = folder / f"report-{ranks}.json"
    killed = _spawn(ranks, scenarios, folder, report)
    if killed is not None:
        # Once in some dozens of worlds malloc finds a rank's heap corrupted. Valgrind's memcheck, over all scenarios
        # on two ranks, finds no invalid access; it runs threads one at a time, so what is left is a race between
        # those of torch.distributed. A scenario that fails raises, and is never run again.
        warnings.warn(f"a world of {ranks} is started again: {killed}", RuntimeWarning, stacklevel=2)
        killed = _spawn(ranks, scenarios, folder, report)
    if killed is not None:
        raise killed
    found: dict[str, str] = json.loads(report.read_text())
    return found


def _spawn(ranks: int, scenarios: list[Scenario], folder: Path, report: Path) -> ProcessException | None:
    """Run a world to its end; how it ended, if a rank crashed. What else goes wrong is raised."""
    meeting = Path(tempfile.mkdtemp(dir=folder)) / "meeting"
    world = torch.multiprocessing.spawn(_rank, (ranks, scenarios, folder, report, meeting), nprocs=ranks, join=False)
    try:
        while not world.join():
            pass
    except ProcessException as error:  # of the first to end, which need not be the one that crashed
        if not {process.exitcode for process in world.processes} & CRASHES:
            raise
        return error
    return None


def _rank(rank: int, ranks: int, scenarios: list[Scenario], folder: Path, report: Path, meeting: Path) -> None:
    faulthandler.enable()  # a process that is killed says where it was
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=PATIENCE)
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


def killed_once(folder: Path) -> None:
    """A control: the first world dies of a signal, as one whose heap is corrupted does."""
    mark = folder / "killed"
    if dist.get_rank() == 0 and not mark.exists():
        mark.touch()
        os.abort()


def killed(folder: Path) -> None:
    """A control: a world that always dies."""
    if dist.get_rank() == 0:
        os.abort()
