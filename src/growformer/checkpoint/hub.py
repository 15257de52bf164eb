"""Models named by their Hub id: fetched into the Hub's own cache, and from there on a folder like any other."""

from __future__ import annotations

import os
import re
from pathlib import Path

from growformer.checkpoint.folder import COMPANIONS, LEGAL, TEMPLATE_FOLDERS
from growformer.errors import SourceError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
SECONDS = 5.0
"""How long the Hub may take to answer before a model counts as out of reach."""


def located(source: str | Path) -> Path:
    """The folder of a model: the one named, or the local snapshot of the model with that Hub id ("org/name").

    A folder that exists is taken as it is. Of a Hub model come config.json, safetensors files with their index, the
    card, and what travels with a grown model (see `companions`).

    Args:
        source: a folder, or a Hub id where no such folder exists.

    Returns:
        A folder; one that does not exist where the name is no id either, for whoever reads it to refuse.

    Raises:
        SourceError: no such folder, and the Hub or its cache has no such model, or cannot be reached.
    """
    # A path with a closing slash, or one that begins with "./", is meant as a path.
    text, folder = os.fspath(source), Path(source)
    if os.path.lexists(folder) or _ID.fullmatch(text) is None:
        return folder
    # Whoever has a folder need not have this package work at all, so it is imported here.
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=_wanted(), etag_timeout=SECONDS))
    except Exception as error:  # of the network, the Hub, the disk: each has classes of its own, and one text is needed
        offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") else ""
        raise SourceError(
            f"{text}: there is no such folder, and no model of that name could be had from the Hub{offline}: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def hub_id(folder: str | Path) -> str | None:
    """The Hub id whose snapshot a folder of the Hub's cache is; None for any other folder."""
    # .../models--org--name/snapshots/<commit>
    parts = Path(folder).absolute().parts
    if len(parts) < 3 or parts[-2] != "snapshots":
        return None
    found = re.fullmatch(r"models--((?:(?!--).)+)--((?:(?!--).)+)", parts[-3])
    return f"{found[1]}/{found[2]}" if found else None


def _wanted() -> list[str]:
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", "README.md", *COMPANIONS]
    wanted += [f"{sub}/*.jinja" for sub in TEMPLATE_FOLDERS]
    # The Hub's patterns know upper from lower case.
    return wanted + [form(pattern) for pattern in LEGAL for form in (str.lower, str.upper, str.capitalize)]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"
