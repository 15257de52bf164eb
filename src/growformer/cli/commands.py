"""The commands' work: call the API, print the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from growformer import api
from growformer.api.adapters import plan_adapter
from growformer.checkpoint import read_config
from growformer.checkpoint.adapters import is_adapter
from growformer.checkpoint.folder import size_text, target_errors
from growformer.checkpoint.hub import located
from growformer.checkpoint.stock import full_config
from growformer.cli import show
from growformer.cli.request import config_at, experts_of, parse, places, require_reached, towards
from growformer.errors import RequestError, SourceError
from growformer.planning import Plan, TensorPlan
from growformer.planning.sizes import growable, read_request
from growformer.planning.split import taken
from growformer.proof.claims import Proof

if TYPE_CHECKING:
    from growformer.api.becoming import Seen


def _asked(
    src: Path,
    words: Sequence[str],
    to: Path | None,
    **planning: Any,
) -> dict[str, Any]:
    """The request, its keys checked: they are about to become keywords.

    Args:
        src: the source's folder.
        words: of the command line.
        to: a config.json to take sizes from.
        planning: what else `plan` is told.
    """
    from growformer.api.becoming import becoming_of, seen  # with torch, which lists and help do without

    request: dict[str, Any] = dict(parse(words))
    raw, ignored = read_config(src), planning.get("ignore_fields", ())
    family = api.family_of(raw)
    if to is None:
        if becoming_of(family, request) is None:
            return dict(read_request(family, {name: x for name, x in request.items() if name != "model_type"}))
        view = seen(family, raw, request, ignored)
        chosen = {name: x for name, x in _chosen(view).items() if name in request}
        return {"model_type": request["model_type"], **view.request, **chosen}
    there = config_at(to)
    kind = {} if there["model_type"] in family.model_types else {"model_type": there["model_type"]}
    try:
        becoming = becoming_of(family, kind)
    except RequestError as error:
        raise RequestError(f"{to}: model_type {there['model_type']!r} is not {raw['model_type']!r}; {error}") from None
    view = seen(family, raw, kind | experts_of(becoming, there), ignored)
    also = tuple(_chosen(view))
    wanted, follows = towards(view.full, to, there, (*growable(view.family), *taken(view.family), *also))
    wanted |= _chosen(view)
    both = [name for name in request if name in wanted]
    if both:
        raise RequestError(f"{both[0]} is asked for and is in {to} as well; say it once")
    if not wanted and not request:
        raise RequestError(f"{to}: every size is the source's own, so nothing is asked")
    asked: dict[str, Any] = {**kind, **read_request(view.family, {**wanted, **request}, also)}
    if follows:
        made = api.plan(src, **planning, **asked)
        require_reached(to, follows, full_config(made.target_config)[0])
    return asked


_LEFT: Mapping[str, Any] = {
    "method": "paper", "ignore_fields": [], "rope": "theta", "new_tokens": "open", "layers_at": None,
}  # fmt: skip
"""Options of models' growths, as they are when nobody has said anything."""


