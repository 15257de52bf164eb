"""How much of a family `growformer families infer` gets right by itself: docs/infer.md is this program's output.

Every family of growformer.families is hidden in turn and drafted from its model type and tiny sample config; then
twenty other causal language models of transformers are drafted from their classes' default (full-size) configs. A draft
is written to a FILE.py, and that file goes unedited through what `growformer families check FILE.py` runs.

    python tools/infer_score.py [--only NAME ...] [--jobs 2]

What was measured stands in docs/infer.json, each draft with a hash of the sources that it depends on; a run measures
what is missing or stale there, and makes the page from all of it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "infer.md", ROOT / "docs" / "infer.json"
PARTS = ("algebra", "families", "planning", "proof", "checkpoint", "api", "drafts")

OTHERS = (
    "apertus", "arcee", "biogpt", "bitnet", "codegen", "diffllama", "doge", "ernie4_5", "exaone4", "glm",
    "gpt_bigcode", "granitemoe", "helium", "jetmoe", "lfm2", "olmoe", "persimmon", "phimoe", "seed_oss", "xglm",
)  # fmt: skip
"""Causal language models without a family."""

LEFT_OUT = ("dbrx", "deepseek_v2", "hunyuan_v1_dense")
"""Their classes' own default configs give no model that builds and runs, so that there is nothing to draft from;
`doge`, the next of the alphabet, stands in."""

FIRST = 4
"""So many of a draft's failures are listed."""


def sources_hash() -> str:
    """A hash of every Python file that a draft or its check depends on, and of this one."""
    found = hashlib.sha256(Path(__file__).read_bytes())
    for part in PARTS:
        for path in sorted((ROOT / "src" / "growformer" / part).rglob("*.py")):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def skeleton(pattern: Any, names: Any) -> list[tuple[str, str]]:
    """A pattern's dims with axes named by `names`, and the stand of each atom; roles left out."""

    def said(dim: Any) -> str:
        if dim.atom is not None:
            axis = dim.atom.axis
            return "_" if isinstance(axis, int) or axis == "_" else str(names.get(axis, axis))
        inner = [said(part) for part in dim.parts]
        flat = [x[1:-1] if dim.kind == "product" and x[0] == "(" and "|" not in x else x for x in inner]
        return f"({(' | ' if dim.kind == 'concat' else ' ').join(flat)})"

    dims = [(said(dim), next(iter(dim.atoms())).stand) for dim in pattern.dims if not _bare(dim)]
    return [(text, "" if text == "_" else stand) for text, stand in dims]


def _bare(dim: Any) -> bool:
    return dim.atom is not None and dim.atom.index


def indexed(pattern: Any, names: Any) -> set[str]:
    return {str(names.get(d.atom.axis, d.atom.axis)) for d in pattern.dims if _bare(d)}


def compare(hand: Any, draft: Any, shapes: list[str], prefix: str) -> tuple[int, int, int, list[str]]:
    """(patterns in the model, with the right dims and axes, also with the right roles, the wrong ones)."""
    votes: Counter[tuple[str, str]] = Counter()
    pairs: dict[str, tuple[Any, Any, Any, Any]] = {}
    for disk in shapes:
        own = hand.find(hand.full_name(disk, prefix))
        hits = [(n, p) for n, p in draft.patterns if n.match(disk) is not None]
        if own[0].text in pairs:
            continue
        pairs[own[0].text] = (own[0], own[1], *(hits[0] if len(hits) == 1 else (None, None)))
        if len(hits) == 1:
            a, b = list(own[1].atoms()), list(hits[0][1].atoms())
            if len(a) == len(b):
                votes.update((str(y.axis), str(x.axis)) for x, y in zip(a, b, strict=True))
    names: dict[str, str] = {}
    for (mine, theirs), _ in votes.most_common():
        if mine not in names and theirs not in names.values():
            names[mine] = theirs
    right = roles = 0
    wrong = []
    for text, (name, pattern, other_name, other) in pairs.items():
        ok = other is not None and skeleton(pattern, {}) == skeleton(other, names)
        ok = ok and indexed(pattern, {}) == indexed(other, names)
        ok = ok and len(name.axes) == len(other_name.axes)
        right += ok
        if not ok:
            wrong.append(f"{text}: {other.text if other is not None else 'not covered once'} (by hand: {pattern.text})")
            continue
        roles += [meaning(hand, a, {}) for a in pattern.atoms()] == [meaning(draft, a, names) for a in other.atoms()]
    return len(pairs), right, roles, wrong


