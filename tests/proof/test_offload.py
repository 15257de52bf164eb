"""Models run from disk in true float64: the same numbers as in memory, in bounded memory, and every change is seen."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from growformer import api
from growformer.checkpoint import Receipt, TensorFiles, read_config
from growformer.checkpoint.stock import full_config
from growformer.errors import SourceError, UncheckedError
from growformer.planning import Plan, apply
from growformer.proof.bar import BAR
from growformer.proof.case import stored_dtypes
from growformer.proof.certificate import DictTensors, FileTensors
from growformer.proof.claim_float64 import Outputs, algebra, stored
from growformer.proof.functional import compare_outputs, load_report, outputs64, worst
from growformer.proof.offload import Planned, key_report, outputs64_from, outputs64_offloaded
from growformer.proof.outputs import Outputs as Outputs64
from growformer.proof.probe import probe_tokens
from growformer.proof.prove import Case, prove
from tests.tiny import CONFIGS, build, save

TOKENS = torch.tensor([[5, 17, 2, 30, 33, 8, 21], [1, 36, 36, 0, 12, 30, 7]])
GROWN = {"hidden_size": 36, "intermediate_size": 41, "num_attention_heads": 12, "num_key_value_heads": 6}
REQUESTS: dict[str, dict[str, int]] = {
    "llama": {**GROWN, "head_dim": 14, "num_hidden_layers": 5},
    "llama-tied-bias": {**GROWN, "head_dim": 14, "num_hidden_layers": 5},
    "qwen3": {"hidden_size": 36, "intermediate_size": 41, "num_hidden_layers": 5},
    "gpt2": {"n_inner": 117, "n_layer": 5},
    "gpt2-wide": {"n_embd": 36, "n_layer": 5},
}
TINY = 3000
"""Bytes: a few rows of a linear layer at a time."""


def near(a: Outputs64, b: Outputs64) -> bool:
    """Equal but for the order of float64 sums: a matrix product in blocks of rows may sum in another order."""
    assert {x.dtype for x in (*a.values(), *b.values())} == {torch.float64}
    return worst(compare_outputs(a, b)).relative <= BAR


def change(folder: Path, tensors: dict[str, Tensor]) -> Path:
    path = folder / "model.safetensors"
    save_file(load_file(path) | tensors, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {kind: save(root / kind, kind) for kind in CONFIGS}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("memory", [1, TINY, 1 << 30])
def test_the_same_output_as_in_memory(sources: dict[str, Path], kind: str, memory: int) -> None:
    assert near(outputs64(sources[kind], TOKENS), outputs64_offloaded(sources[kind], TOKENS, memory=memory))


def test_bfloat16_is_upcast_and_not_a_leak(tmp_path: Path) -> None:
    folder = save(tmp_path / "src", "llama", dtype="bfloat16")
    assert near(outputs64(folder, TOKENS), outputs64_offloaded(folder, TOKENS, memory=TINY))


@pytest.mark.parametrize(("kind", "part"), [("llama", "model"), ("qwen3", "model"), ("gpt2", "transformer")])
@pytest.mark.parametrize("named_whole", [False, True])
def test_a_backbone_without_its_prefix(kind: str, part: str, named_whole: bool, tmp_path: Path) -> None:
    whole = build(kind, tie_word_embeddings=True)
    getattr(whole, part).save_pretrained(tmp_path)
    if named_whole:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [type(whole).__name__]}))
    for prefix in ("", f"{part}."):
        assert near(outputs64(tmp_path, TOKENS), outputs64_offloaded(tmp_path, TOKENS, prefix, memory=TINY))
    assert key_report(tmp_path)["tied"] is (True if named_whole else None) is load_report(tmp_path)["tied"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_backbone_of_a_whole_checkpoint(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """The class without a head on tensors with the prefix."""
    model = build(kind)
    folder = Path(shutil.copytree(sources[kind], tmp_path / "src"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [type(model.base_model).__name__]}))
    if kind == "llama":  # its head is then one tensor too many
        with pytest.raises(UncheckedError, match="unexpected_keys: lm_head"):
            outputs64_offloaded(folder, TOKENS)
    else:
        assert near(outputs64(folder, TOKENS), outputs64_offloaded(folder, TOKENS))


@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_that_is_on_disk_all_the_same(sources: dict[str, Path], tmp_path: Path) -> None:
    """Stock loading ties it where it is equal, and believes the file where it is not."""
    folder = Path(shutil.copytree(sources["llama-tied-bias"], tmp_path / "src"))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    before = outputs64(folder, TOKENS)
    change(folder, {"lm_head.weight": embedding.clone()})
    assert near(before, outputs64_offloaded(folder, TOKENS))
    assert key_report(folder)["tied"] is load_report(folder)["tied"] is True
    change(folder, {"lm_head.weight": embedding.flip(0).contiguous()})
    assert key_report(folder)["tied"] is load_report(folder)["tied"] is False
    assert near(outputs64(folder, TOKENS), outputs64_offloaded(folder, TOKENS))
    assert not near(before, outputs64_offloaded(folder, TOKENS))


# --- what is wrong with a folder is found as in memory


def test_every_weight_is_used(sources: dict[str, Path]) -> None:
    """The control of all the equalities above: moving one entry of any tensor moves the output."""
    for kind in ("llama-tied-bias", "qwen3", "gpt2"):
        tensors = load_file(sources[kind] / "model.safetensors")
        config = json.loads((sources[kind] / "config.json").read_text())
        base = outputs64_from(config, DictTensors(tensors), TOKENS, memory=TINY)
        for name, x in tensors.items():
            moved = x.clone()
            moved.view(-1)[: x.shape[-1] * 9] += 0.1  # rows of tokens that are in TOKENS, where it is an embedding
            other = outputs64_from(config, DictTensors(tensors | {name: moved}), TOKENS, memory=TINY)
            assert not near(base, other), name


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("model.norm.weight", None, "missing_keys: model.norm.weight"),
        ("model.layers.7.mlp.up_proj.weight", torch.zeros(28, 24), "unexpected_keys: model.layers.7.mlp.up_proj"),
        ("model.layers.1.mlp.up_proj.weight", torch.zeros(27, 24), r"mismatched_keys: .*\[27, 24\].*\[28, 24\]"),
    ],
)
def test_tensors_that_are_not_the_models(sources: dict[str, Path], name: str, tensor: Tensor | None, says: str) -> None:
    tensors = load_file(sources["llama"] / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    config = json.loads((sources["llama"] / "config.json").read_text())
    with pytest.raises(UncheckedError, match=says):
        outputs64_from(config, DictTensors(tensors), TOKENS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_report_by_names_is_that_of_loading(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "tied")
    loaded, named = load_report(sources[kind]), key_report(sources[kind])
    assert {key: named[key] for key in keys} == {key: loaded[key] for key in keys}
    broken = Path(shutil.copytree(sources[kind], tmp_path / "broken"))
    name = next(n for n in load_file(broken / "model.safetensors") if "norm" in n or "ln" in n)
    tensors = load_file(broken / "model.safetensors")
    tensors["strange"] = tensors.pop(name)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    loaded, named = load_report(broken), key_report(broken)
    assert {key: named[key] for key in keys} == {key: loaded[key] for key in keys}
    assert named["missing_keys"] == [name] and named["unexpected_keys"] == ["strange"]


def test_a_weight_used_outside_its_module_is_said(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert outputs64(sources["llama"], TOKENS)["logits"].isfinite().all()
    with pytest.raises(UncheckedError, match="outside the module that has it"):
        outputs64_offloaded(sources["llama"], TOKENS)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=str(tmp_path)):
        outputs64_offloaded(tmp_path, TOKENS)


# --- memory


class Metered:
    """Tensors that note, whenever one is read, how many bytes of float64 are alive; and what was read."""

    def __init__(self, tensors: DictTensors) -> None:
        self.tensors, self.most, self.reads = tensors, 0, list[tuple[str, int]]()
        self.names, self.shape, self.dtype = tensors.names, tensors.shape, tensors.dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        x = self.tensors.read(name, rows)
        self.reads.append((name, len(x)))
        self.most = max(self.most, alive64())
        return x


def alive64() -> int:
    """Bytes of every float64 storage that a tensor holds which came into being since gc.freeze."""
    storages = {
        s.data_ptr(): s.nbytes()
        for x in gc.get_objects()
        if type(x) in (Tensor, torch.nn.Parameter) and x.dtype == torch.float64 and x.device.type == "cpu"
        for s in [x.untyped_storage()]
    }
    return sum(storages.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_memory_is_that_of_one_layer(kind: str, request: pytest.FixtureRequest) -> None:
    """Wide layers and few tokens, so that what is alive is weights."""
    wide = {"n_embd": 96, "n_layer": 4, "vocab_size": 2003} if kind == "gpt2" else {}
    if kind == "llama":
        wide = {"hidden_size": 96, "intermediate_size": 301, "num_hidden_layers": 4, "vocab_size": 2003}
    model = build(kind, **wide)
    tensors = {name: x.detach() for name, x in model.state_dict().items()}
    tensors = {name: x for name, x in tensors.items() if not (kind == "gpt2" and name == "lm_head.weight")}
    config, tokens = model.config.to_dict(), torch.tensor([[3, 1, 2000]])
    config["architectures"] = [type(model).__name__]
    gc.collect()
    gc.freeze()  # what is there already does not count, and need not be looked through at every read
    request.addfinalizer(gc.unfreeze)
    memory = 16_000
    metered = Metered(DictTensors(tensors))
    found = outputs64_from(config, metered, tokens, memory=memory)
    total = 8 * sum(x.numel() for x in tensors.values())
    embedding = 8 * 2003 * 96
    # GPT-2's own layers (Conv1D) are held whole, llama's in blocks.
    layer = 8 * 96 * 4 * 96 if kind == "gpt2" else memory
    outputs = 2 * found["logits"].nbytes
    limit = layer + memory + outputs + 50_000  # activations, masks, rotary tables, norms
    assert metered.most <= limit < embedding < total
    # The meter sees weights: with blocks as large as the head, the head is alive.
    whole = Metered(DictTensors(tensors))
    assert near(outputs64_from(config, whole, tokens, memory=1 << 30), found)
    assert whole.most >= embedding
    # And nothing stays.
    del found, whole
    gc.collect()
    assert alive64() < memory
    name = "transformer.wte.weight" if kind == "gpt2" else "model.embed_tokens.weight"
    first = next(rows for read, rows in metered.reads if read == name)
    assert first <= 3, "an embedding reads the rows of its tokens"


# --- the proof


@pytest.fixture(scope="module", params=["float32", "float64"])
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Every kind, grown, in one dtype."""
    root = tmp_path_factory.mktemp("grown")
    out = {}
    for kind, asked in REQUESTS.items():
        src = save(root / f"{kind}-src", kind.removesuffix("-wide"))
        api.expand_checkpoint(src, root / kind, dtype=request.param, prove_level="structure", **asked)
        out[kind] = (src, root / kind)
    yield out


