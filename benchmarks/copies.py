"""How far copies of channels part as a grown model trains on: what breaks the tie, if anything does.

A small Llama with tied embeddings trains on bytes for some steps, its width is doubled together with AdamW's moments,
and it trains on. Told every so often: the norm of the embeddings' old half less their new one, over the norm of both.
Copies that are alike to the last bit, in what writes them and in what they read, stay so; where the algebra alone makes
them alike, sums round otherwise for each, and training may enlarge that.

    python benchmarks/copies.py TEXT --methods staged,hyperclone,deepfusion,sparkling
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import growformer

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 2, "num_key_value_heads": 2}
LENGTH, ROWS = 96, 8
TOLD = (0, 10, 50, 100, 200, 300, 500)


def parted(text: bytes, method: str, dtype: torch.dtype, before: int) -> list[float]:
    """The distance of the halves at each of `TOLD` steps after the growth."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, num_hidden_layers=4, head_dim=16, tie_word_embeddings=True, **SMALL)
    model = LlamaForCausalLM(config).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    places = torch.Generator().manual_seed(1)

    def step() -> None:
        starts = torch.randint(0, len(text) - LENGTH, (ROWS,), generator=places).tolist()
        rows = torch.tensor([list(text[start : start + LENGTH]) for start in starts])
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(before):
        step()
    growformer.grow(model, optimizer, method=method, **{name: 2 * size for name, size in SMALL.items()})
    found = []
    for done in range(TOLD[-1] + 1):
        if done:
            step()
        if done in TOLD:
            weight = model.get_input_embeddings().weight.detach()
            old, new = weight.chunk(2, dim=1)
            found.append(float((old - new).norm() / weight.norm()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a file of at least some hundred thousand bytes")
    parser.add_argument("--methods", default="staged,hyperclone")
    parser.add_argument("--before", type=int, default=100, help="steps before the growth")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = asked.text.read_bytes()
    print("| method | dtype | " + " | ".join(f"step {step}" for step in TOLD) + " |")
    print("|---|---|" + "---|" * len(TOLD))
    for method in asked.methods.split(","):
        for dtype in (torch.float32, torch.float64):
            found = parted(text, method, dtype, asked.before)
            print(f"| {method} | {str(dtype)[6:]} | " + " | ".join(f"{x:.1e}" for x in found) + " |", flush=True)


if __name__ == "__main__":
    main()
