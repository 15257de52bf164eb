"""OLMo 2: branches read the stream itself and their outputs are normed; one norm over the queries of all heads."""

from growformer.algebra import Norm, replace
from growformer.families.olmo import OLMO

OLMO2 = replace(
    OLMO,
    name="olmo2",
    model_types=("olmo2",),
    architectures=("Olmo2ForCausalLM", "Olmo2Model", "Olmo2ForSequenceClassification"),
    tensors={
        "model.embed_tokens.weight": "vocab -> hidden",
        "model.layers.{layer}.self_attn.q_proj.weight": "(q: heads key) <- (raw: hidden)",
        "model.layers.{layer}.self_attn.q_proj.bias": "-> (q: heads key)",
        "model.layers.{layer}.self_attn.k_proj.weight": "(k: kv_heads key) <- (raw: hidden)",
        "model.layers.{layer}.self_attn.k_proj.bias": "-> (k: kv_heads key)",
        "model.layers.{layer}.self_attn.v_proj.weight": "(v: kv_heads value) <- (raw: hidden)",
        "model.layers.{layer}.self_attn.v_proj.bias": "-> (v: kv_heads value)",
        "model.layers.{layer}.self_attn.o_proj.weight": "hidden <- (heads value)",
        "model.layers.{layer}.self_attn.o_proj.bias": "-> hidden",
        "model.layers.{layer}.self_attn.q_norm.weight": "q: * (heads key)",
        "model.layers.{layer}.self_attn.k_norm.weight": "k: * (kv_heads key)",
        "model.layers.{layer}.mlp.gate_proj.weight": "mlp <- (raw: hidden)",
        "model.layers.{layer}.mlp.up_proj.weight": "mlp <- (raw: hidden)",
        "model.layers.{layer}.mlp.down_proj.weight": "hidden <- mlp",
        "model.layers.{layer}.post_attention_layernorm.weight": "post: * hidden",
        "model.layers.{layer}.post_feedforward_layernorm.weight": "post: * hidden",
        "model.norm.weight": "final: * hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    gates=("model.layers.{layer}.mlp.gate_proj.weight",),
    norms={
        "post": Norm("hidden", "rms", eps="rms_norm_eps", output="added"),
        "final": Norm("hidden", "rms", eps="rms_norm_eps"),
        "q": Norm(("heads", "key"), "rms", eps="rms_norm_eps"),
        "k": Norm(("kv_heads", "key"), "rms", eps="rms_norm_eps"),
    },
    frozen=(),
    sample={**OLMO.sample, "rms_norm_eps": 1e-3},
)
