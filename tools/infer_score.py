"""How much of a family `growformer families infer` gets right by itself: docs/infer.md is this program's output.

Every family of growformer.families is hidden in turn and drafted from its model type and tiny sample config; then other
causal language models of transformers are drafted from their classes' default (full-size) configs.

    python tools/infer_score.py [--write docs/infer.md] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

OTHERS = (
    "apertus", "arcee", "biogpt", "bitnet", "codegen", "dbrx", "diffllama", "ernie4_5", "exaone4", "glm",
    "gpt_bigcode", "granitemoe", "helium", "hunyuan_v1_dense", "jetmoe", "lfm2", "olmoe", "persimmon", "phimoe",
    "seed_oss", "xglm",
)  # fmt: skip
"""Causal language models that were looked at while the tool was made, as the families by hand were."""

EVERY = 6
"""Of all other causal language models of transformers, in the order of their names, every sixth is drafted too. Nothing
was changed after they were first drafted, so that they say how the tool does on what it has not seen."""


def unseen() -> list[str]:
    """Every sixth causal language model of transformers that nobody looked at."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from growformer.families import FAMILIES

    seen = {kind for family in FAMILIES.values() for kind in family.model_types} | set(OTHERS)
    return sorted(k for k in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if k not in seen and k in CONFIG_MAPPING)[::EVERY]


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


def one(name: str) -> dict[str, Any]:
    """Draft one model type and measure the draft."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from growformer.algebra import WILD
    from growformer.api.checking import check_family
    from growformer.api.infer import config_of
    from growformer.drafts import infer, shrink, source_of
    from growformer.drafts.probe import probe
    from growformer.families import FAMILIES

    hand = FAMILIES.pop(name, None)  # hidden: nothing below may know it
    out: dict[str, Any] = {"name": name}
    try:
        raw = shrink(config_of(name)) if hand is None else dict(hand.sample)
        if hand is not None:
            raw |= {"model_type": hand.model_types[0], "architectures": [hand.architectures[0]]}
        draft = infer(raw)
        space: dict[str, Any] = {}
        exec(source_of(draft), space)  # the text itself is what is scored
        family = next(x for x in space.values() if type(x).__name__ == "Family")
    except Exception as error:
        return {**out, "failed": f"{type(error).__name__}: {str(error).splitlines()[-1][:160]}"}
    base = probe(draft.raw)
    assert base is not None
    out["tensors"] = len({n.text for disk in base.shapes for n, p in family.patterns if n.match(disk) is not None})
    out["guesses"] = len(draft.guesses)
    if hand is not None:
        starts = any(n.startswith(hand.prefix) for n in base.shapes) if hand.prefix else True
        total, right, roles, wrong = compare(
            hand.of(base.full), family, list(base.shapes), "" if starts else hand.prefix
        )
        out |= {"total": total, "right": right, "roles": roles, "wrong": wrong}
    atoms = [a for _, pattern in family.patterns for a in pattern.atoms()]
    out["pinned"] = sum(a.axis == WILD or (isinstance(a.axis, int) and a.axis > 1) for a in atoms)
    try:
        report = check_family(family, dtypes=("float64",))
    except Exception as error:
        return {**out, "axes": 0, "exact": 0, "ok": False, "said": [f"{type(error).__name__}: {str(error)[:160]}"]}
    refused = [f"{axis.axis}: refused: {axis.limit}" for axis in report.axes if axis.state != "exact"]
    return out | {
        "axes": len(report.axes),
        "exact": sum(axis.state == "exact" for axis in report.axes),
        "ok": report.ok,
        "said": [text[:260] for text in [*report.failures, *refused]],
    }


def table(rows: list[dict[str, Any]], known: bool) -> list[str]:
    head = ["family", "patterns right", "roles right too"] if known else ["model type", "patterns", "dims left fixed"]
    head += ["axes that grow exactly", "passes the check unedited"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | no draft: {row['failed']} |" + " |" * 3)
            continue
        first = (
            f"{row['right']}/{row['total']} | {row['roles']}/{row['total']}"
            if known
            else f"{row['tensors']} | {row['pinned']}"
        )
        lines.append(f"| {row['name']} | {first} | {row['exact']}/{row['axes']} | {'yes' if row['ok'] else 'no'} |")
    return lines


def page(known: list[dict[str, Any]], others: list[dict[str, Any]], fresh: list[dict[str, Any]]) -> str:
    import transformers

    def passed(rows: list[dict[str, Any]]) -> str:
        return f"{sum(bool(r.get('ok')) for r in rows)} of {len(rows)} drafts pass unedited."

    done = [r for r in known if "failed" not in r]
    total, right, roles = (sum(r[k] for r in done) for k in ("total", "right", "roles"))
    lines = [
        "# How good a draft `growformer families infer` is",
        "",
        f"Made by `tools/infer_score.py` with transformers {transformers.__version__}; every number is measured.",
        "",
        "Each draft goes unedited through `check_family` with float64 sources: coverage of every tensor, another order",
        "of channels, each axis grown alone and all together and proved by a fresh process, and rules broken.",
        "*Patterns right*: tensor patterns that equal the hand-written ones up to the names of axes; *roles right",
        "too*: those whose norms and attention roles mean the same. *Dims left fixed*: dims whose size no config field",
        "was found to explain, or only a number; they do not grow, and a draft that has them passes more easily.",
        "A check asks a draft only for the axes and architectures that the draft itself names.",
        "",
        "## Families that are written by hand, hidden from the tool",
        "",
        f"{right} of {total} patterns right, {roles} with their roles. {passed(known)}",
        "The tool was made while looking at these families.",
        "",
        *table(known, True),
        "",
        "## Other causal language models, from their classes' default configs",
        "",
        f"{passed(others)} The tool was made while looking at some of these.",
        "",
        *table(others, False),
        "",
        f"## Every {EVERY}th of all other causal language models: not looked at while the tool was made",
        "",
        passed(fresh),
        "",
        *table(fresh, False),
        "",
        "## What fell short",
        "",
    ]
    for row in [*known, *others, *fresh]:
        short = [*row.get("wrong", ()), *row.get("said", ())]
        if short:
            lines += [f"### {row['name']}", "", *(f"- `{' '.join(s.split())}`" for s in short[:6])]
            lines += [f"- and {len(short) - 6} more"] if len(short) > 6 else []
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--rows", type=Path, help="keep what was measured here, and go on from it")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    from growformer.families import FAMILIES

    known, others, fresh = list(FAMILIES), list(OTHERS), unseen()
    if args.names:
        known, others, fresh = ([n for n in group if n in args.names] for group in (known, others, fresh))
    rows: dict[str, dict[str, Any]] = {}
    if args.rows and args.rows.exists():
        rows = {row["name"]: row for row in map(json.loads, args.rows.read_text(encoding="utf-8").splitlines())}
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(one, name): name for name in [*known, *others, *fresh] if name not in rows}
        for done in as_completed(running):
            name = running[done]
            rows[name] = done.result()
            if args.rows:
                with args.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[name]) + "\n")
            told = {
                k: v for k, v in rows[name].items() if k in ("failed", "right", "roles", "total", "exact", "axes", "ok")
            }
            print(name, told, file=sys.stderr, flush=True)
    text = page(*([rows[n] for n in group] for group in (known, others, fresh)))
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
