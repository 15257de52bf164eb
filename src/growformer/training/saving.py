"""Checkpoints of a run: everything that the next step depends on, whole or not there at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from growformer.checkpoint.folder import new_folder, read_json
from growformer.errors import SourceError
from growformer.optim import rates_of
from growformer.training.factorised import as_dense, factors_of, put_factors

if TYPE_CHECKING:
    import transformers

FORMAT = 1
"""Version of a checkpoint."""

_NAME = re.compile(r"step-(\d{9,})")


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step, tokens, flops: used so far.
        position: sequences of the text that are used up.
        stage: growths done.
        memory: what the next growth's rule remembers.
        multiplier: of the learning rate, from the growths so far.
        thaw_at: step at which old entries learn again; None: nothing is held.
        log_bytes: length of the log.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    position: int = 0
    stage: int = 0
    memory: Mapping[str, Any] = field(default_factory=dict)
    multiplier: float = 1.0
    thaw_at: int | None = None
    log_bytes: int = 0


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save(
    folder: Path,
    keep: int,
    progress: Progress,
    model: transformers.PreTrainedModel,
    tokenizer: Any | None,
    optimizers: Sequence[torch.optim.Optimizer],
    generators: Sequence[Mapping[str, torch.Tensor]],
    about: Mapping[str, Any],
) -> Path:
    """Write a checkpoint, unless that of this step is there, then remove all but the last `keep`.

    It is written under a hidden name, forced to disk and renamed, so a checkpoint that is there is whole.

    Args:
        folder: of all checkpoints.
        keep: how many stay.
        progress: where the run stands.
        model: a stock model, or one of products, which its folder holds multiplied out; `from_pretrained` loads it.
        tokenizer: goes into the model's folder.
        optimizers: with their block rates.
        generators: the random states of each process, by rank.
        about: what must be the same when the run resumes.

    Raises:
        TargetError: it cannot be written.
    """
    out = folder / f"step-{progress.step:09d}"
    if out.exists():
        return out
    with new_folder(out, 0, resume=True) as partial:
        with as_dense(model):
            write_model(partial / "model", model, tokenizer)
        training = {
            "factors": factors_of(model),
            "optimizers": [_optimizer_state(model, optimizer) for optimizer in optimizers],
            "generators": list(generators),
        }
        torch.save(training, partial / "training.pt")
        state = {"format": FORMAT, "progress": asdict(progress), "about": dict(about)}
        (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        # Renamed first: half a checkpoint must not look like one.
        gone = old.with_name(f".{old.name}.gone")
        os.rename(old, gone)
        shutil.rmtree(gone)
    return out


def write_model(folder: Path, model: transformers.PreTrainedModel, tokenizer: Any | None) -> None:
    """A stock folder: weights, config, generation config, tokenizer."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def read_state(checkpoint: Path) -> tuple[Progress, dict[str, Any]]:
    """Where the run stood, and what must be the same.

    Raises:
        SourceError: the file is damaged, or of another version.
    """
    state = read_json(checkpoint / "state.json")
    if state.get("format") != FORMAT:
        raise SourceError(f"{checkpoint}: has format {state.get('format')!r}; this version reads format {FORMAT}")
    return Progress(**state["progress"]), state["about"]


def read_model(checkpoint: Path) -> transformers.PreTrainedModel:
    """The model, bit for bit."""
    from transformers import AutoModelForCausalLM

    model: transformers.PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint / "model", dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    if (checkpoint / "training.pt").is_file():  # a finished run's folder has none, and holds whole matrices
        put_factors(model, _training(checkpoint).get("factors", {}))
    return model


def _training(checkpoint: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
    return saved


def read_training(
    checkpoint: Path, model: transformers.PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]
) -> list[dict[str, torch.Tensor]]:
    """Give optimizers, made anew for the model, the states and rates that were saved.

    Returns:
        The random states of each process.

    Raises:
        SourceError: the saved states are not those of these optimizers.
    """
    saved = _training(checkpoint)
    if len(saved["optimizers"]) != len(optimizers):
        raise SourceError(f"{checkpoint}: holds {len(saved['optimizers'])} optimizers, {len(optimizers)} are asked for")
    named = dict(model.named_parameters())
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        # States go by place, and growth may have put new parameters elsewhere than a fresh optimizer would.
        for group, names in zip(optimizer.param_groups, state["groups"], strict=True):
            if set(map(id, group["params"])) != {id(named[name]) for name in names}:
                raise SourceError(f"{checkpoint}: its optimizer holds other parameters than the model's")
            group["params"] = [named[name] for name in names]
        optimizer.load_state_dict(state["state"])
        rates_of(optimizer, model).load_state_dict(state["rates"])
    return list(saved["generators"])


def _optimizer_state(model: transformers.PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    names = {id(x): name for name, x in model.named_parameters()}
    return {
        "groups": [[names[id(x)] for x in group["params"]] for group in optimizer.param_groups],
        "state": optimizer.state_dict(),
        "rates": rates_of(optimizer, model).state_dict(),
    }


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """This process's random states."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def first_generators(seed: int, rank: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The random states that a process of a new run begins with: another one for each, from the recipe's seed."""
    states = {"cpu": torch.Generator().manual_seed(seed + 1_000_003 * rank).get_state()}
    if device.type == "cuda":
        states["cuda"] = torch.Generator(device).manual_seed(seed + 1_000_003 * rank).get_state()
    return states


def set_generator_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """The inverse of `generator_states`."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def random_states(states: dict[str, torch.Tensor], device: torch.device) -> Iterator[None]:
    """The run's own random states; the caller's are put back."""
    before = generator_states(device)
    set_generator_states(states, device)
    try:
        yield
    finally:
        set_generator_states(before, device)
