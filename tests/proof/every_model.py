"""A tiny random model of every family: class and config, sizes as different from one another as the class allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
KV = {**SIZES, "num_key_value_heads": 2}
FREE = {**KV, "head_dim": 10}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 14, "norm_topk_prob": True}
ENCODER = {**SIZES, "type_vocab_size": 2}
IMAGE = {
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 3,
}
TEXT = {**SIZES, "projection_dim": 18}
CLIP = {"text_config": TEXT, "vision_config": {**IMAGE, "projection_dim": 18}, "projection_dim": 18}
SIGLIP = {
    "text_config": {**SIZES, "projection_size": 20},
    "vision_config": {**IMAGE, "hidden_size": 20, "intermediate_size": 26},
}
T5 = {
    "vocab_size": 41,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 28,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**KV, "head_dim": 6, "attention_bias": True, "mlp_bias": True}),
    "llama-base": ("LlamaModel", {**KV}),
    "llama-classify": ("LlamaForSequenceClassification", {**KV, "num_labels": 3}),
    "mistral": ("MistralForCausalLM", {**FREE, "sliding_window": 6}),
    "mixtral": ("MixtralForCausalLM", {**FREE, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2ForCausalLM", {**KV, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {**FREE}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**KV, **MOE, "num_experts": 5, "shared_expert_intermediate_size": 12, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**FREE, **MOE, "num_experts": 5}),
    "gemma": ("GemmaForCausalLM", {**FREE}),
    "gemma2": ("Gemma2ForCausalLM", {**FREE, "sliding_window": 6, "query_pre_attn_scalar": 10}),
    "gemma3_text": ("Gemma3ForCausalLM", {**FREE, "sliding_window": 6, "query_pre_attn_scalar": 10}),
    "gemma4_text": (
        "Gemma4ForCausalLM",
        {
            **FREE,
            "global_head_dim": 14,
            "sliding_window": 6,
            "hidden_size_per_layer_input": 7,
            "vocab_size_per_layer_input": 41,
            "num_kv_shared_layers": 0,
        },
    ),
    "phi": ("PhiForCausalLM", {**SIZES, "num_attention_heads": 3}),
    "phi3": ("Phi3ForCausalLM", {**KV}),
    "olmo": ("OlmoForCausalLM", {**KV}),
    "olmo2": ("Olmo2ForCausalLM", {**KV}),
    "olmo3": ("Olmo3ForCausalLM", {**KV, "num_hidden_layers": 4, "sliding_window": 6}),
    "granite": ("GraniteForCausalLM", {**KV, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "cohere": ("CohereForCausalLM", {**KV, "use_qk_norm": True}),
    "cohere2": ("Cohere2ForCausalLM", {**KV, "num_hidden_layers": 4, "sliding_window": 6}),
    "falcon": ("FalconForCausalLM", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": ("FalconForCausalLM", {**SIZES, "alibi": True, "bias": True, "multi_query": False}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 41, "n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 32, "bos_token_id": 1,
         "eos_token_id": 2},
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"vocab_size": 41, "hidden_size": 24, "num_heads": 4, "num_layers": 2, "max_position_embeddings": 32,
         "attention_types": [[["global", "local"], 1]], "window_size": 6, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", {**SIZES, "num_attention_heads": 3, "rotary_pct": 0.5}),
    "gptj": (
        "GPTJForCausalLM",
        {"vocab_size": 41, "n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 32, "rotary_dim": 4,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": ("OPTForCausalLM", {**SIZES, "ffn_dim": 28, "word_embed_proj_dim": 24}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 41, "hidden_size": 24, "n_head": 4, "n_layer": 2}),
    "mpt": (
        "MptForCausalLM",
        {"vocab_size": 41, "d_model": 24, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0},
    ),
    "stablelm": (
        "StableLmForCausalLM",
        {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 1, "partial_rotary_factor": 0.5,
         "qk_layernorm": True, "use_qkv_bias": True},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", {**KV, "sliding_window": 6}),
    "smollm3": ("SmolLM3ForCausalLM", {**KV}),
    "nemotron": ("NemotronForCausalLM", {**KV, "head_dim": 8}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {**FREE, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**SIZES, "num_key_value_heads": 4, "moe_intermediate_size": 14, "n_routed_experts": 6, "n_group": 2,
         "topk_group": 2, "num_experts_per_tok": 3, "kv_lora_rank": 9, "q_lora_rank": 11, "qk_nope_head_dim": 5,
         "qk_rope_head_dim": 4, "v_head_dim": 7, "first_k_dense_replace": 1},
    ),
    "glm4": ("Glm4ForCausalLM", {**FREE, "head_dim": 12}),
    "bert": ("BertForMaskedLM", ENCODER),
    "bert-base": ("BertModel", ENCODER),
    "bert-tokens": ("BertForTokenClassification", {**ENCODER, "num_labels": 3}),
    "bert-qa": ("BertForQuestionAnswering", ENCODER),
    "roberta": ("RobertaForMaskedLM", {**ENCODER, "max_position_embeddings": 35, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 41, "dim": 24, "hidden_dim": 28, "n_heads": 4, "n_layers": 2, "max_position_embeddings": 32},
    ),
    "electra": ("ElectraForPreTraining", {**ENCODER, "embedding_size": 15}),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**SIZES, "num_hidden_layers": 4, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        {**ENCODER, "relative_attention": True, "position_buckets": 6, "pos_att_type": ["p2c", "c2p"],
         "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    ),
    "vit": ("ViTForImageClassification", {**IMAGE, "num_labels": 3}),
    "vit-base": ("ViTModel", {**IMAGE, "pooler_output_size": 22}),
    "deit": ("DeiTForImageClassificationWithTeacher", {**IMAGE, "num_labels": 3}),
    "dinov2": ("Dinov2Model", {**{k: v for k, v in IMAGE.items() if k != "intermediate_size"}, "mlp_ratio": 2}),
    "clip": ("CLIPModel", CLIP),
    "clip-text": ("CLIPTextModelWithProjection", TEXT),
    "clip-vision": ("CLIPVisionModel", IMAGE),
    "siglip": ("SiglipModel", SIGLIP),
    "whisper": (
        "WhisperForConditionalGeneration",
        {"vocab_size": 41, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
         "decoder_attention_heads": 3, "encoder_ffn_dim": 28, "decoder_ffn_dim": 26, "num_mel_bins": 7,
         "max_source_positions": 16, "max_target_positions": 22, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0, "decoder_start_token_id": 3, "suppress_tokens": [], "begin_suppress_tokens": []},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {"vocab_size": 41, "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
         "decoder_attention_heads": 3, "encoder_ffn_dim": 28, "decoder_ffn_dim": 26, "max_position_embeddings": 32,
         "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    ),
    "bart-classify": (
        "BartForSequenceClassification",
        {"vocab_size": 41, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 3, "encoder_ffn_dim": 28, "decoder_ffn_dim": 26, "max_position_embeddings": 32,
         "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "num_labels": 3},
    ),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-encoder": ("T5EncoderModel", {**T5, "feed_forward_proj": "gated-gelu"}),
    "umt5": ("UMT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of that name, every parameter random."""
    kind, fields = MODELS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(7)
    config = cls.config_class(**fields)
    if name == "gpt_oss":
        config._experts_implementation = "eager"
    model = cls._from_config(config, dtype=dtype)
    for parameter in model.parameters():
        gain = parameter.dim() == 1
        parameter.data.normal_(mean=0.6 if gain else 0.02, std=0.3)
    for key, buffer in model.named_buffers():
        if buffer.is_floating_point() and key in model.state_dict():
            buffer.normal_(std=0.3)
    return model.eval()


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Save it; `fields` change what its config.json says afterwards."""
    build(name, dtype).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder
