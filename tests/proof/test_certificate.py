"""The structural certificate: what is grown right passes, in pieces of any size, from memory and from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from certified import EVERY, GPT2, LLAMA, QWEN3, ROPE, Growth, failing, grow, move_key

from growformer.algebra.factor import ONE, Factor
from growformer.checkpoint.safetensors_io import TensorFiles
from growformer.errors import ChangedError
from growformer.proof import rows as in_rows
from growformer.proof.axes import read_axes
from growformer.proof.bar import BAR
from growformer.proof.certificate import FileTensors, certify
from growformer.proof.facts import Facts
from growformer.proof.places import OPEN, Where, atom_places, dim_places
from growformer.proof.pullback import PulledBack, within_one_rounding

TIED = LLAMA | {"tie_word_embeddings": True}
GROWTHS: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("llama", {}, {"hidden_size": 36}),
    ("llama", {}, {"intermediate_size": 41}),
    ("llama", {}, {"num_attention_heads": 8}),
    ("llama", {}, {"num_attention_heads": 6, "num_key_value_heads": 3}),
    ("llama", {}, {"num_key_value_heads": 4}),
    ("llama", {}, {"head_dim": 10}),
    ("llama", {}, {"num_hidden_layers": 5}),
    ("llama", {}, EVERY["llama"]),
    ("llama", {"bias": False, "config": LLAMA | {"attention_bias": False, "mlp_bias": False}}, EVERY["llama"]),
    ("llama", {"config": TIED}, EVERY["llama"]),
    ("llama", {"layers_at": [0, 1]}, {"num_hidden_layers": 5}),
    ("llama", {"dtype": torch.bfloat16}, EVERY["llama"]),
    ("llama", {"dtype": torch.float64}, EVERY["llama"]),
    ("qwen3", {}, {"hidden_size": 35}),
    ("qwen3", {"config": QWEN3 | {"tie_word_embeddings": True}}, {"hidden_size": 35}),
    ("qwen3", {}, {"head_dim": 12}),
    ("qwen3", {}, {"head_dim": 18}),
    ("qwen3", {}, {"head_dim": 14}),
    ("qwen3", {}, {"head_dim": 8}),
    ("qwen3", {"layers_at": [0, 2]}, {"num_hidden_layers": 5}),
    ("qwen3", {}, EVERY["qwen3"]),
    ("gpt2", {}, {"n_embd": 36}),
    ("gpt2", {}, {"n_inner": 100}),
    ("gpt2", {}, {"n_layer": 5}),
    ("gpt2", {}, EVERY["gpt2"]),
    ("gpt2", {"config": GPT2 | {"tie_word_embeddings": False}}, EVERY["gpt2"]),
    ("gpt2", {"dtype": torch.bfloat16}, EVERY["gpt2"]),
]


@pytest.mark.parametrize(("name", "how", "request_"), GROWTHS)
def test_right_growths_pass(name: str, how: dict[str, Any], request_: dict[str, int]) -> None:
    growth = grow(name, **how, **request_)
    certificate = growth.certify()
    assert certificate.failures == []
    assert certificate.ok
    certificate.raise_if_failed()
    assert certificate.tensors == len(growth.target) == sum(certificate.counts.values())


def pulled_back(growth: Growth) -> dict[str, torch.Tensor]:
    """Every tensor of the pull-back."""
    back = PulledBack(*growth.arguments())
    return {name: back.read(name) for name in back.names}


def test_rows_of_a_pull_back_are_those_of_the_whole() -> None:
    growth = grow("llama", **EVERY["llama"])
    back = PulledBack(*growth.arguments())
    for name in back.names:
        whole = back.read(name)
        assert whole.shape == back.shape(name) and whole.dtype == back.dtype(name)
        cut = len(whole) // 3
        for rows in (slice(0, cut), slice(cut, len(whole)), slice(cut, cut)):
            assert torch.equal(back.read(name, rows), whole[rows]), name


@pytest.mark.parametrize(("name", "how", "request_"), GROWTHS)
def test_pull_back_is_the_source_within_one_rounding(name: str, how: dict[str, Any], request_: dict[str, int]) -> None:
    growth = grow(name, **how, **request_)
    seen = pulled_back(growth)
    assert seen.keys() == growth.source.keys()
    for key, weight in seen.items():
        assert within_one_rounding(growth.source[key], weight).all(), key


def test_an_exact_factor_pulls_back_to_the_very_bits() -> None:
    growth = grow("llama", hidden_size=96)
    for key, weight in pulled_back(growth).items():
        assert within_one_rounding(growth.source[key], weight, ONE).all(), key
    weight = growth.source["model.norm.weight"]
    off = torch.nextafter(weight, torch.tensor(9.0)).double()
    assert not within_one_rounding(weight, off).any()
    assert not within_one_rounding(weight, off, ONE).any()
    assert not within_one_rounding(weight, off, Factor.sqrt(3, 2)).any()


def test_counts_say_what_became_of_the_tensors() -> None:
    counts = grow("llama", head_dim=24, num_hidden_layers=4).certify().counts
    assert counts == {"identical": 51 - 6, "scaled": 6, "rounded": 0, "new": 16}
    certificate = grow("llama", intermediate_size=41).certify()
    assert certificate.counts["identical"] == 51
    assert certificate.zero_entries == 3 * 13 * 24
    assert certificate.free_entries == 3 * 13 * (2 * 24 + 2)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_small_pieces_see_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    growth = grow(name, **EVERY[name])
    whole = growth.certify()
    broken = grow(name, **EVERY[name])
    key = next(k for k, x in broken.target.items() if x.dim() == 2 and x.shape[0] > 37)
    broken.target[key][-1] += 1
    said = broken.certify().failures
    pull = pulled_back(growth)
    monkeypatch.setattr(in_rows, "PIECE", 50)
    assert growth.certify() == whole
    assert broken.certify().failures == said
    for other, weight in pulled_back(growth).items():
        assert torch.equal(weight, pull[other])


def test_files_are_read_like_memory(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    growth = grow("llama", **EVERY["llama"])
    for side, tensors in (("source", growth.source), ("target", growth.target)):
        (tmp_path / side).mkdir()
        save_file(tensors, tmp_path / side / "model.safetensors", metadata={"format": "pt"})
    with TensorFiles.open(tmp_path / "source") as source, TensorFiles.open(tmp_path / "target") as target:
        family, axes, layers, _, _, old, new = growth.arguments()
        assert certify(family, axes, layers, FileTensors(source), FileTensors(target), old, new) == growth.certify()


def test_a_stated_dtype_is_allowed_and_another_is_not() -> None:
    growth = grow("llama", head_dim=24)
    growth.target = {key: x.double() for key, x in growth.target.items()}
    failing(growth, "model.embed_tokens.weight", "dtype", "float64")
    growth.target_config["dtype"] = "float64"
    assert growth.certify().failures == []


def test_backbone_names_without_their_prefix() -> None:
    growth = grow("gpt2", **EVERY["gpt2"])
    for side in ("source", "target"):
        tensors = getattr(growth, side)
        setattr(growth, side, {key.removeprefix("transformer."): x for key, x in tensors.items()})
    assert growth.certify().failures == []
    growth.target["h.0.ln_1.bias"][-1] = 1.0
    failing(growth, "h.0.ln_1.bias[59]", "zero")


def test_old_buffers_are_left_behind() -> None:
    growth = grow("llama", head_dim=10)
    growth.source["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    assert growth.certify().failures == []
    growth.target["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    failing(growth, "rotary_emb.inv_freq", "nothing asks for it")


# Lifts that the paper's method does not use.


def copies(tied: bool) -> Growth:
    """Llama with the hidden axis doubled by copies: readers split into halves, norms as they were."""
    growth = grow("llama", TIED if tied else LLAMA, hidden_size=48)
    growth.axes["hidden"] |= {"lift": [[24, 0], [24, 0, "1", None]], "scale": "1"}
    growth.target_config["rms_norm_eps"] = LLAMA["rms_norm_eps"]
    for name, old in growth.source.items():
        _, pattern, _ = growth.family.find(name)
        new = old
        for d, dim in enumerate(pattern.dims):
            for atom in dim.atoms():
                if atom.axis == "hidden":
                    new = torch.cat([new, new], d) * (0.5 if atom.stand == "read" else 1)
        growth.target[name] = new * 0.5 if tied and name == "model.norm.weight" else new
    return growth


@pytest.mark.parametrize("tied", [False, True])
def test_copies_with_split_readers(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert copies(tied).certify().failures == []
    growth = copies(tied)
    name = "model.layers.0.mlp.up_proj.weight"
    noise = torch.randn(28, 24)
    growth.target[name] += torch.cat([noise, -noise], 1)
    assert growth.certify().failures == []
    monkeypatch.setattr(in_rows, "PIECE", 50)
    assert growth.certify().failures == []
    pulled = pulled_back(growth)[name]
    assert (pulled - growth.source[name]).abs().max() <= 1e-6 * noise.abs().max()
    growth.target[name][3, 5] += 1e-5
    failing(growth, name, "[3, 5]", "copies")
    growth = copies(tied)
    growth.times("model.norm.weight", 2.0 if tied else 0.5)
    failing(growth, "model.norm.weight[0]")


def test_copied_readers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's Conv1D has readers in its rows; here mlp channels are copied and split unevenly."""
    growth = grow("gpt2", n_inner=96 + 4)
    growth.axes["mlp"]["lift"] = [[96, 0], [4, 7, "1", None]]
    for layer in range(3):
        for kind in ("weight", "bias"):
            name = f"transformer.h.{layer}.mlp.c_fc.{kind}"
            growth.target[name][..., 96:] = growth.source[name][..., 7:11]
        name = f"transformer.h.{layer}.mlp.c_proj.weight"
        growth.target[name][7:11] *= 0.75
        growth.target[name][96:] = growth.source[name][7:11] * 0.25
    assert growth.certify().failures == []
    monkeypatch.setattr(in_rows, "PIECE", 50)
    assert growth.certify().failures == []
    growth.target["transformer.h.1.mlp.c_proj.weight"][98, 2] *= 1.001
    failing(growth, "transformer.h.1.mlp.c_proj.weight", "[9, 2]")


