"""Tiny random checkpoints: different sizes, random gains, biases and norms, so that nothing vanishes by accident."""

from pathlib import Path
from typing import Any

LLAMA = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 37,
    "n_embd": 24,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**LLAMA, "tie_word_embeddings": False}),
    "llama-tied-bias": ("llama", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-mqa": ("llama", {**LLAMA, "num_key_value_heads": 1, "attention_bias": True}),
    "qwen3": ("qwen3", {**LLAMA, "tie_word_embeddings": False, "attention_bias": True}),
    "qwen3-tied": ("qwen3", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
}


def build(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny stock model with every parameter random; gains around 1, so that none is at its default.

    A kind that is not in CONFIGS is a model type with Llama's fields.
    """
    import torch
    import transformers

    model_type, fields = CONFIGS.get(kind, (kind, LLAMA))
    config = transformers.AutoConfig.for_model(model_type, **{**fields, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.3 * drawn if gain else 0.3 * drawn)
    return model.eval()


def save(folder: Path, kind: str, seed: int = 0, dtype: str | None = None, **changes: Any) -> Path:
    """The same as a folder."""
    import torch

    model = build(kind, seed, **changes)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder
