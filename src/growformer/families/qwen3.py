"""Qwen3: Llama with an RMSNorm on each query and key head, whose eps field the hidden norms share."""

from growformer.algebra import Norm, replace
from growformer.families.llama import LLAMA
from growformer.families.mistral import MISTRAL

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    tensors={
        **MISTRAL.tensors,
        "model.layers.{layer}.self_attn.q_proj.bias": "-> (q: heads key)",
        "model.layers.{layer}.self_attn.k_proj.bias": "-> (k: kv_heads key)",
        "model.layers.{layer}.self_attn.v_proj.bias": "-> (v: kv_heads value)",
        "model.layers.{layer}.self_attn.o_proj.bias": "-> hidden",
        "model.layers.{layer}.self_attn.q_norm.weight": "q: * key",
        "model.layers.{layer}.self_attn.k_norm.weight": "k: * key",
    },
    norms={
        **LLAMA.norms,
        "q": Norm("key", "rms", eps="rms_norm_eps"),
        "k": Norm("key", "rms", eps="rms_norm_eps"),
    },
    optional={
        "model.layers.{layer}.self_attn.q_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.k_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.v_proj.bias": "attention_bias",
        "model.layers.{layer}.self_attn.o_proj.bias": "attention_bias",
    },
    per_layer={"layer_types": "each"},
    rules=(),
    neutral=(*LLAMA.neutral, "use_sliding_window", "sliding_window", "max_window_layers"),
)
