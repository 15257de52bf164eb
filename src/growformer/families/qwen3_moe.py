"""Qwen3-MoE: Qwen3 with routed experts in every layer that the config does not name as dense."""

from growformer.algebra import Experts, Field, Frozen, replace
from growformer.families.qwen3 import QWEN3

QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architectures=(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeModel",
        "Qwen3MoeForSequenceClassification",
        "Qwen3MoeForTokenClassification",
    ),
    axes={
        **QWEN3.axes,
        "experts": Field("num_local_experts", default=Field("num_experts")),
        "expert_mlp": Field("moe_intermediate_size"),
    },
    gates=(*QWEN3.gates, "model.layers.{layer}.mlp.experts.{experts}.gate_proj.weight"),
    tensors={
        **QWEN3.tensors,
        "model.layers.{layer}.mlp.gate.weight": "experts <- hidden",
        "model.layers.{layer}.mlp.experts.{experts}.gate_proj.weight": "[experts] expert_mlp <- hidden",
        "model.layers.{layer}.mlp.experts.{experts}.up_proj.weight": "[experts] expert_mlp <- hidden",
        "model.layers.{layer}.mlp.experts.{experts}.down_proj.weight": "hidden <- [experts] expert_mlp",
    },
    tasks={
        "score.weight": "_ <- hidden",
        "score.bias": "-> _",
    },
    experts=Experts(whole={"norm_topk_prob": True}),
    uneven=(
        "model.layers.{layer}.mlp.gate_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
        "model.layers.{layer}.mlp.gate.weight",
        "model.layers.{layer}.mlp.experts.{experts}.gate_proj.weight",
        "model.layers.{layer}.mlp.experts.{experts}.up_proj.weight",
        "model.layers.{layer}.mlp.experts.{experts}.down_proj.weight",
    ),
    per_layer={"mlp_only_layers": "numbers"},
    aliases={"num_experts": "num_local_experts"},
    frozen=(
        Frozen(("layer",), "which layers are sparse follows from their numbers", unless={"decoder_sparse_step": 1}),
    ),
    neutral=(
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "use_sliding_window",
        "sliding_window",
        "attention_dropout",
        "norm_topk_prob",
        "output_router_logits",
        "router_aux_loss_coef",
    ),
    sample={
        **QWEN3.sample,
        "vocab_size": 47,
        "num_hidden_layers": 4,
        "mlp_only_layers": [2],
        "moe_intermediate_size": 14,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
)
