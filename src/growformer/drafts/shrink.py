"""A tiny config of the same kind as a real one: small sizes, mostly different, with the ratios that count."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from growformer.checkpoint.stock import full_config, stock_tensors
from growformer.drafts.probe import Config, probe
from growformer.errors import RequestError

_SMALL = 300_000

_LAYERS = re.compile(
    r"^(num_(hidden_|encoder_|decoder_)?layers|(encoder|decoder)_layers|n_layers?|num_decoder_layers)$"
)
_HEADS = re.compile(r"^((num_|n_)(attention_)?heads?|(encoder_|decoder_)?attention_heads)$")
_KV = re.compile(r"^(num_key_value_heads|num_kv_heads|n_kv_heads?|n_head_kv|multi_query_group_num)$")
_HEAD = re.compile(r"(^|_)(head_dim|d_kv|head_size|kv_channels)$")
_HIDDEN = re.compile(r"^(hidden_size|n_embd|d_model|model_dim|dim|embed_dim|word_embed_proj_dim)$")
_PLACES = re.compile(r"(max_position|n_positions|n_ctx|max_seq|max_sequence|max_source|max_target|seq_length|context)")
_EXPERTS = re.compile(r"(num|n)_.*experts$|^moe_num_experts$|^num_experts$")
_CHOSEN = re.compile(r"(experts_per_tok|top_?k$|moe_k$|num_selected)")


def shrink(raw: Mapping[str, Any]) -> Config:
    """A tiny config, or `raw` itself where its model is small.

    Args:
        raw: what config.json holds.

    Raises:
        RequestError: no tiny config was found that the class takes and the model runs with.
    """
    small = {
        k: v
        for k, v in raw.items()
        if not k.startswith("_") and k not in ("dtype", "torch_dtype", "transformers_version")
    }
    small.pop("quantization_config", None)
    if sum(math.prod(shape) for shape in stock_tensors(raw).values()) < _SMALL:
        return small
    full, _ = full_config(raw)
    for even, grouped in ((False, True), (False, False), (True, True), (True, False)):
        for old in ({}, full):
            tiny = _tiny({**old, **small}, full, even, grouped)
            tiny.pop("architectures", None) if old else None
            if probe(tiny) is not None:
                return tiny
    raise RequestError(f"model_type {raw.get('model_type')!r}: no tiny config was found; give one with small sizes")


def _tiny(raw: Mapping[str, Any], full: Mapping[str, Any], even: bool, grouped: bool) -> Config:
    """Small sizes by what fields are called; `even`: with more divisors; `grouped`: fewer key heads."""
    out: Config = dict(raw)
    ints = {k: v for k, v in full.items() if isinstance(v, int) and not isinstance(v, bool)}
    layers = max([v for k, v in ints.items() if _LAYERS.match(k)], default=3)
    n = min(4, layers)
    heads = next((v for k, v in ints.items() if _HEADS.match(k)), 4)
    widths = iter((48, 64, 80, 96, 112, 128) if even else (28, 20, 36, 44, 52, 60, 68, 76))
    # Where a part of each head turns, that part is a whole number of pairs.
    rope = full.get("rope_parameters")
    part = (rope if isinstance(rope, Mapping) else full).get("partial_rotary_factor") or 1.0
    heads_of = (8, 8, 8, 8) if even else (10, 6, 8, 12)
    sizes = iter([n for n in (*heads_of, 16, 20, 24, 40) if int(n * part) % 2 == 0 and int(n * part)])
    experts = 6
    told: dict[int, int] = {}
    for key, value in ints.items():
        new = value
        if _LAYERS.match(key):
            new = n
        elif _HEADS.match(key):
            new = 4
        elif _KV.match(key):
            new = 1 if value == 1 else 4 if value == heads and not grouped else 2
        elif _HEAD.search(key):
            new = told.setdefault(value, next(sizes, 8))
        elif key == "rotary_dim":
            new = min(value, 4)
        elif _HIDDEN.match(key):
            new = 32
        elif "vocab" in key and value > 100:
            new = told.setdefault(value, 61)
        elif _PLACES.search(key):
            new = min(value, 64)
        elif _EXPERTS.search(key) and value > 2:
            new = experts
        elif _CHOSEN.search(key):
            new = min(value, 2)
        elif key == "n_group" and value > 1:
            new = 3
        elif key == "topk_group" and value > 1:
            new = 2
        elif re.search(r"token_id$|_id$|_index$", key):
            new = min(value, 2)
        elif "sliding" in key or "window" in key:
            new = min(value, 16)
        elif value > 48:
            new = told.setdefault(value, next(widths, 64))
        elif value >= layers > n and ("layer" in key or "replace" in key):
            new = n
        if new != value:
            out[key] = new
    for key, value in raw.items():
        if isinstance(value, list) and len(value) == layers and layers > n:
            kinds = list(dict.fromkeys(map(str, value)))
            picked = [next(x for x in value if str(x) == kind) for kind in kinds][:n]
            out[key] = [*value[: n - len(picked)], *picked] if len(kinds) > 1 else value[:n]
        elif isinstance(value, list) and all(isinstance(x, int) for x in value) and "layer" in key:
            out[key] = [x for x in value if x < n]
        elif key.endswith("token_id") and isinstance(value, list):
            out[key] = 2
    return out
