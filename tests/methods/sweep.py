"""Measures every method on every kind of axis, for `growformer methods` and docs/methods.md: `make methods`.

On tiny random Llamas, GPT-2s and reference Transformers in float64: the function, aliveness, copies that never part,
and moments against true gradients. On the pretrained Llama, where it is at hand: what a token costs before, just after,
and 20 AdamW steps later.
"""

import argparse
import hashlib
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from growformer.api.checks.samples import save_tiny
from growformer.api.folders import expand_checkpoint
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
from growformer.proof.float64 import build64_from, true_float64
from growformer.report.methods import dumps, markdown

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "src" / "growformer"
RESULTS = SOURCES / "methods" / "results.json"
PAGE = ROOT / "docs" / "methods.md"
DATA = ROOT.parent / "shared" / "data"
PARTS = ("algebra", "methods", "optim", "planning", "proof")

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
STEPS, RATE, ROWS, LENGTH = 20, 1e-3, 16, 128


def sources_hash(sources: Path = SOURCES) -> str:
    """A hash of every Python file that a figure may depend on, by name and contents."""
    found = hashlib.sha256()
    for part in PARTS:
        for path in sorted((sources / part).rglob("*.py")):
            found.update(path.relative_to(sources).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def stock(method: str, name: str, axes: str, src: Path, root: Path) -> dict[str, Any]:
    """One growth of a tiny stock model: every claim, from files; and the moments."""
    request = REQUESTS[name][axes]
    out = root / f"{name} {method} {axes}".replace(", ", "-")
    row: dict[str, Any] = {"method": method, "model": name, "axes": axes, "request": request}
    try:
        grown = expand_checkpoint(src, out, method=method, prove_level="full", allow_change=True, **request)
    except RequestError as error:
        return {**row, "state": "refused", "why": str(error)}
    measured = grown.proof.measured
    row["state"] = grown.plan.function
    if grown.plan.changes:
        return {**row, **measured["changed"]}
    alive = measured["alive"]
    row |= {"difference": measured["algebra"]["relative"], "new": alive["new_entries"], "dead": alive["dead"]}
    row |= {"copies": measured.get("distinct")}
    return row | moments(grown.plan, src)


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
    ids = torch.arange(2 * 16).remainder(37).reshape(2, 16)
    with true_float64():
        loss = model(input_ids=ids, labels=ids).loss
        found = torch.autograd.grad(loss, list(names.values()))
    return dict(zip(names, found, strict=True))


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
    if asks(method):
        return {**row, "state": "refused", "why": f"{method} asks a loss, which the reference Transformer is not given"}
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


def asks(method: str) -> bool:
    """Whether a method takes what is new from a loss."""
    return any(way.fill == "gradient" for way in METHODS[method].ways.values())


def stories(method: str, axes: str, batches: list[torch.Tensor]) -> dict[str, Any]:
    """The pretrained Llama: what a token costs before, just after the growth, and 20 AdamW steps later."""
    import growformer as gf

    request = dict(STORIES[axes]) if axes else {}
    if method in ("stack", "bert2bert", "bert2bert-aki") and axes == "layer":
        request = {"num_hidden_layers": 10}
    row: dict[str, Any] = {"method": method, "model": "stories260K", "axes": axes, "request": request}
    model = pretrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    before = cost(model, batches[0])
    if axes:
        try:
            gf.grow(model, optimizer, method=method, allow_change=True, **request)
        except RequestError as error:
            return {**row, "state": "refused", "why": str(error)}
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


def text() -> list[torch.Tensor]:
    """Batches of tokens [16, 128] from a novel: the first to measure by, the others to train on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260K", trust_remote_code=False)
    with (DATA / "novels" / "train.txt").open(encoding="utf-8") as file:
        book = file.read(400_000)
    ids = tokenizer(book, add_special_tokens=False, verbose=False)["input_ids"][: (STEPS + 1) * ROWS * LENGTH]
    return list(torch.tensor(ids).reshape(STEPS + 1, ROWS, LENGTH))


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
        batches = text()
        yield stories("paper", "", batches)
        for method in names:
            yield from (stories(method, axes, batches) for axes in STORIES)


def main() -> int:
    """Measure every method, or those named, and write what was found."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("names", nargs="*", help="only these; nothing is written then")
    names = words.parse_args().names
    start, key = time.monotonic(), sources_hash()
    found = []
    for row in rows(names or list(METHODS)):
        found.append(row)
        print(json.dumps(row)[:200], flush=True)
    print(f"{len(found)} growths; {time.monotonic() - start:.0f} s")
    if not names:
        if not DATA.is_dir():
            print(f"{DATA} is not there, so nothing was trained and nothing is written", file=sys.stderr)
            return 1
        if sources_hash() != key:
            print("the sources changed meanwhile, so the results are stale as soon as written", file=sys.stderr)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        results = {"sources": key, "versions": versions, "rows": found}
        RESULTS.write_text(dumps(results), encoding="utf-8")
        PAGE.write_text(markdown(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
