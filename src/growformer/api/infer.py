"""families infer: a first draft of the literal of a family that is not here yet, checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from growformer.algebra import Frozen
from growformer.api.checks.results import FamilyReport
from growformer.drafts import Draft, infer, shrink, sized_by, source_of
from growformer.errors import RequestError


def run_infer(source: str, out: Path | None = None) -> str:
    """Write the first draft of a family's literal, with what to look at in comments that begin with ``# ?``.

    The draft is checked as `growformer families check` would (with float64 sources alone); what fails stands in such
    comments too.

    Args:
        source: a config.json, a folder that holds one, or a model type of transformers.
        out: the file to write; None prints it.

    Returns:
        The python source.

    Raises:
        RequestError: transformers does not know the model type, or its tiny model does not run.
    """
    draft, report = settle(drafted(config_of(source)), check_draft)
    draft.guesses.extend(f"the check fails: {said}" for said in failures(report))
    text = source_of(draft)
    if out is None:
        print(text)
    else:
        out.write_text(text, encoding="utf-8")
    return text


def drafted(raw: dict[str, Any]) -> Draft:
    """The draft of a config of any size, unchecked.

    Raises:
        RequestError: transformers does not know the model type, or no tiny model of it runs.
    """
    return infer(shrink(raw))


Checked = FamilyReport | Exception
"""What a check of a draft found, or what it broke down with: a draft may mislead the engine anywhere."""


def check_draft(draft: Draft) -> Checked:
    """A draft's literal through `families check`, with float64 sources alone."""
    from growformer.api.checking import check_family

    try:
        return check_family(draft.family, dtypes=("float64",))
    except Exception as error:
        return error


def failures(report: Checked) -> list[str]:
    """What a check found, one sentence each."""
    return [f"{type(report).__name__}: {report}"] if isinstance(report, Exception) else report.failures


def settle(draft: Draft, check: Callable[[Draft], Checked]) -> tuple[Draft, Checked]:
    """Take back what the check refutes: axes whose growth alone fails it stay, with that as their reason.

    A draft knows no more than its probes, and what it does not know may be what an axis needs. What is taken back is
    said in the literal (`frozen`) and in a comment; a failure that no single axis has stays a failure.

    Args:
        draft: as it was read off.
        check: of a draft, as often as axes are taken back.

    Returns:
        The draft with fewer axes that grow, and what the last check found of it.
    """
    report = check(draft)
    for _ in range(3):
        lost = {} if isinstance(report, Exception) else refuted(draft, report)
        if not lost:
            break
        more = tuple(Frozen(axes, f"its growth alone fails the check ({said})") for axes, said in lost.items())
        guesses = [f"{' and '.join(axes)}: taken back, for the check found: {said}" for axes, said in lost.items()]
        family = replace(draft.family, frozen=(*draft.family.frozen, *more))
        draft = replace(draft, family=family, guesses=[*draft.guesses, *guesses])
        report = check(draft)
    return draft, report


def refuted(draft: Draft, report: FamilyReport) -> dict[tuple[str, ...], str]:
    """The axes whose growth alone was made and not proved, with what was found."""
    out = {}
    for growth in report.growths:
        axes = tuple(sized_by(draft.family, growth.what))
        if axes and growth.architecture == draft.family.architectures[0] and growth.state in ("fails", "not checked"):
            out[axes] = " ".join(growth.detail.split())[:160]
    return out


def config_of(source: str) -> dict[str, Any]:
    """The config that a source means.

    Raises:
        RequestError: there is no such file, and transformers knows no such model type.
    """
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RequestError(f"{path}: not JSON: {error}") from error
        if not isinstance(found, dict):
            raise RequestError(f"{path}: not a JSON object")
        return found
    from transformers import CONFIG_MAPPING

    if source not in CONFIG_MAPPING:
        raise RequestError(f"{source}: neither a config.json, nor a folder with one, nor a model type of transformers")
    config: dict[str, Any] = CONFIG_MAPPING[source]().to_dict()
    return config
