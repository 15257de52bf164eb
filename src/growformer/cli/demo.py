"""`growformer demo`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the report and the model: a new or an empty one.")
    ] = Path("growformer-demo"),
    steps: Annotated[
        int | None, typer.Option("--steps", help="Training steps in all; left out: about a minute on two cores.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of the first weights, the batches and the new entries.")
    ] = 0,
) -> None:
    """Train a small Llama on text that every Python ships, grow every axis in mid-run, prove each growth, report.

    Offline, on the CPU, in about a minute.
    """
    # Read when torch is first imported. By default its threads wait for each other spinning, which costs a small model
    # ten times the time as soon as anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    from growformer import api
    from growformer.cli import show
    from growformer.report.demo import write_report
    from growformer.training.demo import run_demo

    results = run_demo(out, steps, seed, show.say, api.grow)
    headers = ("growth", "step", "parameters", "before", "after", "float64", "dead", "verdict")
    show.table(headers, [_row(event) for event in results["events"]], "Held out, before and after, in bits per byte:")
    write_report(out / "results.json", out / "report.html")
    final = results["final"]
    show.say(
        f"\nHeld out, at the end: {final['bits_per_byte']:.3f} bits per byte "
        f"({results['start']['bits_per_byte']:.3f} before any training). {results['seconds']:.0f} seconds."
    )
    show.say(f"Report: {out / 'report.html'}")
    show.say(f"Model:  {out / 'model'} (stock from_pretrained loads it; tokens are bytes)")


def _row(event: Mapping[str, Any]) -> tuple[str, ...]:
    measured, (before, after) = event["proof"]["measured"], event["bits_per_byte"]
    old, new = event["parameters"]
    return (
        event["name"],
        f"{event['step']:,}",
        f"{old:,} -> {new:,}",
        f"{before:.6f}",
        f"{after:.6f}",
        f"{measured['relative']:.1e}",
        f"{measured['dead']:,} of {measured['new_entries']:,}",
        "holds" if event["proof"]["exit_code"] == 0 else "FAILS",
    )


__all__ = ["demo"]