def meaning(family: Any, atom: Any, names: Any) -> Any:
    """What a role says: which norm (whatever it is called), or the role itself."""
    norm = family.norms.get(atom.role or "") if atom.stand in ("gain", "shift") else None
    if norm is not None:
        return (norm.kind, norm.eps, norm.gain, norm.output, tuple(names.get(a, a) for a in norm.axes))
    return atom.role if atom.role in ("q", "k", "v", "raw", "embed", "logits", "scale") else None


_opened = ExitStack()
_verifier: Any = None


def measure(name: str) -> dict[str, Any]:
    """Draft one model type and check the draft, in this process and one other that it keeps."""
    import transformers

    from growformer.families import FAMILIES

    global _verifier
    if _verifier is None:
        from growformer.api.checks.verifying import start_worker, verifier

        start_worker()
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        # A process that ends waits for its children, and that one waits for work: it goes before queues close (10).
        Finalize(None, _opened.close, exitpriority=100)
        _verifier = _opened.enter_context(verifier())
    start = time.monotonic()
    hand = FAMILIES.pop(name, None)  # hidden: nothing below may know it
    try:
        found = _measured(name, hand)
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[-1][:240]}"}
    finally:
        if hand is not None:
            FAMILIES[name] = hand
    return {"name": name, **found, "seconds": round(time.monotonic() - start)}


def _measured(name: str, hand: Any) -> dict[str, Any]:
    from growformer.algebra import WILD
    from growformer.api.checking import check_family
    from growformer.api.infer import Checked, config_of, drafted, failures, settle
    from growformer.drafts import Draft, source_of
    from growformer.drafts.probe import probe

    raw = config_of(name) if hand is None else dict(hand.sample)
    if hand is not None:
        raw |= {"model_type": hand.model_types[0], "architectures": [hand.architectures[0]]}
    first = drafted(raw)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "draft.py"

        def check(draft: Draft) -> Checked:
            file.write_text(source_of(draft), encoding="utf-8")  # the file itself is what is checked
            try:
                return check_family(str(file), within=_verifier)
            except Exception as error:
                return error

        draft, report = settle(first, check)
    family = draft.family
    base = probe(draft.raw)
    assert base is not None
    out: dict[str, Any] = {
        "tensors": len({n.text for disk in base.shapes for n, _ in family.patterns if n.match(disk) is not None}),
        "pinned": sum(
            a.axis == WILD or (isinstance(a.axis, int) and a.axis > 1) for _, p in family.patterns for a in p.atoms()
        ),
        "taken": sorted({a for f in family.frozen[len(first.family.frozen) :] for a in f.axes}),
        "failures": [text[:300] for text in failures(report)],
        "ok": not failures(report),
        "classes": len(family.architectures),
    }
    if hand is not None:
        starts = any(n.startswith(hand.prefix) for n in base.shapes) if hand.prefix else True
        prefix = "" if starts else hand.prefix
        total, right, roles, wrong = compare(hand.of(base.full), family, list(base.shapes), prefix)
        out |= {"total": total, "right": right, "roles": roles, "wrong": wrong}
    axes = [] if isinstance(report, Exception) else report.axes
    stays = {axis.axis: axis.limit[:200] for axis in axes if axis.state not in ("exact", "within eps")}
    return out | {"axes": len(axes), "exact": len(axes) - len(stays), "stays": stays}