def case_of(src: Path, out: Path) -> Case:
    receipt, raw, config = Receipt.read(out), read_config(src), read_config(out)
    made = replace(Plan.from_json(receipt.plan), axes=receipt.axes, layers=receipt.layers, source_config=raw)
    return Case(api.family_of(raw), made, src, out, full_config(raw)[0], config)


@pytest.mark.parametrize("kind", REQUESTS)
def test_both_routes_prove_the_same(grown: dict[str, Any], kind: str) -> None:
    case = case_of(*grown[kind])
    inside, outside = prove(case, "full"), prove(case, "full", memory=TINY)
    assert inside.exit_code == outside.exit_code == 0
    claims = {claim.name: claim for claim in outside.claims}
    # LayerNorm's new channels are means, each rounded on its own: that is judged by a floor that takes memory.
    means = kind == "gpt2-wide" and stored_dtypes(case.target) != {"F64"}
    assert ("means" in claims["stored"].detail) is means
    assert {name: claim.passed for name, claim in claims.items()} == {
        **dict.fromkeys(("structure", "loads", "algebra"), True),
        "stored": None if means else True,
        **dict.fromkeys(("runtime", "alive")),
    }
    assert all("may be used" in claims[name].detail for name in ("runtime", "alive"))
    assert inside.measured["from_disk"] is False and outside.measured["from_disk"] is True
    for name in ("algebra", "stored"):
        numbers = [proof.measured[name]["relative"] for proof in (inside, outside)]
        assert (means and name == "stored") or all(0 <= number <= BAR for number in numbers), (name, numbers)
    a, b = (proof.measured["stored"]["to_source"] for proof in (inside, outside))
    assert abs(a - b) <= BAR


