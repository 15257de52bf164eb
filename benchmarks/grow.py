"""How long one growth of a run takes, beside one training step of the model it makes.

Each pair of measurements is a growth and a step of the same grown model, on the same threads, one after the other; the
ratio is of the pair, and the median of the ratios is what counts. On a busy machine seconds mean little, ratios more.

    python benchmarks/grow.py --hidden 512 --layers 8 --repeat 5
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import growformer as gf

AXES: dict[str, Callable[[int, int], dict[str, int]]] = {
    "mlp": lambda hidden, layers: {"intermediate_size": 4 * hidden},
    "heads": lambda hidden, layers: {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 32},
    "head_dim": lambda hidden, layers: {"head_dim": 96},
    "hidden": lambda hidden, layers: {"hidden_size": 3 * hidden // 2},
    "layers": lambda hidden, layers: {"num_hidden_layers": 2 * layers},
}


def started(hidden: int, layers: int, vocab: int, dtype: torch.dtype) -> tuple[Any, torch.optim.Optimizer]:
    """A Llama and AdamW after one step."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step(model, optimizer, 32)
    return model, optimizer


def step(model: Any, optimizer: torch.optim.Optimizer, tokens: int) -> float:
    """Seconds of one training step on a sequence of that many tokens."""
    batch = torch.randint(0, model.config.vocab_size, (1, tokens))
    start = time.perf_counter()
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    optimizer.step()
    model.zero_grad()
    return time.perf_counter() - start


def measure(axis: str, hidden: int, layers: int, vocab: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """One pair: a growth, and the second step after it."""
    names = list(AXES) if axis == "all" else [axis]
    request = {name: size for each in names for name, size in AXES[each](hidden, layers).items()}
    model, optimizer = started(hidden, layers, vocab, dtype)
    gc.collect()
    old = model.num_parameters()
    start = time.perf_counter()
    gf.grow(model, optimizer, warmup=100, **request)
    grow = time.perf_counter() - start
    step(model, optimizer, tokens)  # makes the moments of new parameters
    train = step(model, optimizer, tokens)
    new = model.num_parameters()
    return {
        "axis": axis,
        "parameters": [old, new],
        "grow_seconds": grow,
        "grow_seconds_per_billion": grow / new * 1e9,
        "step_seconds": train,
        "ratio": grow / train,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join([*AXES, "all"]), help="which growths, separated by commas")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size before growth, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="layers before growth")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of the training step")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeat", type=int, default=3, help="pairs per growth; the median ratio is shown")
    parser.add_argument("--json", help="file for all measurements")
    options = parser.parse_args()
    torch.manual_seed(0)
    everything = []
    print(f"{torch.get_num_threads()} threads, {options.dtype}, a step of {options.tokens} tokens\n")
    print("| growth | parameters | s per billion | in steps (median of pairs) | pairs |")
    print("|---|---|---|---|---|")
    for axis in options.axes.split(","):
        rows = [
            measure(axis, options.hidden, options.layers, options.vocab, options.tokens, getattr(torch, options.dtype))
            for _ in range(options.repeat)
        ]
        everything += rows
        old, new = rows[0]["parameters"]
        seconds = statistics.median(row["grow_seconds_per_billion"] for row in rows)
        ratios = [row["ratio"] for row in rows]
        middle, pairs = statistics.median(ratios), ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {axis} | {old / 1e6:.0f}M -> {new / 1e6:.0f}M | {seconds:.1f} | {middle:.2f} | {pairs} |")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(everything, file, indent=1)


if __name__ == "__main__":
    main()