def table(rows: list[Mapping[str, Any]], known: bool) -> list[str]:
    head = ["family", "patterns right", "roles right too"] if known else ["model type", "patterns", "dims left fixed"]
    head += ["classes", "axes that grow", "axes taken back", "passes the check unedited"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | no draft |" + " |" * (len(head) - 3) + " no |")
            continue
        first = (str(row["tensors"]), str(row["pinned"]))
        if known:
            first = (f"{row['right']}/{row['total']}", f"{row['roles']}/{row['total']}")
        rest = (
            str(row["classes"]),
            f"{row['exact']}/{row['axes']}",
            ", ".join(row["taken"]),
            "yes" if row["ok"] else "no",
        )
        lines.append(f"| {' | '.join((row['name'], *first, *rest))} |")
    return lines


def summary(rows: list[Mapping[str, Any]], asked: tuple[str, ...]) -> str:
    passed = [row for row in rows if row.get("ok")]
    clean = sum(not row["taken"] for row in passed)
    text = f"**{len(passed)} of {len(asked)} drafts pass unedited**, {clean} of them with no axis taken back."
    if len(rows) < len(asked):
        text += f" Only {len(rows)} of {len(asked)} were measured with these sources."
    return text


def page(rows: Mapping[str, Mapping[str, Any]], families: tuple[str, ...]) -> str:
    """docs/infer.md."""
    known, others = ([rows[n] for n in group if n in rows] for group in (families, OTHERS))
    done = [r for r in known if "failed" not in r]
    total, right, roles = (sum(r[k] for r in done) for k in ("total", "right", "roles"))
    lines = [
        "# How good a draft `growformer families infer` is",
        "",
        "Made by `python tools/infer_score.py` with "
        f"transformers {importlib.metadata.version('transformers')}, from docs/infer.json; every number is measured",
        f"(sources {', '.join(sorted({row['sources'][:8] for row in rows.values()}))}).",
        "",
        "Each draft is written to a file, and the file goes unedited through `growformer families check FILE.py`:",
        "coverage of every tensor, another order of channels, each axis grown alone and all together (float64,",
        "float32, bfloat16 sources) and proved by a fresh process, and rules broken on purpose. A check asks a draft",
        "only for the axes and architectures that the draft itself names, so a draft that leaves much fixed passes",
        "more easily: the columns say how much.",
        "",
        "*Patterns right*: tensor patterns that equal the hand-written ones up to the names of axes; *roles right",
        "too*: those whose norms and attention roles mean the same. *Dims left fixed*: dims whose size no config",
        "field was found to explain, or only a number. *Classes*: the bare model and task heads that the draft",
        "covers, each of which is grown as well. *Axes that grow*: exactly, or (layers that a norm on the stream ends)",
        "within that norm's eps; the others are refused, with a reason. *Axes taken back*: `infer` had them grow, its",
        "own check refuted it, and the draft now refuses them (`frozen`).",
        "",
        "## Families that are written by hand, hidden from the tool",
        "",
        summary(known, families),
        f"{right} of {total} patterns right, {roles} with their roles (of the {len(done)} families that have a draft).",
        "The tool was made while looking at these families.",
        "",
        *table(known, True),
        "",
        "## Twenty other causal language models, from their classes' default configs",
        "",
        summary(others, OTHERS),
        "The tool was made while looking at most of these as well.",
        f"Not among them: {', '.join(LEFT_OUT)}, whose classes' own defaults give no model that runs.",
        "",
        *table(others, False),
        "",
        "## What does not pass, and why",
        "",
    ]
    for row in (r for r in [*known, *others] if not r.get("ok")):
        said = [row["failed"]] if "failed" in row else row["failures"]
        lines += [f"### {row['name']}", "", *_listed(said, FIRST), ""]
    lines += ["## What stays as it is in drafts that pass", ""]
    for row in (r for r in [*known, *others] if r.get("ok") and r["stays"]):
        lines += [f"- {row['name']}: " + "; ".join(f"{a}: `{_flat(s)}`" for a, s in row["stays"].items())]
    lines += ["", "## Patterns that are not the hand-written ones", ""]
    for row in (r for r in done if r["wrong"]):
        lines += [f"### {row['name']}", "", *_listed(row["wrong"], 8), ""]
    return "\n".join(lines).rstrip() + "\n"


def _flat(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _listed(said: list[str], most: int) -> list[str]:
    more = [f"- and {len(said) - most} more"] if len(said) > most else []
    return [*(f"- `{_flat(s)}`" for s in said[:most]), *more]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", nargs="+", metavar="NAME", help="measure these alone, even if they were")
    words.add_argument("--also", nargs="+", default=[], metavar="HASH", help="show rows of these sources as well")
    words.add_argument("--jobs", type=int, default=2, help="drafts at a time; each takes two processes")
    words.add_argument("--results", type=Path, default=RESULTS, help="what was measured; kept up to date")
    words.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    given = words.parse_args()
    from growformer.families import FAMILIES

    families, key = tuple(FAMILIES), sources_hash()
    rows: dict[str, dict[str, Any]] = {}
    if given.results.exists():
        rows = json.loads(given.results.read_text(encoding="utf-8"))
    asked = given.only or [n for n in (*families, *OTHERS) if rows.get(n, {}).get("sources") != key]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(measure, name) for name in asked]):
            row = {**done.result(), "sources": key}
            rows[row["name"]] = row
            given.results.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            told = {k: v for k, v in row.items() if k in ("failed", "right", "total", "exact", "axes", "taken", "ok")}
            print(row["name"], told, file=sys.stderr, flush=True)
    fresh = {name: row for name, row in rows.items() if row["sources"] in (key, *given.also)}
    given.page.write_text(page(fresh, families), encoding="utf-8")


if __name__ == "__main__":
    main()
