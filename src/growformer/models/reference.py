"""The Transformer of the paper, as its equations 1 to 5 state it (Gesmundo & Maile, arXiv 2308.06103, section 2).

It exists to be read and to be grown. The paper's letters and the axis names used here:

    s positions    h hidden    N layers    p mlp    E heads    k key    v value    o vocab

Every layer has its own mlp size and its own heads, and every head its own key and value sizes, for the paper grows
each of them alone. Where real models depart from the paper (eps in the norms, a final norm, a causal mask, other
activations, a tied head) a switch says so; every switch is off, as in the paper, unless it is turned on.

Tensors multiply from the right (x @ w), so a weight's shape is [what it reads, what it writes].
"""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HeadSize", "LayerSize", "ReferenceConfig", "ReferenceTransformer", "randomise"]


def _check_sizes(owner: str, **sizes: object) -> None:
    for axis, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{owner}: {axis}={size!r}; an axis needs a whole number of channels, 1 or more")


@dataclasses.dataclass(frozen=True)
class HeadSize:
    """Sizes of one attention head: k and v of equation 4."""

    key: int
    value: int

    def __post_init__(self) -> None:
        _check_sizes("HeadSize", key=self.key, value=self.value)


@dataclasses.dataclass(frozen=True)
class LayerSize:
    """Sizes of one layer: p of equation 3, and one `HeadSize` per head of equation 4."""

    mlp: int
    heads: tuple[HeadSize, ...]

    def __post_init__(self) -> None:
        _check_sizes("LayerSize", mlp=self.mlp, heads=len(self.heads))


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """Sizes and switches of a `ReferenceTransformer`.

    Attributes:
        vocab: o, the number of tokens; also the number of embeddings.
        positions: s, the longest sequence.
        hidden: h, the channels of the residual stream.
        layers: one `LayerSize` per layer; may be empty.
        eps: Added to the mean square inside every norm. The paper has none; a `Fraction` stays exact when rescaled.
        final_norm: Norm the stream once more before the output projection.
        causal: A position attends to itself and to earlier positions only.
        activation: "relu" as in equation 3, "gelu" (exact, by erf), or "swiglu" (a second, gating input matrix).
        tied: The output projection is the transposed embedding.

    Raises:
        ValueError: A size below 1, a negative eps, or an unknown activation.
    """

    vocab: int
    positions: int
    hidden: int
    layers: tuple[LayerSize, ...]
    eps: float | Fraction = 0.0
    final_norm: bool = False
    causal: bool = False
    activation: str = "relu"
    tied: bool = False

    def __post_init__(self) -> None:
        _check_sizes("ReferenceConfig", vocab=self.vocab, positions=self.positions, hidden=self.hidden)
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"ReferenceConfig: eps={self.eps!r}; eps must be zero (the paper) or positive, and finite")
        if self.activation not in (known := ("relu", "gelu", "swiglu")):
            raise ValueError(f"ReferenceConfig: activation={self.activation!r}; known: {', '.join(known)}")

    @classmethod
    def uniform(
        cls,
        vocab: int,
        positions: int,
        hidden: int,
        layers: int,
        heads: int,
        key: int,
        value: int,
        mlp: int,
        **switches: Any,
    ) -> Self:
        """Make a config whose layers, and whose heads, are all of one size; `switches` are the fields with defaults."""
        layer = LayerSize(mlp, (HeadSize(key, value),) * heads)
        return cls(vocab, positions, hidden, (layer,) * layers, **switches)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain data that JSON keeps whole; a `Fraction` eps becomes the text "n/d"."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["eps"] = str(self.eps) if isinstance(self.eps, Fraction) else self.eps
        fields["layers"] = [{"mlp": n.mlp, "heads": [dataclasses.asdict(e) for e in n.heads]} for n in self.layers]
        return fields

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: A field that is unknown or missing, or whatever the constructor refuses.
        """
        known, needed = [field.name for field in dataclasses.fields(cls)], ["vocab", "positions", "hidden", "layers"]
        if not set(needed) <= set(data) <= set(known):
            raise ValueError(f"ReferenceConfig: got fields {list(data)}; needs {needed}, and knows {known}")
        layers = tuple(LayerSize(n["mlp"], tuple(HeadSize(**e) for e in n["heads"])) for n in data["layers"])
        eps = data.get("eps", 0.0)
        return cls(**{**data, "layers": layers, "eps": Fraction(eps) if isinstance(eps, str) else eps})


def _weight(reads: int, writes: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(reads, writes, dtype=dtype).normal_(std=0.02))


def _vector(size: int, start: float, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.full((size,), start, dtype=dtype))


def norm(x: Tensor, gain: Tensor, eps: float | Fraction) -> Tensor:
    """Equation 5, with the eps that the paper leaves out: x_ij g_j / sqrt(mean_j(x_ij²) + eps)."""
    return x * gain / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + float(eps))


class Head(nn.Module):
    """One attention head of equation 4, with its own rows of W_O (the split of equation 15)."""

    def __init__(self, config: ReferenceConfig, size: HeadSize, dtype: torch.dtype) -> None:
        super().__init__()
        self.causal = config.causal
        self.w_q = _weight(config.hidden, size.key, dtype)
        self.w_k = _weight(config.hidden, size.key, dtype)
        self.w_v = _weight(config.hidden, size.value, dtype)
        self.w_o = _weight(size.value, config.hidden, dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Equation 4: H_e = Softmax(Q K^T / sqrt(k)) V, with the k of this head; returned as H_e W_O,e.
        q, k, v = x @ self.w_q, x @ self.w_k, x @ self.w_v
        scores = q @ k.transpose(-2, -1) / self.w_k.shape[1] ** 0.5
        if self.causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(diagonal=1)
            scores = scores.masked_fill(future, float("-inf"))
        return F.softmax(scores, dim=-1) @ v @ self.w_o


class Layer(nn.Module):
    """One pre-norm layer: equation 2, around the MHA of equation 4 and the MLP of equation 3."""

    def __init__(self, config: ReferenceConfig, size: LayerSize, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.activation = config.eps, config.activation
        self.norm_mha = _vector(config.hidden, 1.0, dtype)
        self.heads = nn.ModuleList(Head(config, head, dtype) for head in size.heads)
        self.norm_mlp = _vector(config.hidden, 1.0, dtype)
        self.w1, self.b1 = _weight(config.hidden, size.mlp, dtype), _vector(size.mlp, 0.0, dtype)
        if config.activation == "swiglu":
            self.w_gate, self.b_gate = _weight(config.hidden, size.mlp, dtype), _vector(size.mlp, 0.0, dtype)
        self.w2, self.b2 = _weight(size.mlp, config.hidden, dtype), _vector(config.hidden, 0.0, dtype)

    def mha(self, x: Tensor) -> Tensor:
        # Equation 4: [H_1 ... H_E] W_O is the sum of the heads, each times its own rows of W_O.
        return torch.stack([head(x) for head in self.heads]).sum(dim=0)

    def mlp(self, x: Tensor) -> Tensor:
        # Equation 3: ReLU(X W1 + b1) W2 + b2.
        inner = x @ self.w1 + self.b1
        if self.activation == "relu":
            inner = F.relu(inner)
        elif self.activation == "gelu":
            inner = F.gelu(inner)
        else:
            inner = F.silu(x @ self.w_gate + self.b_gate) * inner
        return inner @ self.w2 + self.b2

    def forward(self, x: Tensor) -> Tensor:
        # Equation 2: I' = I + MHA(Norm(I)), then I' + MLP(Norm(I')).
        x = x + self.mha(norm(x, self.norm_mha, self.eps))
        return x + self.mlp(norm(x, self.norm_mlp, self.eps))


class ReferenceTransformer(nn.Module):
    """Equation 1: TransformerArchitecture(I) = TransformerLayer^N(I + P) W_out, with token embeddings as I.

    `dtype` is that of every parameter and of every step of the forward pass: nothing is cast on the way.
    """

    def __init__(self, config: ReferenceConfig, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.config = config
        self.embedding = _weight(config.vocab, config.hidden, dtype)
        self.positions = _weight(config.positions, config.hidden, dtype)
        self.layers = nn.ModuleList(Layer(config, size, dtype) for size in config.layers)
        self.norm_final = _vector(config.hidden, 1.0, dtype) if config.final_norm else None
        self.w_out = None if config.tied else _weight(config.hidden, config.vocab, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [batch, positions, vocab] for tokens [batch, positions] (integers below vocab).

        A sequence may be shorter than the positional table P, and then uses its first rows.

        Raises:
            ValueError: The sequence is longer than P.
        """
        length = tokens.shape[-1]
        if length > len(self.positions):
            raise ValueError(f"sequence of {length} tokens: the positional table serves at most {len(self.positions)}")
        x = F.embedding(tokens, self.embedding) + self.positions[:length]
        for layer in self.layers:
            x = layer(x)
        if self.norm_final is not None:
            x = norm(x, self.norm_final, self.config.eps)
        return x @ (self.embedding.T if self.w_out is None else self.w_out)


@torch.no_grad()
def randomise(model: ReferenceTransformer, seed: int) -> ReferenceTransformer:
    """Fill every parameter so that none is at its default and no term vanishes by accident; return the model.

    Gains are uniform in [0.5, 1.5), biases normal with std 0.5, weights normal with std 1/sqrt(what they read),
    embedding and positions normal with std 1. Drawn in float64 on the CPU, so a seed means the same in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        draw = torch.empty(parameter.shape, dtype=torch.float64, device="cpu")
        if leaf.startswith("norm"):
            draw.uniform_(0.5, 1.5, generator=generator)
        else:
            std = 0.5 if draw.dim() == 1 else 1.0 if leaf in ("embedding", "positions") else draw.shape[0] ** -0.5
            draw.normal_(std=std, generator=generator)
        parameter.copy_(draw)
    return model
