"""Llamas of any size for benchmarks: their configs, and the tensors of their checkpoints in bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growformer.checkpoint import TensorSpec

# Only the standard library up here: checkpoint.py measures what its children take beside what it holds itself.


def config_of(
    vocab: int, hidden: int, mlp: int, heads: int, kv_heads: int, head_dim: int, layers: int
) -> dict[str, Any]:
    """The config of a Llama whose head is not tied."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }


def specs_of(config: dict[str, Any]) -> list[TensorSpec]:
    """The tensors of such a Llama, in the order of its layers."""
    from growformer.checkpoint import TensorSpec

    v, h, m, d = (config[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim"))
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        attention = {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (m, h) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (h, m)}
        shapes |= {f"{at}.{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (v, h)}
    return [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
