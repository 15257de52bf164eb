"""How long `growformer plan` takes on large Llamas, beside stock transformers building the same model without weights.

The checkpoint is a header: its tensors' bytes are a hole in the file, which nobody reads. Both are whole processes,
imports included, one after the other; the ratio is of the pair, and the median of the ratios is what counts.

    python benchmarks/plan.py --models 8B,70B --methods paper,hyperclone,net2net --repeat 5
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCAB, KV_HEADS, HEAD_DIM = 128_256, 8, 128
MODELS = {"8B": (4096, 14_336, 32, 32), "70B": (8192, 28_672, 64, 80)}
"""hidden, mlp, heads, layers."""

STOCK = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
"""


def shapes(hidden: int, mlp: int, heads: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama, by name."""
    query, key = (heads * HEAD_DIM, hidden), (KV_HEADS * HEAD_DIM, hidden)
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": query,
        "self_attn.k_proj": key,
        "self_attn.v_proj": key,
        "self_attn.o_proj": query[::-1],
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCAB, hidden)}


def save(folder: Path, sizes: tuple[int, int, int, int]) -> None:
    """A checkpoint whose numbers are a hole."""
    hidden, mlp, heads, layers = sizes
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes(*sizes).items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)


def seconds(*command: str) -> float:
    """How long a process of this interpreter takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--models", default="8B,70B")
    words.add_argument("--methods", default="paper,hyperclone,net2net")
    words.add_argument("--repeat", type=int, default=5)
    asked = words.parse_args()
    print("every width twice over, whole processes, medians")
    print("model  method       plan, s  stock on meta, s  ratio")
    for model in asked.models.split(","):
        hidden, mlp, heads, _ = MODELS[model]
        request = [
            f"hidden_size={2 * hidden}",
            f"intermediate_size={2 * mlp}",
            f"num_attention_heads={2 * heads}",
            f"num_key_value_heads={2 * KV_HEADS}",
        ]
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), MODELS[model])
            for method in asked.methods.split(","):
                plan = ("-m", "growformer", "plan", folder, *request, "--method", method)
                pairs = [(seconds(*plan), seconds("-c", STOCK, folder)) for _ in range(asked.repeat)]
                mine, stock = (statistics.median(one) for one in zip(*pairs, strict=True))
                ratio = statistics.median(a / b for a, b in pairs)
                print(f"{model:5}  {method:11}  {mine:7.2f}  {stock:16.2f}  {ratio:5.2f}", flush=True)


if __name__ == "__main__":
    main()
