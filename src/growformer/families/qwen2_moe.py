"""Qwen2-MoE: sparse layers with routed experts and one gated shared expert, dense ones where the config says so."""

from growformer.algebra import Experts, Field, Frozen, replace
from growformer.families.llama import LLAMA
from growformer.families.qwen2 import QWEN2

QWEN2_MOE = replace(
    LLAMA,
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    architectures=(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeModel",
        "Qwen2MoeForSequenceClassification",
        "Qwen2MoeForTokenClassification",
        "Qwen2MoeForQuestionAnswering",
    ),
    axes={
        **LLAMA.axes,
        "experts": Field("num_experts"),
        "expert_mlp": Field("moe_intermediate_size"),
        "shared_mlp": Field("shared_expert_intermediate_size"),
    },
    gates=(
        *QWEN2.gates,
        "model.layers.{layer}.mlp.experts.{experts}.gate_proj.weight",
        "model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
    ),
    tensors={
        **QWEN2.tensors,
        "model.layers.{layer}.mlp.gate.weight": "experts <- hidden",
        "model.layers.{layer}.mlp.experts.{experts}.gate_proj.weight": "[experts] expert_mlp <- hidden",
        "model.layers.{layer}.mlp.experts.{experts}.up_proj.weight": "[experts] expert_mlp <- hidden",
        "model.layers.{layer}.mlp.experts.{experts}.down_proj.weight": "hidden <- [experts] expert_mlp",
        "model.layers.{layer}.mlp.shared_expert.gate_proj.weight": "shared_mlp <- hidden",
        "model.layers.{layer}.mlp.shared_expert.up_proj.weight": "shared_mlp <- hidden",
        "model.layers.{layer}.mlp.shared_expert.down_proj.weight": "hidden <- shared_mlp",
        "model.layers.{layer}.mlp.shared_expert_gate.weight": "1 <- hidden",
    },
    tasks={
        "score.weight": "_ <- hidden",
        "score.bias": "-> _",
        "qa_outputs.weight": "_ <- hidden",
        "qa_outputs.bias": "-> _",
    },
    experts=Experts(whole={"norm_topk_prob": True}),
    optional={
        "model.layers.{layer}.self_attn.q_proj.bias": "qkv_bias",
        "model.layers.{layer}.self_attn.k_proj.bias": "qkv_bias",
        "model.layers.{layer}.self_attn.v_proj.bias": "qkv_bias",
    },
    uneven=(
        "model.layers.{layer}.mlp.gate_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight",
        "model.layers.{layer}.mlp.down_proj.weight",
        "model.layers.{layer}.mlp.gate.weight",
        "model.layers.{layer}.mlp.experts.{experts}.gate_proj.weight",
        "model.layers.{layer}.mlp.experts.{experts}.up_proj.weight",
        "model.layers.{layer}.mlp.experts.{experts}.down_proj.weight",
        "model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
        "model.layers.{layer}.mlp.shared_expert.up_proj.weight",
        "model.layers.{layer}.mlp.shared_expert.down_proj.weight",
        "model.layers.{layer}.mlp.shared_expert_gate.weight",
    ),
    per_layer={"layer_types": "each", "mlp_only_layers": "numbers"},
    rules=(),
    frozen=(
        Frozen(("layer",), "which layers are sparse follows from their numbers", unless={"decoder_sparse_step": 1}),
    ),
    neutral=(
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
        "attention_dropout",
        "norm_topk_prob",
        "output_router_logits",
        "router_aux_loss_coef",
    ),
    sample={
        **LLAMA.sample,
        "vocab_size": 43,
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
        "moe_intermediate_size": 14,
        "shared_expert_intermediate_size": 18,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    },
)
