"""TokenFormer (arXiv 2410.23168): a decoder in which every linear map is attention to parameter tokens.

The paper's Pattention puts n learned tokens, each a key and a value, in the place of a weight:

    Pattention(X, K_P, V_P) = GeLU(S) V_P,    S_ij = τ A_ij / sqrt(sum_k A_ik² + eps),    A = X K_P^T

A token whose key is zero adds nothing to any sum, and GeLU(0) = 0: zero keys with any values leave the function as it
is. That holds only while τ stays. The paper sets τ = sqrt(n); here it is a number of config.json, sqrt(n) when the
config is made without one, and a growth of n leaves it alone.

The rest is transformers' Llama (RMSNorm, rotary positions, grouped queries), whose linear maps inside the layers are
exchanged. Importing this module makes `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know model_type tokenformer.

Axes: h hidden, n tokens of a group, in and out whatever the map reads and writes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

__all__ = ["Pattention", "TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerModel"]


@strict
class TokenFormerConfig(PreTrainedConfig):
    """Sizes of a TokenFormer.

    Attributes:
        qkv_tokens: parameter tokens of each of a layer's query, key and value maps.
        proj_tokens: those of its output map.
        ffn_tokens: those of its feed-forward part.
        qkv_tau, proj_tau, ffn_tau: τ of each group, the length that a vector of scores is given. None: the square root
            of the number of tokens, filled in here once and stored from then on.
        pattention_eps: added to the sum of squares of the scores.
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  a strict dataclass: no annotation, no field

    vocab_size: int = 32000
    hidden_size: int = 768
    qkv_tokens: int = 768
    proj_tokens: int = 768
    ffn_tokens: int = 3072
    qkv_tau: float | None = None
    proj_tau: float | None = None
    ffn_tau: float | None = None
    pattention_eps: float = 1e-6
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        for group in ("qkv", "proj", "ffn"):
            if getattr(self, f"{group}_tau") is None:
                setattr(self, f"{group}_tau", math.sqrt(getattr(self, f"{group}_tokens")))
        super().__post_init__(**kwargs)


class Pattention(nn.Module):
    """Attention from an input to n parameter tokens; it stands where a linear map from `reads` to `writes` would.

    Attributes:
        keys: [n, in]
        values: [n, out]
    """

    def __init__(self, tokens: int, reads: int, writes: int, tau: float, eps: float) -> None:
        super().__init__()
        self.tau, self.eps = tau, eps
        self.keys = nn.Parameter(torch.empty(tokens, reads))
        self.values = nn.Parameter(torch.empty(tokens, writes))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        scores = F.linear(x, self.keys).float()  # squares are summed in float32, as in transformers' norms
        scores = scores * (self.tau * torch.rsqrt(scores.square().sum(-1, keepdim=True) + self.eps))
        return F.gelu(scores).to(x.dtype) @ self.values

    def extra_repr(self) -> str:
        n, reads = self.keys.shape
        return f"tokens={n}, reads={reads}, writes={self.values.shape[1]}, tau={self.tau:g}, eps={self.eps:g}"


class TokenFormerAttention(LlamaAttention):
    """Llama's attention between positions, whose four maps attend to parameter tokens."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.layer_idx = layer_idx
        assert config.head_dim is not None and config.num_key_value_heads is not None
        assert config.qkv_tau is not None and config.proj_tau is not None
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        h, q = config.hidden_size, config.num_attention_heads * self.head_dim
        kv = config.num_key_value_heads * self.head_dim
        inner = (config.qkv_tau, config.pattention_eps)
        self.q_proj = Pattention(config.qkv_tokens, h, q, *inner)
        self.k_proj = Pattention(config.qkv_tokens, h, kv, *inner)
        self.v_proj = Pattention(config.qkv_tokens, h, kv, *inner)
        self.o_proj = Pattention(config.proj_tokens, q, h, config.proj_tau, config.pattention_eps)


class TokenFormerLayer(LlamaDecoderLayer):
    """x + attention(norm(x)), then x + Pattention(norm(x)): the feed-forward part is one map."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        GradientCheckpointingLayer.__init__(self)
        h = config.hidden_size
        assert config.ffn_tau is not None
        self.hidden_size = h
        self.self_attn = TokenFormerAttention(config, layer_idx)
        self.mlp = Pattention(config.ffn_tokens, h, h, config.ffn_tau, config.pattention_eps)
        self.input_layernorm = LlamaRMSNorm(h, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(h, eps=config.rms_norm_eps)


class TokenFormerPreTrainedModel(LlamaPreTrainedModel):
    """What both models share."""

    config_class = TokenFormerConfig
    _no_split_modules = ["TokenFormerLayer"]  # noqa: RUF012  transformers' own form
    _can_record_outputs = {"hidden_states": TokenFormerLayer, "attentions": TokenFormerAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Pattention):
            init.normal_(module.keys, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.values, mean=0.0, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class TokenFormerModel(TokenFormerPreTrainedModel, LlamaModel):
    """The decoder without a head; `forward` is Llama's."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(TokenFormerLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, LlamaForCausalLM):
    """The decoder with a head over the vocabulary; `forward` and `generate` are Llama's."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = TokenFormerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("tokenformer", TokenFormerConfig, exist_ok=True)
AutoModel.register(TokenFormerConfig, TokenFormerModel, exist_ok=True)
AutoModelForCausalLM.register(TokenFormerConfig, TokenFormerForCausalLM, exist_ok=True)
