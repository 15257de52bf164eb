"""How long `growformer plan` takes on large Llamas, beside stock transformers building the same model without weights.

The checkpoint is a header: its tensors' bytes are a hole in the file, which nobody reads. Both are whole processes,
imports included, one after the other; the ratio is of the pair, and the median of the ratios is what counts.

    python benchmarks/plan.py --models 8B,70B --methods paper,hyperclone,net2net --repeat 5
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llamas

from growformer.checkpoint import FolderWriter, write_config

VOCAB, KV_HEADS, HEAD_DIM = 128_256, 8, 128
MODELS = {"8B": (4096, 14_336, 32, 32), "70B": (8192, 28_672, 64, 80)}
"""hidden, mlp, heads, layers."""

WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")

STOCK = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
with torch.device("meta"):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
"""


def save(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint whose numbers are a hole: its file is laid out, and nothing written into it."""
    specs = llamas.specs_of(config)
    with FolderWriter(folder, specs, sum(spec.nbytes for spec in specs)):
        write_config(folder, config)


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
        hidden, mlp, heads, layers = MODELS[model]
        config = llamas.config_of(VOCAB, hidden, mlp, heads, KV_HEADS, HEAD_DIM, layers)
        request = [f"{field}={2 * config[field]}" for field in WIDTHS]
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder), config)
            for method in asked.methods.split(","):
                plan = ("-m", "growformer", "plan", folder, *request, "--method", method)
                pairs = [(seconds(*plan), seconds("-c", STOCK, folder)) for _ in range(asked.repeat)]
                mine, stock = (statistics.median(one) for one in zip(*pairs, strict=True))
                ratio = statistics.median(a / b for a, b in pairs)
                print(f"{model:5}  {method:11}  {mine:7.2f}  {stock:16.2f}  {ratio:5.2f}", flush=True)


if __name__ == "__main__":
    main()
