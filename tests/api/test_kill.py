"""kill -9 at fifty moments spread over an output of half a gigabyte: every resume gives the same bits."""

import os
import random
from pathlib import Path

import pytest
import torch

from growformer import api
from growformer.checkpoint import TensorSpec, sha256, write_config, write_folder
from growformer.checkpoint.journal import JOURNAL
from tests.api.forked import forked

REQUEST = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 16}
KILLS = 50


def source(folder: Path) -> Path:
    """A Llama of 0.2 GB in bfloat16, written without a model in memory."""
    h, p, v = 768, 2048, 32000
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    for layer in range(9):
        at = f"model.layers.{layer}."
        shapes |= {at + f"self_attn.{x}_proj.weight": (h, h) for x in "qkvo"}
        shapes |= {at + f"mlp.{x}_proj.weight": (p, h) for x in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (h, p)}
        shapes |= {at + f"{x}_layernorm.weight": (h,) for x in ("input", "post_attention")}
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def rows(spec: TensorSpec) -> list[torch.Tensor]:
        return [torch.randn(spec.shape, generator=generator).bfloat16()]

    write_folder(folder, [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()], rows, 10**9)
    fields = {"hidden_size": h, "intermediate_size": p, "num_hidden_layers": 9, "vocab_size": v, "head_dim": 64}
    fields |= {"num_attention_heads": 12, "num_key_value_heads": 12, "tie_word_embeddings": True}
    write_config(folder, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **fields})
    return folder


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    src = source(tmp_path / "src")

    def expand(out: Path, resume: bool = False) -> None:
        api.expand_checkpoint(src, out, prove_level="structure", resume=resume, **REQUEST)

    assert os.waitstatus_to_exitcode(forked(lambda: expand(tmp_path / "whole"), lambda: False)) == 0
    weights = tmp_path / "whole" / "model.safetensors"
    wanted, size = sha256(weights), weights.stat().st_size
    assert size > 500e6
    partials, rng = 0, random.Random(0)
    for i in range(KILLS):
        out, partial = tmp_path / "out", tmp_path / ".out.partial"
        # From the first byte to a little past the last, when the proof is at work.
        moment = (i + rng.random()) / (KILLS - 2) * size

        def blocks(moment: float = moment, partial: Path = partial) -> bool:
            files = list(partial.glob("*.safetensors"))
            journal = partial / JOURNAL
            if files and not journal.exists():
                return True  # all is written
            lines = journal.read_text().count("\n") if journal.exists() else 0
            return lines * 8e6 > moment

        status = forked(lambda out=out: expand(out), blocks)
        assert os.WIFSIGNALED(status)
        assert not out.exists()
        partials += partial.exists()
        assert os.waitstatus_to_exitcode(forked(lambda out=out: expand(out, resume=True), lambda: False)) == 0
        assert sha256(out / "model.safetensors") == wanted
        assert not partial.exists()
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
    print(f"{partials} of {KILLS} kills left a partial output; every resume gave {wanted[:16]} ({size:,} bytes)")
    assert partials >= 40
