"""families infer: a first draft of the literal of a family that is not here yet, checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from growformer.drafts import Draft, infer, shrink, source_of
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
    draft = drafted(config_of(source))
    draft.guesses.extend(f"the check fails: {said}" for said in failures(draft))
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


def failures(draft: Draft) -> list[str]:
    """What the check of a draft finds, one sentence each."""
    from growformer.api.checking import check_family

    try:
        return check_family(draft.family, dtypes=("float64",)).failures
    except Exception as error:  # a draft may mislead the engine anywhere
        return [f"{type(error).__name__}: {error}"]


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