@pytest.mark.parametrize("kind", REQUESTS)
def test_lazy_tensors_are_those_of_the_plan(grown: dict[str, Any], kind: str) -> None:
    case = case_of(*grown[kind])
    with TensorFiles.open(case.source) as files:
        wanted = apply(case.plan, {name: files.read(name).double() for name in files}, torch.float64)
        lazy = Planned(case.plan, FileTensors(files))
        assert set(lazy.names) == set(wanted)
        for name, x in wanted.items():
            cut = len(x) // 3
            assert lazy.shape(name) == x.shape and lazy.dtype(name) == x.dtype
            assert torch.equal(lazy.read(name), x)
            assert torch.equal(torch.cat([lazy.read(name, slice(0, cut)), lazy.read(name, slice(cut, len(x)))]), x)


def test_only_full_runs_from_disk(grown: dict[str, Any]) -> None:
    case = case_of(*grown["llama"])
    proof = prove(case, "auto", memory=TINY)
    assert [claim.passed for claim in proof.claims] == [True] + [None] * 5
    assert all("--prove full checks" in claim.detail for claim in proof.claims[1:])
    assert "algebra" not in proof.measured
    assert prove(case, "auto", memory=1 << 30).measured["from_disk"] is False


@pytest.mark.parametrize("memory", [None, TINY])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_broken_weight_is_seen(grown: dict[str, Any], kind: str, memory: int | None, tmp_path: Path) -> None:
    """With the certificate left out: a closed block that is not zero changes what the file computes."""
    src, out = grown[kind]
    broken = Path(shutil.copytree(out, tmp_path / "broken"))
    name = {"llama": "model.layers.0.self_attn.o_proj.weight", "gpt2": "transformer.h.4.mlp.c_proj.weight"}[kind]
    x = load_file(broken / "model.safetensors")[name]
    assert float(x[:, -1].abs().max()) == 0, "closed"
    x[:, -1] = 0.1
    change(broken, {name: x})
    tokens = probe_tokens(src, batch=2, length=24, seed=0).tokens
    measured: dict[str, Any] = {"loads": {"tied": None}}
    assert stored(Outputs(case_of(src, out), tokens, memory), measured).passed
    assert stored(Outputs(case_of(src, broken), tokens, memory), measured).passed is False
    # The algebra is judged on the file where that is in float64, else on the plan.
    on_file = x.dtype == torch.float64
    assert algebra(Outputs(case_of(src, broken), tokens, memory), measured).passed is (not on_file)


@pytest.mark.parametrize("memory", [None, TINY])
def test_a_wrong_plan_is_seen(grown: dict[str, Any], memory: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The algebra of a plan whose tensors are off by one part in ten thousand, where the plan is what is judged."""
    case = case_of(*grown["llama"])
    tokens = probe_tokens(case.source, batch=2, length=24, seed=0).tokens
    on_file = stored_dtypes(case.target) == {"F64"}  # which is then judged itself
    read = Planned.read

    def off(self: Planned, name: str, rows: slice | None = None) -> Tensor:
        return read(self, name, rows) * (1.0001 if name == "model.norm.weight" else 1)

    assert algebra(Outputs(case, tokens, memory), {}).passed
    monkeypatch.setattr(Planned, "read", off)
    assert algebra(Outputs(case, tokens, memory), {}).passed is on_file
