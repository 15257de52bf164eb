"""`growformer bench`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from growformer.cli import show
from growformer.errors import RequestError, UncheckedError

if TYPE_CHECKING:
    from growformer.bench.work import Bench


def bench(
    suite: Annotated[Path | None, typer.Argument(metavar="SUITE.yaml", help="What to compare, and how.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results; gone on with where it is there.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of the text; left out: GROWFORMER_DATA, or the suite's own.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes on this machine.")] = 1,
    by_seed: Annotated[
        bool, typer.Option("--by-seed", help="All arms on one seed before the next seed: for a suite that may not end.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print each arm's sizes, steps and FLOPs; run nothing.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the suites' JSON schema, for editors.")] = False,
) -> None:
    """Compare ways of growing with training from scratch at equal cost; what was cut short goes on.

    Several processes, on several machines, may run the same command with the same --out: each takes runs that no other
    is at.
    """
    if schema:
        from growformer.bench.suite import Suite

        show.say(json.dumps(Suite.model_json_schema(), indent=1))
        return
    if suite is None:
        raise RequestError("bench takes a suite: growformer bench SUITE.yaml --out FOLDER; --schema describes one")
    if out is None and not plan:
        raise RequestError("bench takes a folder for its results: growformer bench SUITE.yaml --out FOLDER")
    # Read when torch is first imported: threads that wait for each other spinning cost small models dearly.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from growformer.bench.suite import read_suite, text_folder
    from growformer.bench.work import Bench

    folder = text_folder(read_suite(suite)[0], suite, data)
    made = Bench(suite, out or Path(), folder, _Lines(), by_seed=by_seed)
    if plan or out is None:
        _show_plan(made)
        return
    made.claim()
    left = len(made.wanted())
    show.say(f"{made.suite.name}: {len(made.suite.arms)} arms; {left} runs known to be left")
    command = [sys.executable, "-m", "growformer", "bench", str(suite), "--out", str(out), "--data", str(folder)]
    command += ["--by-seed"] if by_seed else []
    with _others(command, min(jobs, left) - 1):
        made.work()
    show.say(f"All runs are there; the report: growformer report {out}")


class _Lines:
    """Says lines."""

    def say(self, text: str) -> None:
        show.say(text)
        sys.stdout.flush()


@contextmanager
def _others(command: Sequence[str], count: int) -> Iterator[None]:
    """So many more processes at the same work; they end with this one."""
    running = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if any(codes):
        raise UncheckedError(f"{sum(map(bool, codes))} of {count} further processes failed; their messages are above")


def _show_plan(made: Bench) -> None:
    suite = made.suite
    rows = []
    for name, course in made.courses.items():
        sizes = " -> ".join(f"{size.parameters:,}" for size in course.sizes)
        rows.append(
            (
                name, sizes, f"{course.steps:,}", ", ".join(map(str, course.grows)) or "-",
                f"{course.steps * suite.batch_tokens:,}", f"{course.flops:.3e}", str(course.trunk or "-"),
            )
        )  # fmt: skip
    show.table(("arm", "parameters", "steps", "grows after", "bytes", "FLOPs", "shared steps"), rows)
    runs = {arm.name: suite.runs_of(arm, None) for arm in suite.arms}
    total = sum(made.courses[name].flops * len(wanted) for name, wanted in runs.items())
    trials = sum(rate is not None for wanted in runs.values() for rate, _ in wanted)
    more = sum(map(len, runs.values())) - trials
    show.say(f"\n{trials} trials of learning rates, {more} further runs: {total:.2e} FLOPs, shared steps counted twice")


__all__ = ["bench"]
