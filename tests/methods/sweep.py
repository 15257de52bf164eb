"""Measures every method on every kind of axis, for `growformer methods` and docs/methods.md: `make methods`.

On tiny random Llamas, GPT-2s and reference Transformers in float64: the function, aliveness, copies that never part,
and moments against true gradients. On the pretrained Llama, where it is at hand: what a token costs before, just after,
and 20 AdamW steps later. Methods that ask a loss get one on batches of the sweep's own, and how often is counted.
"""

import argparse
import hashlib
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import growformer as gf
from growformer.api.checks.samples import save_tiny
from growformer.api.folders import expand_checkpoint
from growformer.api.planned import on_disk
from growformer.checkpoint import TensorFiles
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.families.reference import REFERENCE
from growformer.methods import METHODS
from growformer.models import HeadSize, LayerSize, ReferenceConfig, ReferenceTransformer
from growformer.optim.dual import approximate, grow_moments
from growformer.planning import apply
from growformer.planning import expansions as e
from growformer.planning.reference_growth import expand_reference
from growformer.proof.bar import BAR
from growformer.proof.float64 import build64_from, stock_model, true_float64
from growformer.report.methods import dumps, markdown

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "growformer"
RESULTS = SOURCES / "methods" / "results.json"
PAGE = ROOT / "docs" / "methods.md"
DATA = ROOT.parent / "shared" / "data"
PARTS = ("algebra", "methods", "optim", "planning", "proof")
ASKING = ("training/gradmax.py", "training/ligo.py")
"""What runs the methods that ask a loss."""

REQUESTS: dict[str, dict[str, dict[str, int]]] = {
    "llama": {
        "mlp": {"intermediate_size": 44},
        "heads": {"num_attention_heads": 8, "num_key_value_heads": 4},
        "hidden": {"hidden_size": 48},
        "key, value": {"head_dim": 16},
        "layer": {"num_hidden_layers": 6},
    },
    "gpt2": {
        "mlp": {"n_inner": 111},
        "hidden, heads": {"n_head": 8, "n_embd": 48},
        "hidden, key, value": {"n_embd": 48},
        "layer": {"n_layer": 6},
    },
}
"""Requests by the kinds of axes that they grow."""

EXPANSIONS: dict[str, Any] = {
    "mlp": e.MLPExpansion(11),
    "heads": e.HeadAddition(2),
    "value": e.HeadsExpansion(8),
    "key": e.AttentionExpansion(9),
    "hidden": e.HiddenExpansion(12),
    "layer": e.LayerAddition(2),
}
STORIES: dict[str, dict[str, int]] = {
    "mlp": {"intermediate_size": 344},
    "heads": {"num_attention_heads": 16, "num_key_value_heads": 8},
    "hidden": {"hidden_size": 128},
    "layer": {"num_hidden_layers": 8},
}
STEPS, RATE, ROWS, LENGTH, FADE = 20, 1e-3, 16, 128, 10
PROBES = 100
"""Batches that a loss is asked on, one after another; nothing is trained on them and nothing is measured by them."""


