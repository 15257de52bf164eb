"""A head that config.json ties to the embedding, stored beside it all the same: one tensor, if the two are equal."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from growformer import api
from growformer.checkpoint import TensorFiles
from growformer.errors import SourceError
from growformer.proof.functional import load_report
from tests.tiny import build, save

HEAD, NOTE = "lm_head.weight", "lm_head.weight is stored beside the tied embedding, equal; written once"
EMBEDDING = {"llama-tied-bias": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
REQUEST: dict[str, dict[str, Any]] = {
    "llama-tied-bias": {"hidden_size": 36, "intermediate_size": 41, "num_hidden_layers": 4},
    "gpt2": {"n_embd": 48, "n_head": 8},
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    with TensorFiles.open(folder) as files:
        return {name: files.read(name) for name in files}


def twice(once: Path, folder: Path, kind: str) -> Path:
    """A copy of a folder with its head stored too; in a shard of its own where there are shards."""
    shutil.copytree(once, folder)
    head = tensors_of(once)[EMBEDDING[kind]].clone()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        found = json.loads(index.read_text())
        found["weight_map"][HEAD] = "head.safetensors"
        index.write_text(json.dumps(found))
        save_file({HEAD: head}, folder / "head.safetensors", metadata={"format": "pt"})
    else:
        change(folder, {HEAD: head})
    return folder


def change(folder: Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors") -> None:
    save_file({**load_file(folder / file), **tensors}, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "dtype", "shard"),
    [
        ("llama-tied-bias", None, "50GB"),
        ("llama-tied-bias", "bfloat16", "50GB"),
        ("llama-tied-bias", None, "20kB"),
        ("gpt2", None, "50GB"),
    ],
)
def test_equal_ones_are_read_and_written_once(kind: str, dtype: str | None, shard: str, tmp_path: Path) -> None:
    once = save(tmp_path / "once", kind, dtype=dtype)
    if shard != "50GB":
        (once / "model.safetensors").unlink()
        model = build(kind)
        model.save_pretrained(once, max_shard_size=shard)
        assert len(list(once.glob("*.safetensors"))) > 1
    src = twice(once, tmp_path / "twice", kind)
    assert set(tensors_of(src)) - set(tensors_of(once)) == {HEAD}

    made = api.plan(src, **REQUEST[kind])
    assert NOTE in made.notes and HEAD in made.dropped and HEAD not in made.by_name
    # The control: what is stored once is neither noted nor left behind.
    assert NOTE not in api.plan(once, **REQUEST[kind]).notes and HEAD not in api.plan(once, **REQUEST[kind]).dropped

    api.expand_checkpoint(src, tmp_path / "out", prove_level="structure", **REQUEST[kind])
    api.expand_checkpoint(once, tmp_path / "wanted", prove_level="structure", **REQUEST[kind])
    wanted, out = tensors_of(tmp_path / "wanted"), tensors_of(tmp_path / "out")
    assert wanted.keys() == out.keys() and all(torch.equal(wanted[name], out[name]) for name in out)
    assert load_report(tmp_path / "out")["tied"] is True
    # Whole models; and in one case from disk, module by module, where names and values say what is tied.
    proof = api.verify(src, tmp_path / "out", memory="100kB" if shard != "50GB" else None)
    assert proof.exit_code == 0 and all(claim.passed or not claim.required for claim in proof.claims)
    assert proof.measured["loads"]["tied"] is True and proof.measured["from_disk"] is (shard != "50GB")


def test_a_backbone_without_its_prefix(tmp_path: Path) -> None:
    """As old exports of GPT-2 have it, with a config.json from before the field was written."""
    once = save(tmp_path / "once", "gpt2")
    tensors = {name.removeprefix("transformer."): x for name, x in tensors_of(once).items()}
    save_file(tensors | {HEAD: tensors["wte.weight"].clone()}, once / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((once / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (once / "config.json").write_text(json.dumps(config))
    grown = api.expand_checkpoint(once, tmp_path / "out", prove_level="full", **REQUEST["gpt2"])
    assert NOTE in grown.plan.notes and all(claim.passed for claim in grown.proof.claims)
    assert HEAD not in tensors_of(tmp_path / "out")


def test_a_head_that_differs_is_refused_and_each_fix_works(tmp_path: Path) -> None:
    kind = "llama-tied-bias"
    once = save(tmp_path / "once", kind)
    src = twice(once, tmp_path / "twice", kind)
    head = tensors_of(src)[HEAD]
    head[36, 23] += 2.0**-12
    change(src, {HEAD: head})
    said = "tie_word_embeddings is true, and lm_head.weight is stored all the same, other than model.embed_tokens"
    for refused in (api.plan, lambda *a, **k: api.expand_checkpoint(a[0], tmp_path / "out", **k)):
        with pytest.raises(SourceError, match=said) as error:
            refused(src, **REQUEST[kind])
        assert "set tie_word_embeddings to false" in str(error.value) and "remove lm_head.weight" in str(error.value)
    assert not (tmp_path / "out").exists()
    # What the refusal says of stock loading.
    assert load_report(src)["tied"] is False
    # The dtype alone is no difference, for there either.
    change(src, {HEAD: tensors_of(once)[EMBEDDING[kind]].double()})
    assert load_report(src)["tied"] is True
    assert NOTE in api.plan(src, **REQUEST[kind]).notes
    # The fixes: one of them is `once`.
    change(src, {HEAD: head})
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    grown = api.expand_checkpoint(src, tmp_path / "out", prove_level="full", **REQUEST[kind])
    assert HEAD in grown.plan.by_name and all(claim.passed for claim in grown.proof.claims)


def test_a_head_that_changed_after_growing_is_found(tmp_path: Path) -> None:
    kind = "llama-tied-bias"
    src = twice(save(tmp_path / "once", kind), tmp_path / "twice", kind)
    out = tmp_path / "out"
    api.expand_checkpoint(src, out, prove_level="structure", **REQUEST[kind])
    assert api.verify(src, out, level="structure").exit_code == 0

    def structure() -> Any:
        return next(claim for claim in api.verify(src, out, level="structure").claims if claim.name == "structure")

    kept = tensors_of(src)[HEAD]
    moved = kept.clone()
    moved[36, 23] += 2.0**-12
    change(src, {HEAD: moved})
    assert structure().passed is False
    assert "lm_head.weight is other than model.embed_tokens.weight" in structure().detail
    change(src, {HEAD: kept})
    assert structure().passed is True
    # Nor may the grown folder hold a head, for no one would know what it must be.
    change(out, {HEAD: tensors_of(out)["model.embed_tokens.weight"].clone()})
    assert structure().passed is False and "lm_head.weight: in the target" in structure().detail


def test_models_in_memory(tmp_path: Path) -> None:
    kind = "llama-tied-bias"
    model = build(kind)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    grown = api.expand(model, **REQUEST[kind])
    assert NOTE in grown.growformer_plan.notes
    assert grown.lm_head.weight.data_ptr() == grown.model.embed_tokens.weight.data_ptr()
    assert api.verify(model, grown).exit_code == 0
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(SourceError, match="is stored all the same"):
        api.expand(model, **REQUEST[kind])
