"""The demo: a small Llama that grows along every axis while it trains, each growth proved before training goes on."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from growformer.checkpoint.folder import target_errors
from growformer.errors import ChangedError, RequestError, TargetError
from growformer.planning import Plan, apply
from growformer.proof.alive import covering_tokens, dead_entries, parameter_masks
from growformer.proof.bar import BAR
from growformer.proof.claims import Claim, Proof
from growformer.proof.float64 import build64_from, stock_model
from growformer.proof.functional import functional
from growformer.proof.prove import new_entries
from growformer.training.loop import Recipe, Run, bits_per_byte
from growformer.training.text import Text, library_text, spread

if TYPE_CHECKING:
    import transformers

Grow = Callable[..., object]
"""Grows a model and its optimizer in place: `growformer.grow`."""

FORMAT = 1
"""Version of results.json."""

STEPS = 1200
"""About a minute on two cores."""

START = {
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

GROWTHS: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("MLP", "MLP expansion", {"intermediate_size": 192}),
    ("heads", "head addition", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    ("head dim", "heads expansion and attention expansion", {"head_dim": 24}),
    ("hidden", "hidden dimension expansion", {"hidden_size": 96}),
    ("layers", "layer addition", {"num_hidden_layers": 3}),
)
"""Name, the paper's transformations (six in all), new sizes."""

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- growformer
---

# A byte-level Llama, grown while it trained

Made by `growformer demo`: {steps} steps on the source text of Python's standard library, grown along every axis in
mid-run, from {before:,} to {after:,} parameters. Held-out loss: {bits:.3f} bits per byte.