def sources_hash(sources: Path = SOURCES) -> str:
    """A hash of every Python file that a figure may depend on, by name and contents."""
    found = hashlib.sha256()
    paths = [path for part in PARTS for path in sorted((sources / part).rglob("*.py"))]
    for path in [*paths, *(sources / name for name in ASKING)]:
        found.update(path.relative_to(sources).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def asks(method: str) -> bool:
    """Whether a method takes what is new from a loss."""
    return any(way.fill == "gradient" for way in METHODS[method].ways.values())


class Loss:
    """A closure: the loss of a model on one batch after another, and how much was asked of it.

    Args:
        model: whose; a method that learns the lift gives what is to be called instead.
        batches: int64 [sequence, token] each; after the last comes the first again.
    """

    def __init__(self, model: Any, batches: Sequence[torch.Tensor]) -> None:
        self.model, self.batches = model, batches
        self.passes = self.tokens = 0

    def __call__(self, forward: Callable[..., Any] | None = None) -> torch.Tensor:
        ids = self.batches[self.passes % len(self.batches)]
        self.passes += 1
        self.tokens += ids.numel()
        return (forward or self.model)(input_ids=ids, labels=ids, use_cache=False).loss

    @property
    def asked(self) -> dict[str, int]:
        """Passes forward and backward, and the tokens in them."""
        return {"passes": self.passes, "tokens": self.tokens}


def stock(method: str, name: str, axes: str, src: Path, root: Path) -> dict[str, Any]:
    """One growth of a tiny stock model: every claim, from files; and the moments."""
    request = REQUESTS[name][axes]
    out = root / f"{name} {method} {axes}".replace(", ", "-")
    row: dict[str, Any] = {"method": method, "model": name, "axes": axes, "request": request}
    try:
        if asks(method):
            small = stock_model(src)[0]
            loss = Loss(small, [tokens()])
            big = gf.expand(small, method=method, closure=loss, allow_change=True, **request)
            made, proof = big.growformer_plan, gf.verify(small, big)
            proof.raise_if_changed()
            row["asked"] = loss.asked
        else:
            grown = expand_checkpoint(src, out, method=method, prove_level="full", allow_change=True, **request)
            made, proof = grown.plan, grown.proof
    except RequestError as error:
        return {**row, "state": "refused", "why": str(error)}
    measured = proof.measured
    row["state"] = made.function
    if made.changes:
        return {**row, **measured["changed"]}
    alive = measured["alive"]
    row |= {"difference": measured["algebra"]["relative"], "new": alive["new_entries"], "dead": alive["dead"]}
    row |= {"copies": measured.get("distinct")}
    return row | (live_moments(method, src, request) if asks(method) else moments(made, src))


def live_moments(method: str, src: Path, request: Mapping[str, int]) -> dict[str, Any]:
    """The same as `moments`, of an AdamW that a live growth carries along.

    What such a method puts into new readers is no part of its plan, and the true gradients are those with it.
    """
    model = stock_model(src)[0]
    old = gradients(model.config.to_dict() | {"architectures": [type(model).__name__]}, on_disk(model))
    optimizer = torch.optim.AdamW(model.parameters())
    for name, x in model.named_parameters():
        optimizer.state[x] = {"step": torch.tensor(1.0), "exp_avg": old[name], "exp_avg_sq": old[name] ** 2}
    gf.grow(model, optimizer, method=method, closure=Loss(model, [tokens()]), **request)
    made = model.growformer_plan
    true = gradients(made.target_config, {name: x.detach() for name, x in on_disk(model).items()})
    aside, fresh = approximate(made), gf.new_parameters(model)
    worst = 0.0
    for name, x in model.named_parameters():
        held = ~fresh[name] if name in fresh else torch.ones_like(x, dtype=torch.bool)
        if name in aside or not bool(held.any()):
            continue
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            wanted = true[name][held] ** power
            worst = max(worst, float((optimizer.state[x][key][held] - wanted).abs().max() / wanted.abs().max()))
    return {"moments": worst, "approximate": len(aside)}


def moments(made: Any, src: Path) -> dict[str, Any]:
    """How far the dual of gradients, and of their squares, is from the grown model's own, where it is to be exact."""
    with TensorFiles.open(src) as files:
        source = {name: files.read(name) for name in files.names}
    old = gradients(made.source_config, source)
    new = gradients(made.target_config, apply(made, source))
    aside = approximate(made)
    worst = 0.0
    for power in (1, 2):
        carried = grow_moments(made, {name: x**power for name, x in old.items()}, power)
        past = grow_moments(made, {name: torch.ones_like(x) for name, x in old.items()}, 0)
        for name, value in carried.items():
            held = past[name] != 0
            if name in aside or not bool(held.any()):
                continue
            true = new[name] ** power
            worst = max(worst, float((value - true)[held].abs().max() / true[held].abs().max()))
    return {"moments": worst, "approximate": len(aside)}


def gradients(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = build64_from(config, tensors)
    names = {name: x for name, x in model.named_parameters() if name in tensors}
    ids = tokens()
    with true_float64():
        loss = model(input_ids=ids, labels=ids).loss
        found = torch.autograd.grad(loss, list(names.values()))
    return dict(zip(names, found, strict=True))


def tokens() -> torch.Tensor:
    """Token ids [2, 16] for the tiny models."""
    return torch.arange(2 * 16).remainder(37).reshape(2, 16)


def reference(method: str, axes: str) -> dict[str, Any]:
    """One growth of the reference Transformer, whose layers and heads all differ."""
    heads = (HeadSize(6, 5), HeadSize(4, 7))
    config = ReferenceConfig(
        vocab=13, positions=9, hidden=6, layers=(LayerSize(8, heads), LayerSize(5, heads[:1])), eps=Fraction(1, 1000)
    )
    row: dict[str, Any] = {"method": method, "model": "reference", "axes": axes}
    torch.manual_seed(0)
    model = ReferenceTransformer(config, torch.float64)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    try:
        grown = expand_reference(REFERENCE, METHODS[method], model, EXPANSIONS[axes])
    except RequestError as error:
        return {**row, "state": "refused", "why": str(error)}
    ids = torch.randint(0, 13, (3, 9))
    with torch.no_grad():
        a, b = model(ids), grown(ids)
    found = float((a - b).abs().max() / a.abs().max())
    return (
        {**row, "state": "exact", "difference": found}
        if found <= BAR
        else {**row, "state": "changed", "relative": found}
    )


def stories(method: str, axes: str, batches: Sequence[torch.Tensor], probes: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The pretrained Llama: what a token costs before, just after the growth, and 20 AdamW steps later."""
    request = dict(STORIES[axes]) if axes else {}
    if method in ("stack", "bert2bert", "bert2bert-aki") and axes == "layer":
        request = {"num_hidden_layers": 10}
    if axes and any(way.behind for way in METHODS[method].ways.values()):
        request |= {"fade": FADE}
    row: dict[str, Any] = {"method": method, "model": "stories260K", "axes": axes, "request": request}
    model = pretrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    before = cost(model, batches[0])
    loss = Loss(model, probes)
    asked = {"closure": loss} if asks(method) else {}
    lifted = bool(axes) and any(
        way.lift == "copies" and way.fill == "gradient" for way in METHODS[method].ways.values()
    )
    try:
        if lifted:  # another model, and another optimizer
            model = gf.expand(model, method=method, allow_change=True, **asked, **request)
            optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
        elif axes:
            gf.grow(model, optimizer, method=method, allow_change=True, **asked, **request)
    except RequestError as error:
        return {**row, "state": "refused", "why": str(error)}
    if asked:
        row["asked"] = loss.asked
    after = cost(model, batches[0])
    for ids in batches[1:]:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**row, "state": "trained", "before": before, "after": after, "later": cost(model, batches[0])}


def pretrained() -> Any:
    from transformers import AutoModelForCausalLM

    folder = DATA / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)


@torch.no_grad()
def cost(model: Any, ids: torch.Tensor) -> float:
    """Nats a token, on text that no step sees."""
    return float(model(input_ids=ids, labels=ids).loss)


def text() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Batches of tokens [16, 128] from a novel: one to measure by and those to train on; and those to ask a loss on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260K", trust_remote_code=False)
    with (DATA / "novels" / "train.txt").open(encoding="utf-8") as file:
        book = file.read(1_000_000)
    count = STEPS + 1 + PROBES
    ids = tokenizer(book, add_special_tokens=False, verbose=False)["input_ids"][: count * ROWS * LENGTH]
    batches = list(torch.tensor(ids).reshape(count, ROWS, LENGTH))
    return batches[: STEPS + 1], batches[STEPS + 1 :]


def rows(names: list[str]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for model, requests in REQUESTS.items():
            src = save_tiny(FAMILIES[model], FAMILIES[model].architectures[0], root / model)
            for method in names:
                yield from (stock(method, model, axes, src, root) for axes in requests)
    for method in names:
        yield from (reference(method, axes) for axes in EXPANSIONS)
    if DATA.is_dir():
        batches, probes = text()
        yield stories("paper", "", batches, probes)
        for method in names:
            yield from (stories(method, axes, batches, probes) for axes in STORIES)


def main() -> int:
    """Measure every method, or those named, and write what was found."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("names", nargs="*", help="only these; the results are left as they are then")
    words.add_argument("--page", type=Path, help="where to write the page of those named")
    asked = words.parse_args()
    start, key = time.monotonic(), sources_hash()
    found = []
    for row in rows(asked.names or list(METHODS)):
        found.append(row)
        print(json.dumps(row)[:200], flush=True)
    print(f"{len(found)} growths; {time.monotonic() - start:.0f} s")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    results = {"sources": key, "versions": versions, "rows": found}
    if asked.names:
        if asked.page is not None:
            asked.page.write_text(markdown(json.loads(dumps(results))), encoding="utf-8")
        return 0
    if not DATA.is_dir():
        print(f"{DATA} is not there, so nothing was trained and nothing is written", file=sys.stderr)
        return 1
    if sources_hash() != key:
        print("the sources changed meanwhile, so the results are stale as soon as written", file=sys.stderr)
    RESULTS.write_text(dumps(results), encoding="utf-8")
    PAGE.write_text(markdown(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