def _of_adapter(src: Path, words: Sequence[str], to: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options and request of an adapter's growth; what was asked of a model's stays in, and is refused by name."""
    if to is not None:
        raise RequestError(f"--to {to}: {src} holds an adapter; its rank grows by r=16")
    return {name: x for name, x in options.items() if name not in _LEFT or x != _LEFT[name]} | dict(parse(words))


def _chosen(view: Seen) -> dict[str, int]:
    """How many experts a token takes, where the source becomes a model of a family with experts."""
    experts = view.family.experts
    return {experts.chosen: view.origin.chosen} if experts is not None and view.origin is not None else {}


def run_plan(
    src: Path,
    words: Sequence[str],
    to: Path | None,
    layers_at: str | None,
    save: Path | None,
    json: bool,
    **planning: Any,
) -> None:
    """`growformer plan`."""
    src = located(src)
    follow = planning.pop("follow")
    planning["layers_at"] = places(layers_at)
    if is_adapter(src):
        made = plan_adapter(src, follow=follow, **_of_adapter(src, words, to, planning))
    elif follow is not None:
        raise RequestError(f"--follow {follow}: {src} holds no adapter of PEFT")
    else:
        made = api.plan(src, **planning, **_asked(src, words, to, **planning))
    if save is not None:
        with target_errors(save), save.open("x", encoding="utf-8") as file:
            file.write(made.dumps() + "\n")
    if json:
        show.as_json(made.to_json())
        return
    print_plan(made)


_FUNCTION = {
    "exact": "the same (exact in real arithmetic)",
    "within eps": "the same within eps, not exact",
    "changed": "another",
}


def print_plan(made: Plan) -> None:
    """The plan for people."""
    old, new = made.parameters
    became = f"{made.source_family} -> " if made.source_family else ""
    show.say(f"{became}{made.family}, method {made.method}: {show.number(old)} -> {show.number(new)} parameters")
    show.table(("tensors", "how many", "shape", "grown", "fidelity", "factor"), _rows(made))
    was, becomes = made.source_config, made.target_config
    keys = [key for key in becomes if was.get(key) != becomes[key]] + [key for key in was if key not in becomes]
    rows = [(key, str(was.get(key, "-")), str(becomes.get(key, "-"))) for key in keys]
    show.say("")
    show.table(("config.json", "was", "becomes"), rows)
    show.say("")
    for title, lines in (("Moves along", made.moved), ("Note", made.notes), ("Dead", made.dead)):
        for line in lines:
            show.say(f"{title}: {line}")
    for line in made.within_eps:
        show.say(f"Within eps, not exact: {line}")
    for line in made.changes:
        show.say(f"Changes the function: {line}")
    show.say(f"Function: {_FUNCTION[made.function]}.")
    count = made.fidelity
    show.say(
        f"Fidelity: {count['identical']} tensors identical, {count['scaled']} scaled by powers of two (bits exact), "
        f"{count['rounded']} rounded once, {count['new']} new."
    )
    if count["rounded"]:
        show.say("Rounded tensors are exact with --dtype float64, and at ratios of 4 (whose square roots are whole).")


def _rows(made: Plan) -> list[tuple[str, ...]]:
    groups: dict[tuple[str, bool], list[TensorPlan]] = {}
    for tensor in made.tensors:
        groups.setdefault((tensor.pattern, tensor.source is None), []).append(tensor)
    rows: list[tuple[str, ...]] = []
    for (pattern, is_new), tensors in groups.items():
        first = tensors[0]
        shape = "-" if is_new else _shape(first.source_shape)
        factors = ", ".join(str(factor) for factor in first.factors) if not is_new else ""
        closed = is_new and not first.free
        kind: str = "new, zero" if closed else first.fidelity
        if is_new and first.fill.kind == "constant":
            kind = f"new, {first.fill.factor}"
        rows.append((pattern, str(len(tensors)), shape, _shape(first.shape), kind, factors))
    return rows


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def run_expand(
    src: Path, out: Path, words: Sequence[str], to: Path | None, layers_at: str | None, json: bool, **options: Any
) -> None:
    """`growformer expand`."""
    src = located(src)
    at = places(layers_at)
    planning = {name: options[name] for name in ("method", "ignore_fields", "rope", "new_tokens")}
    if is_adapter(src):
        options, request = _of_adapter(src, words, to, options), {}
    else:
        request = _asked(src, words, to, layers_at=at, **planning)
    with show.progress(json) as tell:
        grown = api.expand_checkpoint(src, out, layers_at=at, progress=tell, **options, **request)
    if json:
        told: dict[str, Any] = {"function": grown.plan.function, "within_eps": list(grown.plan.within_eps)}
        told |= {"training": grown.training} if grown.training else {}
        show.as_json({"out": str(out), "fidelity": grown.plan.fidelity, **told, **grown.proof.to_json()})
    else:
        old, new = grown.plan.parameters
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        show.say(f"{out}: {show.number(old)} -> {show.number(new)} parameters, {size_text(size)}")
        for line in (*grown.plan.moved, *grown.plan.notes, *grown.plan.dead):
            show.say(f"note: {line}")
        for line in grown.plan.within_eps:
            show.say(f"WITHIN EPS, not exact: {line}")
        for line in grown.plan.changes:
            show.say(f"CHANGES THE FUNCTION: {line}")
        if grown.training:
            show.say(f"training state: {grown.training}")
        print_proof(grown.proof)
    _leave(grown.proof)


def print_proof(proof: Proof) -> None:
    """The proof for people: the table, then what failed or was left out."""
    show.table(("claim", "found", "allowed", "verdict"), proof.rows())
    for claim in proof.claims:
        if claim.passed is not True and claim.detail:
            show.say(f"{claim.name}: {claim.detail}")


def _leave(proof: Proof) -> None:
    if proof.exit_code:
        raise typer.Exit(proof.exit_code)


def run_verify(
    folders: Sequence[Path], level: str, memory: str | None, prompt: str | None, tokens: int, json: bool
) -> None:
    """`growformer verify`."""
    if len(folders) > 3:
        raise RequestError(
            f"verify takes the source's folder and the grown one, or the grown one, or two and what was fused of them; "
            f"got {len(folders)}"
        )
    if len(folders) == 3:
        _verify_fused(folders, level, memory, prompt, json)
        return
    from growformer.api.verified import source_of

    out = folders[-1]
    src = located(folders[0]) if len(folders) == 2 else source_of(out)
    with show.progress(json) as tell:
        proof = api.verify(src, out, level=level, memory=memory, progress=tell)
    said = _continuations(src, out, prompt, tokens) if prompt is not None else {}
    if json:
        show.as_json(proof.to_json() | ({"greedy": said} if said else {}))
    else:
        print_proof(proof)
        if said:
            show.say(f"greedy: {said['same']} of {said['tokens']} tokens the same (reported, not judged)")
            show.say(str(said["text"]))
    _leave(proof)


def _verify_fused(folders: Sequence[Path], level: str, memory: str | None, prompt: str | None, json: bool) -> None:
    """`growformer verify ONE OTHER OUT`."""
    from growformer.api.fused import verify_fused

    if memory is not None:
        raise RequestError(f"--memory {memory}: a fused model and the two in it are run whole; --prove auto may not")
    if prompt is not None:
        raise RequestError("--prompt compares two models, and three are given; verify ONE OUT takes it")
    with show.progress(json) as tell:
        proof = verify_fused(folders[2], folders[0], folders[1], level=level, progress=tell)
    if json:
        show.as_json(proof.to_json())
    else:
        print_proof(proof)
    _leave(proof)


def run_fuse(one: Path, other: Path, out: Path, json: bool, **options: Any) -> None:
    """`growformer fuse`."""
    with show.progress(json) as tell:
        fused = api.fuse_checkpoint(one, other, out, progress=tell, **options)
    if json:
        told = {"out": str(out), "function": "changed", "changes": list(fused.fusion.one.changes)}
        show.as_json(told | {"notes": list(fused.notes), **fused.proof.to_json()})
    else:
        first, second, whole = map(show.number, fused.fusion.parameters)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        show.say(f"{out}: {first} and {second} -> {whole} parameters, {size_text(size)}")
        for line in fused.notes:
            show.say(f"note: {line}")
        for line in fused.fusion.one.changes:
            show.say(f"CHANGES THE FUNCTION: {line}")
        print_proof(fused.proof)
    _leave(fused.proof)


def _continuations(src: Path, out: Path, prompt: str, tokens: int) -> Mapping[str, Any]:
    from transformers import AutoTokenizer

    from growformer.proof.functional import greedy

    try:
        tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:  # ValueError: among others, one that would run code of its own
        raise SourceError(f"{out}: transformers cannot load its tokenizer: {error}") from error
    asked = list(tokenizer(prompt)["input_ids"])
    a, b = greedy(src, asked, tokens), greedy(out, asked, tokens)
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return {"same": same, "tokens": len(a), "text": tokenizer.decode(asked + b, skip_special_tokens=True)}
