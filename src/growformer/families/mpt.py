"""MPT: ALiBi, fused q|k|v, LayerNorm without shifts, no biases, an MLP of 4 x hidden whatever expansion_ratio says."""

from growformer.algebra import Attention, Divides, Family, Field, Frozen, Norm, Ratio, Tied, Times

MPT = Family(
    name="mpt",
    model_types=("mpt",),
    architectures=(
        "MptForCausalLM",
        "MptModel",
        "MptForSequenceClassification",
        "MptForTokenClassification",
        "MptForQuestionAnswering",
    ),
    axes={
        "vocab": Field("vocab_size"),
        "hidden": Field("d_model"),
        "mlp": Times(4, "d_model"),
        "heads": Field("n_heads"),
        "key": Ratio("d_model", "n_heads"),
        "value": Ratio("d_model", "n_heads"),
        "layer": Field("n_layers"),
    },
    tensors={
        "transformer.wte.weight": "vocab -> hidden",
        "transformer.blocks.{layer}.norm_1.weight": "pre: * hidden",
        "transformer.blocks.{layer}.attn.Wqkv.weight": "(q: heads key | k: heads key | v: heads value) <- hidden",
        "transformer.blocks.{layer}.attn.out_proj.weight": "hidden <- (heads value)",
        "transformer.blocks.{layer}.norm_2.weight": "pre: * hidden",
        "transformer.blocks.{layer}.ffn.up_proj.weight": "mlp <- hidden",
        "transformer.blocks.{layer}.ffn.down_proj.weight": "hidden <- mlp",
        "transformer.norm_f.weight": "final: * hidden",
        "lm_head.weight": "vocab <- hidden",
    },
    tasks={
        "score.weight": "_ <- hidden",
        "classifier.weight": "_ <- hidden",
        "classifier.bias": "-> _",
        "qa_outputs.weight": "_ <- hidden",
        "qa_outputs.bias": "-> _",
    },
    norms={
        "pre": Norm("hidden", "layer", eps="layer_norm_epsilon"),
        "final": Norm("hidden", "layer", eps="layer_norm_epsilon"),
    },
    attention=Attention(alibi="mpt", scaled=False),
    tied=Tied("lm_head.weight", "transformer.wte.weight", norm="final"),
    prefix="transformer.",
    rules=(Divides(by="n_heads", over="d_model"),),
    frozen=(
        Frozen(("key",), "queries and keys are clipped before their scores", unless={"attn_config.clip_qkv": None}),
    ),
    requires={
        # Clipped queries and keys cannot take a factor.
        # The class reads none of these; a checkpoint with other values was made by other code.
        "attn_config.alibi": True,
        "attn_config.alibi_bias_max": 8,
        "attn_config.attn_type": "multihead_attention",
        "attn_config.prefix_lm": False,
        "attn_config.qk_ln": False,
        "expansion_ratio": 4,
        "no_bias": True,
    },
    when=(
        # A scale that config.json states stays as heads grow; the root of the head size stands in where it does not.
        ({"attn_config.softmax_scale": None}, {"attention": Attention(alibi="mpt")}),
    ),
    sample={
        "vocab_size": 37,
        "d_model": 24,
        "n_layers": 3,
        "n_heads": 4,
        "max_seq_len": 32,
        "layer_norm_epsilon": 1e-3,
    },
    neutral=(
        "max_seq_len",
        "initializer_range",
        "init_device",
        "resid_pdrop",
        "emb_pdrop",
        "embedding_fraction",
        "learned_pos_emb",
        "norm_type",
        "logit_scale",
        "attn_config.attn_pdrop",
        "attn_config.attn_impl",
        "attn_config.attn_uses_sequence_id",
        "attn_config.softmax_scale",
    ),
)
