"""Dense families and the families with experts that they become, one literal each."""

from growformer.algebra import Becoming, replace

LLAMA_TO_MIXTRAL = Becoming(
    source="llama",
    target="mixtral",
    architectures={"LlamaForCausalLM": "MixtralForCausalLM", "LlamaModel": "MixtralModel"},
    tensors={
        "model.layers.{layer}.mlp.gate_proj.weight": (
            "model.layers.{layer}.block_sparse_moe.experts.{experts}.w1.weight"
        ),
        "model.layers.{layer}.mlp.up_proj.weight": (
            "model.layers.{layer}.block_sparse_moe.experts.{experts}.w3.weight"
        ),
        "model.layers.{layer}.mlp.down_proj.weight": (
            "model.layers.{layer}.block_sparse_moe.experts.{experts}.w2.weight"
        ),
    },
    new={"model.layers.{layer}.block_sparse_moe.gate.weight": ""},
    requires={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
)

MISTRAL_TO_MIXTRAL = replace(
    LLAMA_TO_MIXTRAL,
    source="mistral",
    architectures={
        "MistralForCausalLM": "MixtralForCausalLM",
        "MistralModel": "MixtralModel",
        "MistralForSequenceClassification": "MixtralForSequenceClassification",
        "MistralForTokenClassification": "MixtralForTokenClassification",
        "MistralForQuestionAnswering": "MixtralForQuestionAnswering",
    },
    requires={},
    idle=("layer_types",),
)

QWEN2_TO_QWEN2_MOE = Becoming(
    source="qwen2",
    target="qwen2_moe",
    architectures={
        "Qwen2ForCausalLM": "Qwen2MoeForCausalLM",
        "Qwen2Model": "Qwen2MoeModel",
        "Qwen2ForSequenceClassification": "Qwen2MoeForSequenceClassification",
        "Qwen2ForTokenClassification": "Qwen2MoeForTokenClassification",
    },
    tensors={
        "model.layers.{layer}.mlp.gate_proj.weight": "model.layers.{layer}.mlp.experts.{experts}.gate_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight": "model.layers.{layer}.mlp.experts.{experts}.up_proj.weight",
        "model.layers.{layer}.mlp.down_proj.weight": "model.layers.{layer}.mlp.experts.{experts}.down_proj.weight",
    },
    new={
        "model.layers.{layer}.mlp.gate.weight": "",
        "model.layers.{layer}.mlp.shared_expert.gate_proj.weight": "model.layers.{layer}.mlp.gate_proj.weight",
        "model.layers.{layer}.mlp.shared_expert.up_proj.weight": "model.layers.{layer}.mlp.up_proj.weight",
        "model.layers.{layer}.mlp.shared_expert.down_proj.weight": "model.layers.{layer}.mlp.down_proj.weight",
        "model.layers.{layer}.mlp.shared_expert_gate.weight": "",
    },
    fields={
        "moe_intermediate_size": "intermediate_size",
        "shared_expert_intermediate_size": "intermediate_size",
    },
    sets={"mlp_only_layers": [], "decoder_sparse_step": 1, "qkv_bias": True},
)

QWEN3_TO_QWEN3_MOE = replace(
    QWEN2_TO_QWEN2_MOE,
    source="qwen3",
    target="qwen3_moe",
    architectures={"Qwen3ForCausalLM": "Qwen3MoeForCausalLM", "Qwen3Model": "Qwen3MoeModel"},
    new={"model.layers.{layer}.mlp.gate.weight": ""},
    fields={"moe_intermediate_size": "intermediate_size"},
    sets={"mlp_only_layers": [], "decoder_sparse_step": 1},
    requires={"use_sliding_window": False},  # its window is one for all layers
    idle=("layer_types", "max_window_layers"),
)

_ALL = (LLAMA_TO_MIXTRAL, MISTRAL_TO_MIXTRAL, QWEN2_TO_QWEN2_MOE, QWEN3_TO_QWEN3_MOE)

BECOMING: dict[tuple[str, str], Becoming] = {(each.source, each.target): each for each in _ALL}
"""How one family becomes another, by their two names."""
