"""An adapter follows its base: small base and adapter, grown base and grown adapter compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import growformer as gf
from growformer.api.adapters import GrownBase, sides_of
from growformer.api.planned import family_of
from growformer.checkpoint.adapters import read_adapter
from growformer.cli.main import app
from growformer.errors import ChangedError, GrowformerError
from growformer.planning.follow import follow_plan
from growformer.planning.plan import Plan
from growformer.proof.adapters import Adapter, Bases, functional, merged, prove_follow
from growformer.proof.bar import BAR
from growformer.training.adapters import _config
from tests.lora.kit import IDS, LINEAR, adapted, loaded, logits, loss, relative
from tests.tiny import build

EPS = torch.finfo(torch.float32).eps
AXES: dict[str, dict[str, Any]] = {
    "hidden": {"hidden_size": 40},
    "mlp": {"intermediate_size": 36},
    "heads": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "kv heads": {"num_key_value_heads": 4},
    "key and value": {"head_dim": 14},
    "layers": {"num_hidden_layers": 5},
    "vocab": {"vocab_size": 45},
    "all": {
        "hidden_size": 42, "intermediate_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 14,
        "num_hidden_layers": 5, "vocab_size": 45,
    },
}  # fmt: skip


def base(kind: str, folder: Path, **changes: Any) -> Any:
    model = build(kind, **changes)
    model.save_pretrained(folder / "base")
    return model


def stock(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def followed(folder: Path, model: Any, request: dict[str, Any], **options: Any) -> Any:
    """Save an adapter, grow its base, let it follow."""
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    gf.expand_checkpoint(folder / "base", folder / "grown", prove_level="structure", **request)
    return gf.expand_checkpoint(folder / "adapter", folder / "out", follow=folder / "grown", **options)


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any, Adapter]:
    """A base, the base with its trained adapter, and the adapter as it would be saved."""
    from peft import get_peft_model_state_dict

    plain = build("llama")
    model, _ = adapted(build("llama"), LINEAR)
    tensors = {name: x.detach().clone() for name, x in get_peft_model_state_dict(model).items()}
    return plain, model, Adapter(_config(model.peft_config["default"]), tensors)


@pytest.mark.parametrize("axis", AXES)
def test_every_axis(axis: str, small: tuple[Any, Any, Adapter]) -> None:
    plain, _, adapter = small
    made = gf.plan(plain, **AXES[axis])
    sides = sides_of(family_of(made.source_config))
    plan = follow_plan(adapter.config, {name: tuple(x.shape) for name, x in adapter.tensors.items()}, made, sides)
    bases = Bases(made, plain.state_dict(), sides, IDS)
    assert functional(plan, adapter, bases) <= BAR
    # Another adapter is no small change beside that.
    other = Adapter(adapter.config, {name: 0.9 * x for name, x in adapter.tensors.items()})
    changed = merged(other, plain.state_dict(), sides)
    kept = merged(adapter, plain.state_dict(), sides)
    assert max(relative(kept[name], changed[name]) for name in kept) > 1e-3


@pytest.mark.parametrize(
    ("kind", "targets", "request_"),
    [
        ("gpt2", ("c_attn", "c_proj", "c_fc"), {"n_embd": 48, "n_head": 8, "n_layer": 4, "n_inner": 120}),
        ("qwen3", LINEAR, {"hidden_size": 42, "head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 3}),
        ("llama", ("embed_tokens", "lm_head", "o_proj"), AXES["all"]),
        ("llama", LINEAR, {"method": "hyperclone", "hidden_size": 48, "intermediate_size": 56}),
        ("llama", r".*\.layers\.[02]\..*\.(q_proj|up_proj)", {"num_hidden_layers": 5, "layers_at": [0, 2]}),
    ],
    ids=["fused and turned", "normed keys", "embedding and head", "copies", "modules by number"],
)
def test_kinds_of_bases(kind: str, targets: Any, request_: dict[str, Any], tmp_path: Path) -> None:
    extra = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    model, _ = adapted(base(kind, tmp_path), targets, **extra)
    grown = followed(tmp_path, model, request_)
    assert grown.proof.measured["algebra"] <= BAR
    again = loaded(stock(tmp_path / "grown"), tmp_path / "out")
    assert relative(logits(model), logits(again)[..., :37]) < 64 * EPS


def test_patterns_follow_their_layers(tmp_path: Path) -> None:
    asked = {"layers_to_transform": [0, 2], "rank_pattern": {"layers.2.mlp.down_proj": 3}}
    model, _ = adapted(base("llama", tmp_path), **asked)
    followed(tmp_path, model, {"num_hidden_layers": 5, "layers_at": [1, 3], "hidden_size": 40})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {name.split(".")[2] for name in config["target_modules"]} == {"0", "4"}
    assert config["rank_pattern"] == {"model.layers.4.mlp.down_proj": 3}
    again = loaded(stock(tmp_path / "grown"), tmp_path / "out")
    assert relative(logits(model), logits(again)) < 64 * EPS


def test_every_entry_is_alive(tmp_path: Path) -> None:
    """Within two passes; within three in a new layer, which is closed behind what an adapter begins with as zero."""
    model, _ = adapted(base("llama", tmp_path), LINEAR)
    followed(tmp_path, model, {k: v for k, v in AXES["all"].items() if k != "vocab_size"}, prove_level="structure")
    new = {f"layers.{i}." for i, old in enumerate(GrownBase(tmp_path / "grown").plan.layers["layer"]) if old is None}
    again = loaded(stock(tmp_path / "grown"), tmp_path / "out")
    for name, p in again.named_parameters():
        p.requires_grad_("lora_" in name)
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-3)
    seen: dict[str, torch.Tensor] = {}
    dead: list[dict[str, int]] = []
    for _ in range(3):
        loss(again).backward()
        for name, p in again.named_parameters():
            if p.grad is not None:
                seen[name] = seen.get(name, torch.zeros_like(p)) + p.grad.abs()
        optimizer.step()
        optimizer.zero_grad()
        dead.append({name: int((total == 0).sum()) for name, total in seen.items() if bool((total == 0).any())})
    # The first layer reads the new channels of a frozen embedding, which stay zero: there is nothing to learn of them.
    first = {n: 4 * 18 for n in seen if "layers.0.self_attn" in n and "lora_A" in n and "o_proj" not in n}
    assert len(first) == 3 and dead[2] == first
    assert all(name in first or any(layer in name for layer in new) for name in dead[1])


def test_controls(tmp_path: Path) -> None:
    """A lift forgotten, a factor left out, a new entry filled: the proof says so."""
    model, _ = adapted(base("llama", tmp_path), LINEAR)
    followed(tmp_path, model, {"hidden_size": 40, "head_dim": 14})
    grown = GrownBase(tmp_path / "grown")
    old, new = (Adapter(*read_adapter(tmp_path / name)) for name in ("adapter", "out"))
    plan = grown.follow(old, 0)
    bases, _ = grown.bases("full")
    assert bases is not None and functional(plan, old, bases) <= BAR

    def without_factors(tensors: Any) -> Any:
        from dataclasses import replace

        from growformer.algebra import ONE, Lift

        def bare(lift: Lift) -> Lift:
            return Lift(lift.old, tuple(replace(run, factor=ONE) for run in lift.runs))

        return tuple(replace(t, dims=tuple(map(bare, t.dims))) if "k_proj" in t.name else t for t in tensors)

    from dataclasses import replace

    wrong: Plan = replace(plan, tensors=without_factors(plan.tensors))
    assert functional(wrong, old, bases) > 1e-4
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    moved = new.tensors[name].roll(1, 0)  # appended where rotary pairs must be spread
    with pytest.raises(ChangedError, match="structure"):
        prove_follow(plan, old, Adapter(new.config, {**new.tensors, name: moved}), None).raise_if_changed()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    filled = new.tensors[name].clone()
    filled[0, -1] = 1e-6
    with pytest.raises(ChangedError, match="an entry for a new channel is not zero"):
        prove_follow(plan, old, Adapter(new.config, {**new.tensors, name: filled}), None).raise_if_changed()


def test_without_the_small_base_the_structure_is_proved(tmp_path: Path) -> None:
    model, _ = adapted(base("llama", tmp_path))
    model.save_pretrained(tmp_path / "adapter")
    gf.expand_checkpoint(tmp_path / "base", tmp_path / "grown", prove_level="structure", hidden_size=40)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    grown = gf.expand_checkpoint(tmp_path / "adapter", tmp_path / "out", follow=tmp_path / "grown")
    claims = {claim.name: (claim.passed, claim.detail) for claim in grown.proof.claims}
    assert claims["structure"][0] is True
    assert claims["algebra"][0] is None and "the small base is needed" in claims["algebra"][1]
    with pytest.raises(GrowformerError, match="--prove full: the small base is needed"):
        gf.expand_checkpoint(tmp_path / "adapter", tmp_path / "other", follow=tmp_path / "grown", prove_level="full")


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("llama", {"use_dora": True}, "use_dora=True: the adapter cannot follow"),
        ("llama", {"modules_to_save": ["lm_head"]}, "it holds whole modules"),
        ("llama-tied-bias", {"bias": "lora_only"}, "bias='lora_only'"),
        ("llama-tied-bias", {"targets": ["embed_tokens"]}, "the head shares it"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_refused_by_name(kind: str, config: dict[str, Any], said: str, tmp_path: Path) -> None:
    model, _ = adapted(base(kind, tmp_path), steps=0, **config)
    with pytest.raises(GrowformerError, match=said):
        followed(tmp_path, model, {"hidden_size": 40})


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base("llama", tmp_path)
    model, _ = adapted(build("llama", intermediate_size=20), steps=0)
    with pytest.raises(GrowformerError, match="it was not trained on this base"):
        followed(tmp_path, model, {"hidden_size": 40})


def test_a_real_model_at_the_command_line(stories: Path, tmp_path: Path) -> None:
    small = stock(stories)
    model, _ = adapted(small, LINEAR)
    model.save_pretrained(tmp_path / "adapter")
    sizes = ["hidden_size=96", "intermediate_size=256", "num_attention_heads=12", "num_key_value_heads=6"]
    sizes += ["head_dim=16", "num_hidden_layers=8"]
    run, grown, out = CliRunner().invoke, str(tmp_path / "grown"), str(tmp_path / "out")
    assert run(app, ["expand", str(stories), grown, *sizes, "--prove", "structure"]).exit_code == 0
    done = run(app, ["expand", str(tmp_path / "adapter"), out, "--follow", grown, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {claim["name"]: claim["passed"] for claim in told["claims"]} == {"structure": True, "algebra": True}
    assert told["measured"]["algebra"] <= BAR
    again = loaded(stock(tmp_path / "grown"), tmp_path / "out")
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 2 * 7 * 8
    assert relative(logits(model), logits(again)) < 64 * EPS
