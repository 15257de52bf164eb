"""Cache, left padding, windows and positions: before and after growth, and each check sees its own path."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicSlidingWindowLayer

from growformer.errors import UncheckedError
from growformer.proof import decoding
from growformer.proof.bar import BAR
from growformer.proof.decoding import CHECKS, SLIDING, Decoding, Probe
from growformer.proof.float64 import build64, true_float64
from tests.proof.every_model import save

MISTRAL = "transformers.models.mistral.modeling_mistral"


def relative(src: Path, out: Path, length: int = 14) -> dict[str, float | None]:
    """By path, the relative difference; None where the class has no such path."""
    found = Decoding(src, length=length).to(out)
    return {name: told.difference.relative if told.difference else None for name, told in found.items()}


def grown(src: Path, out: Path, closed: float = 0.0) -> Path:
    """Five more MLP channels in every layer, their way out `closed`."""
    shutil.copytree(src, out)
    tensors = load_file(src / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, x in tensors.items():
        if "gate_proj.weight" in name or "up_proj.weight" in name:
            tensors[name] = torch.cat([x, torch.randn(5, x.shape[1], generator=generator)])
        elif "gate_proj.bias" in name or "up_proj.bias" in name:
            tensors[name] = torch.cat([x, torch.ones(5)])
        elif "down_proj.weight" in name:
            tensors[name] = torch.cat([x, torch.full((x.shape[0], 5), closed)], 1).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 5}))
    return out


@pytest.mark.parametrize(
    ("name", "lacks"), [("llama", {SLIDING}), ("mistral", set()), ("gemma3_text", set()), ("mpt", {"position_ids"})]
)
def test_a_growth_is_exact_on_every_path(name: str, lacks: set[str], tmp_path: Path) -> None:
    src = save(name, tmp_path / "src", **({"sliding_window": None} if SLIDING in lacks else {}))
    # MPT's MLP is named otherwise, so that nothing grows: what it lacks is the question.
    found = relative(src, grown(src, tmp_path / "good") if name != "mpt" else src)
    assert list(found) == list(CHECKS) and {path for path, value in found.items() if value is None} >= lacks
    assert all(value <= BAR for value in found.values() if value is not None)
    if name != "mpt":
        bad = relative(src, grown(src, tmp_path / "bad", closed=1e-5))
        assert all(value > BAR for value in bad.values() if value is not None)


def test_a_long_window_is_cut_in_both_models_and_the_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = save("mistral", tmp_path / "src", sliding_window=4096)
    out = grown(src, tmp_path / "out")
    found = Decoding(src, length=14).to(out)
    assert {path: told.note for path, told in found.items() if told.note} == {SLIDING: "sliding_window cut to 8"}
    monkeypatch.setattr(decoding, "WINDOW", 6)
    assert "cut to 6" in Decoding(src, length=14).to(out)[SLIDING].note


def test_both_models_are_given_the_same_positions(tmp_path: Path) -> None:
    """Also where the grown model has more of them."""
    src = save("gpt2", tmp_path / "src")
    out = Path(shutil.copytree(src, tmp_path / "out"))
    tensors = load_file(out / "model.safetensors")
    name = "transformer.wpe.weight"
    tensors[name] = torch.cat([tensors[name], torch.ones(5, tensors[name].shape[1])])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"n_positions": config["n_positions"] + 5}))
    assert all(value <= BAR for value in relative(src, out).values() if value is not None)


@pytest.mark.parametrize(
    ("name", "path", "spoil"),
    [
        # As long as a plain pass sees no further than before, it gives nothing away; nor does a table's unread end.
        ("mistral", SLIDING, {"sliding_window": 7}),
        ("gpt2", "position_ids", "transformer.wpe.weight"),
    ],
)
def test_what_a_plain_pass_does_not_see(name: str, path: str, spoil: Any, tmp_path: Path) -> None:
    """A folder that computes the same on every other path, and is told by one alone."""
    src = save(name, tmp_path / "src")
    out = Path(shutil.copytree(src, tmp_path / "out"))
    if isinstance(spoil, str):
        tensors = load_file(out / "model.safetensors")
        tensors[spoil][6:] += 1e-3
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | spoil))
    found = relative(src, out, length=6)
    assert {name for name, value in found.items() if value is not None and value > BAR} == {path}


def test_the_cached_path_gives_what_the_whole_sequence_gives(tmp_path: Path) -> None:
    """What the check runs is decoding: token by token it is the model's own function."""
    model = build64(save("mistral", tmp_path / "src"))
    tokens = torch.randint(3, 41, (2, 15), generator=torch.Generator().manual_seed(1))
    with true_float64(), torch.no_grad():
        whole = model(input_ids=tokens).logits
        cached = decoding.CHECKS["key-value cache"](model, Probe.of(tokens, model.config))
    assert cached is not None
    assert float((whole - cached["cached.logits"]).abs().max() / whole.abs().max()) <= BAR


def _no_rope(q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    return q, k


_update = DynamicSlidingWindowLayer.update


def _forgetful(layer: DynamicSlidingWindowLayer, keys: torch.Tensor, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
    """A layer's cache of which nothing but its length is left."""
    given = keys.shape[-2]
    return [torch.cat([x[..., :-given, :] * 0, x[..., -given:, :]], -2) for x in _update(layer, keys, *args, **kwargs)]


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_depends_on_what_it_is_about(check: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the cache, the window, the positions or the mask, the path gives something else."""
    model = build64(save("mistral", tmp_path / "src"))
    tokens = torch.randint(3, 41, (3, 20), generator=torch.Generator().manual_seed(1))

    def run() -> torch.Tensor:
        with true_float64(), torch.no_grad():
            found = decoding.CHECKS[check](model, Probe.of(tokens, model.config))
        assert found is not None
        return next(iter(found.values()))

    before = run()
    spoil: dict[str, Callable[[], object]] = {
        "key-value cache": lambda: monkeypatch.setattr(DynamicSlidingWindowLayer, "update", _forgetful),
        "sliding window": lambda: setattr(model.config, "sliding_window", 7),
        "position_ids": lambda: monkeypatch.setattr(f"{MISTRAL}.apply_rotary_pos_emb", _no_rope),
        "left padding": lambda: monkeypatch.setattr(
            f"{MISTRAL}.create_sliding_window_causal_mask", lambda **kwargs: None
        ),
    }
    spoil[check]()
    assert float((run() - before).abs().max()) > BAR


def test_an_encoder_and_a_path_that_only_one_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert = save("bert", tmp_path / "bert")
    with pytest.raises(UncheckedError, match="causal language models only"):
        Decoding(bert)
    windowed, whole = save("mistral", tmp_path / "a"), save("mistral", tmp_path / "b", sliding_window=None)
    for src, out in ((windowed, whole), (whole, windowed)):
        with pytest.raises(UncheckedError, match=f"sliding window: {windowed} has such a path, and {whole} has none"):
            Decoding(src, length=14).to(out)