A token is a byte: the vocabulary is the 256 byte values, and there is no tokenizer.

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokens = torch.tensor([list(b"def __init__(self")])
text = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=60)
print(bytes(text[0].tolist()).decode(errors="replace"))
```

Read `results.json` and `report.html` in the folder above for every growth and its proof.
"""


def run_demo(out: Path, steps: int | None, seed: int, say: Callable[[str], None], grow: Grow) -> dict[str, Any]:
    """Train, grow five times along the way, prove each growth, and write the model and the results.

    Writes `out`/results.json (every number said, and more) and `out`/model, a stock Hugging Face folder.

    Args:
        out: a folder that does not exist or is empty.
        steps: training steps in all, shared evenly among the six sizes; None: `STEPS`.
        seed: of the first weights, the batches and the new entries.
        say: told a line of text now and then.
        grow: grows a model and its optimizer in place.

    Returns:
        What results.json holds.

    Raises:
        RequestError: fewer steps than sizes.
        TargetError: `out` is taken, or cannot be written.
        ChangedError: a growth changed the function, or left entries that cannot learn; no results are written.
    """
    started = time.monotonic()
    steps = STEPS if steps is None else steps
    if steps < len(GROWTHS) + 1:
        raise RequestError(
            f"steps={steps}: the demo trains {len(GROWTHS) + 1} sizes; ask for {len(GROWTHS) + 1} or more"
        )
    _claim_folder(out)
    with _settings(seed):
        results = _run(out, steps, seed, say, grow)
    results["seconds"] = round(time.monotonic() - started, 1)
    with target_errors(out):
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _claim_folder(out: Path) -> None:
    """Before a minute of work rather than after it."""
    with target_errors(out):
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            raise TargetError(f"{out}: exists already and is left as it is; name a new or an empty folder with --out")
        out.mkdir(parents=True, exist_ok=True)


@contextmanager
def _settings(seed: int) -> Iterator[None]:
    """Seed and threads for the demo, put back afterwards; tiny matrices are slower on many threads."""
    from transformers.utils import logging

    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(min(2, threads))
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()


def _model(recipe: Recipe) -> transformers.PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    # A byte is a token, so none is left for the start or end of a text.
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(
        vocab_size=256, max_position_embeddings=recipe.length, tie_word_embeddings=True, **START, **special
    )
    return LlamaForCausalLM(config)


def _run(out: Path, steps: int, seed: int, say: Callable[[str], None], grow: Grow) -> dict[str, Any]:
    recipe = Recipe(warmup=max(1, round(Recipe.warmup * steps / STEPS)))
    text = library_text()
    say(
        f"Text: Python's standard library, {text.files[0]} files to train on ({len(text.train) / 1e6:.1f} MB), "
        f"{text.files[1]} held out ({len(text.held_out) / 1e6:.1f} MB)"
    )
    run = Run(_model(recipe), recipe)
    watch = _Watch(run, text, steps)
    generator = torch.Generator().manual_seed(seed)
    start = run.model.num_parameters()
    say(f"Llama with {start:,} parameters: {_sizes(START)}; {steps:,} steps")
    untrained = watch.look()
    ends = [round(steps * (i + 1) / (len(GROWTHS) + 1)) for i in range(len(GROWTHS) + 1)]
    events: list[dict[str, Any]] = []
    for end, (name, paper, request) in zip(ends, GROWTHS, strict=False):
        before = watch.train(end - run.step, generator)
        event = _grow(run, name, paper, request, watch.tokens, before, grow, seed)
        events.append(event)
        say(_line(event))
    final = watch.train(steps - run.step, generator)
    with target_errors(out):
        run.model.save_pretrained(out / "model")
        card = {"steps": f"{steps:,}", "before": start, "after": run.model.num_parameters(), "bits": final}
        (out / "model" / "README.md").write_text(CARD.format(**card, folder="model"), encoding="utf-8")
    loaded = _load(out / "model", watch.tokens, final)
    Proof((loaded,)).raise_if_changed()
    versions = {name: importlib.metadata.version(name) for name in ("growformer", "torch", "transformers")}
    return {
        "format": FORMAT,
        "versions": versions,
        "seed": seed,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "recipe": {
            "optimizer": "AdamW",
            "learning_rate": recipe.learning_rate,
            "betas": list(recipe.betas),
            "weight_decay": recipe.weight_decay,
            "warmup": recipe.warmup,
            "batch": recipe.batch,
            "length": recipe.length,
        },
        "text": {
            "source": "Python's standard library",
            "files": list(text.files),
            "bytes": [len(text.train), len(text.held_out)],
        },
        "bar": BAR,
        "start": {"parameters": start, "sizes": dict(START), "bits_per_byte": untrained},
        "events": events,
        "curve": {"train": watch.trained, "held_out": watch.held_out},
        "final": {
            "parameters": run.model.num_parameters(),
            "sizes": {name: getattr(run.model.config, name) for name in START},
            "bits_per_byte": final,
            "bytes": watch.tokens.numel(),
            "loads": loaded.found,
        },
    }


class _Watch:
    """Trains, and writes down the two losses (bits per byte) along the way: [[step, loss], ...]."""

    def __init__(self, run: Run, text: Text, steps: int) -> None:
        self.run = run
        self.text = text
        self.tokens = spread(text.held_out, 128, run.recipe.length)
        self.trained: list[list[float]] = []
        self.held_out: list[list[float]] = []
        self._every = max(1, steps // 120)
        self._recent: list[float] = []

    def look(self) -> float:
        loss = bits_per_byte(self.run.model, self.tokens)
        self.held_out.append([self.run.step, round(loss, 5)])
        return loss

    def train(self, steps: int, generator: torch.Generator) -> float:
        """Take some steps; returns the held-out loss at their end."""

        def then(step: int, nats: float) -> None:
            self._recent.append(nats / math.log(2))
            if step % self._every == 0:
                self.trained.append([step, round(sum(self._recent) / len(self._recent), 5)])
                self._recent = []
            if step % (4 * self._every) == 0 and step != end:
                self.look()

        end = self.run.step + steps
        self.run.train(self.text.train, steps, generator, then)
        return self.look()


def _grow(
    run: Run,
    name: str,
    paper: str,
    request: Mapping[str, int],
    tokens: torch.Tensor,
    before: float,
    grow: Grow,
    seed: int,
) -> dict[str, Any]:
    """One growth in mid-run, proved before training goes on."""
    source = copy.deepcopy(run.model)
    grow(run.model, run.optimizer, warmup=run.recipe.warmup, seed=seed, **request)
    model = run.model
    plan: Plan = model.growformer_plan
    proof = prove_growth(plan, source, model, tokens)
    try:
        proof.raise_if_changed()
    except ChangedError as error:
        raise ChangedError(f"growth {name} ({_sizes(request)}) at step {run.step}: {error}") from None
    after = bits_per_byte(model, tokens)
    return {
        "step": run.step,
        "name": name,
        "paper": paper,
        "request": dict(request),
        "moved": list(plan.moved),
        "parameters": [source.num_parameters(), model.num_parameters()],
        "bits_per_byte": [before, after],
        "proof": proof.to_json(),
    }


def prove_growth(
    plan: Plan, source: transformers.PreTrainedModel, grown: transformers.PreTrainedModel, tokens: torch.Tensor
) -> Proof:
    """Prove a growth in memory.

    *algebra*: the plan on the weights upcast to float64 gives the same logits, in true float64. *stored*: the grown
    model's weights are those, each rounded once to its dtype. *alive*: every new entry gets a gradient within two
    passes.

    Args:
        plan: the growth.
        source: the model as it was.
        grown: the model as it is.
        tokens: int64 [sequence, position], real text.
    """
    names = {t.source for t in plan.tensors if t.source is not None}
    wide = {name: x.detach().double() for name, x in source.state_dict().items() if name in names}
    made = apply(plan, wide, torch.float64)
    config = plan.source_config
    difference = functional(lambda: build64_from(config, wide), lambda: build64_from(plan.target_config, made), tokens)
    algebra = Claim("algebra", difference.relative <= BAR, f"{difference.relative:.1e}", f"{BAR:.0e} (float64)")

    live = grown.state_dict()
    wrong = [
        name for name, x in made.items() if name not in live or not torch.equal(x.to(live[name].dtype), live[name])
    ]
    stored = Claim(
        "stored",
        not wrong,
        f"{len(made) - len(wrong)} of {len(made)} tensors are the proved ones, each number rounded once",
        "all",
        detail="" if not wrong else f"other numbers than those that were proved: {', '.join(wrong[:4])}",
    )

    vocab, length = int(config["vocab_size"]), int(config["max_position_embeddings"])
    masks = parameter_masks(plan.target_config, new_entries(plan))
    dead = dead_entries(build64_from(plan.target_config, made), masks, covering_tokens(vocab, length, seed=0))
    total, count = sum(int(mask.sum()) for mask in masks.values()), sum(dead.values())
    named = ", ".join(f"{name} ({n})" for name, n in dead.items() if n)
    alive = Claim("alive", count == 0, f"{count:,} of {total:,} new entries dead", "0", detail=f"dead: {named}")
    measured = {
        "relative": difference.relative,
        "max_abs": difference.max_abs,
        "tokens": list(tokens.shape),
        "new_entries": total,
        "dead": count,
    }
    return Proof((algebra, stored, alive), measured)


def _load(folder: Path, tokens: torch.Tensor, final: float) -> Claim:
    """The folder, loaded by stock `from_pretrained`, has the loss that training ended with, to the last bit."""
    model, report = stock_model(folder)
    found = bits_per_byte(model, tokens)
    wrong = any(report.values())
    return Claim("loads", found == final and not wrong, f"{found:.6f} bits per byte when loaded", f"{final:.6f}")


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def _line(event: Mapping[str, Any]) -> str:
    measured, (old, new) = event["proof"]["measured"], event["parameters"]
    before, after = event["bits_per_byte"]
    return (
        f"Step {event['step']:,}: {event['name']}, {_sizes(event['request'])} ({old:,} -> {new:,} parameters)\n"
        f"    held out {before:.6f} -> {after:.6f} bits per byte; logits in float64 differ by "
        f"{measured['relative']:.1e}, at most {BAR:.0e}; {measured['dead']} of {measured['new_entries']:,} "
        "new entries dead"
    )