def test_rotary_pairs_may_be_strided_where_theta_stays() -> None:
    growth = grow("llama", head_dim=12)
    move_key(growth, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11])
    growth.axes["key"]["lift"] = [run for i in range(6) for run in ([1, i], [1, None])]
    growth.target_config |= ROPE | {"rope_theta": 10000.0}
    assert growth.certify().failures == []
    growth.target_config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e8}, "rope_theta": 1e8}
    failing(growth, "rope_theta", "rotary pair 1")
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    growth.source_config = growth.source_config | {"rope_parameters": yarn}
    growth.target_config |= {"rope_parameters": yarn, "rope_theta": 10000.0}
    failing(growth, "rope_parameters", "yarn")


def test_a_senseless_receipt_pulls_nothing_back() -> None:
    growth = grow("llama", intermediate_size=41)
    growth.axes["mlp"]["lift"] = [[41, 0]]
    with pytest.raises(ChangedError, match="axis mlp"):
        pulled_back(growth)


def test_defaults_come_from_the_full_config() -> None:
    """A config.json may leave out what its class fills in; the target is held to what the class filled in."""
    growth = grow("llama", head_dim=10)
    growth.source_full = dict(growth.source_config)
    for name in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "intermediate_size"):
        growth.source_config = {k: v for k, v in growth.source_config.items() if k != name}
    assert growth.certify().failures == []
    growth.target_config["rms_norm_eps"] = 1e-6
    failing(growth, "rms_norm_eps", "1e-06")
    growth.source_full = None
    failing(growth, "axis mlp", "intermediate_size is missing")


