"""Folders whose weights are in another form: the refusal names a way on, and that way works."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from growformer.checkpoint import TensorFiles
from growformer.errors import SourceError


def test_folders_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no folder"):
        TensorFiles.open(tmp_path / "gone")
    with pytest.raises(SourceError, match=r"neither model.safetensors nor .*found nothing"):
        TensorFiles.open(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(SourceError, match=r"found model.gguf"):
        TensorFiles.open(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(SourceError, match="merge it into its base model first"):
        TensorFiles.open(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ('{"architectures": ["T5ForConditionalGeneration"]}', "t.T5ForConditionalGeneration.from"),
        ('{"architectures": ["x; import os"]}', "t.AutoModelForCausalLM.from"),
        ('{"architectures": null}', "t.AutoModelForCausalLM.from"),
        ('{"architectures": []}', "t.AutoModelForCausalLM.from"),
        ("{", "t.AutoModelForCausalLM.from"),
    ],
)
@pytest.mark.parametrize("weights", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_name_the_model_that_converts_them(
    tmp_path: Path, weights: str, config: str, expected: str
) -> None:
    (tmp_path / weights).touch()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SourceError, match="pickled weights") as caught:
        TensorFiles.open(tmp_path)
    assert expected in str(caught.value)


@pytest.mark.slow
def test_the_line_that_converts_pickled_weights_converts_them(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path / "it's a model"
    config = GPT2Config(vocab_size=13, n_positions=7, n_embd=6, n_layer=1, n_head=2, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    with pytest.raises(SourceError) as caught:
        TensorFiles.open(folder)
    line = shlex.split(str(caught.value).splitlines()[-1])
    assert line[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *line[1:]], check=True, capture_output=True)
    with TensorFiles.open(tmp_path / "it's a model-safetensors") as files:
        assert torch.equal(files.read("transformer.wte.weight"), model.transformer.wte.weight)
    assert (tmp_path / "it's a model-safetensors" / "tokenizer.json").exists()