def free_entries(facts: Facts, growth: Growth, name: str) -> torch.Tensor:
    """Which entries of a tensor of an old layer the certificate calls free."""
    at, pattern, _ = growth.family.find(name)
    state = torch.zeros(growth.target[name].shape, dtype=torch.int64)
    for d, dim in enumerate(pattern.dims):
        part = dim_places(dim, lambda atom: atom_places(facts, atom, Where(at))).state
        state = torch.maximum(state, part.reshape([-1 if e == d else 1 for e in range(state.dim())]))
    return state == OPEN


def redraw_what_is_free(growth: Growth) -> int:
    """Draw every entry again that the certificate calls free; return how many."""
    family, count = growth.family, 0
    axes, problems = read_axes(family, growth.axes, {}, growth.layers)
    facts = Facts(family, axes, tied=bool(growth.source_config["tie_word_embeddings"]))
    assert problems == facts.problems == []
    for name, x in growth.target.items():
        at, pattern, index = family.find(name)
        free = torch.ones(x.shape, dtype=torch.bool)
        if family.layer not in index or growth.layers[family.layer][index[family.layer]] is not None:
            free = free_entries(facts, growth, name)
        elif family.closes_layer(at, pattern):
            continue
        x[free] = torch.randn(int(free.sum()), dtype=x.dtype)
        count += int(free.sum())
    return count


@pytest.mark.parametrize("name", sorted(EVERY))
def test_what_the_certificate_calls_free_cannot_be_seen(name: str) -> None:
    """Every free entry is drawn again; the logits stay, in true float64."""
    from growformer.proof.float64 import build64_from, true_float64

    torch.manual_seed(3)
    source = QWEN3 | {"layer_types": ["full_attention"] * 3} if name == "qwen3" else None
    growth = grow(name, source, dtype=torch.float64, **EVERY[name])
    assert 0 < redraw_what_is_free(growth) == growth.certify().free_entries
    tokens = torch.randint(37, (2, 16))
    old = build64_from(growth.source_config, growth.source)
    new = build64_from(growth.target_config, growth.target)
    with torch.no_grad(), true_float64():
        a, b = old(input_ids=tokens).logits, new(input_ids=tokens).logits
    assert (a - b).abs().max() <= BAR * a.abs().max()
