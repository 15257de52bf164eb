"""A small convolutional net with every axis apart: a plain chain of layers, then residual stages, then a linear head.

The chain is what Net2Net (Chen et al., arXiv 1511.05641) was written for: each layer has a width of its own, and a new
one starts as the identity. The stages are those of a residual net (He et al., arXiv 1512.03385, with 3 x 3 kernels):
all blocks of a stage add to one stream of channels, and each block has an inner width of its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConvConfig", "ConvNet", "StageSize", "randomise_convnet"]


@dataclasses.dataclass(frozen=True)
class StageSize:
    """Sizes of one residual stage: the channels of its stream, and the inner width of each of its blocks."""

    channels: int
    inner: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", tuple(self.inner))
        _check("StageSize", self.channels, len(self.inner), *self.inner)


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """Sizes of a `ConvNet`.

    Attributes:
        colors: channels of an image.
        classes: of the head.
        chain: the width of each plain layer, one at least.
        stages: the residual stages after it; may be empty.
        eps: of every batch norm.

    Raises:
        ValueError: a size below 1, or an eps that is not positive.
    """

    colors: int
    classes: int
    chain: tuple[int, ...]
    stages: tuple[StageSize, ...] = ()
    eps: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "chain", tuple(self.chain))
        object.__setattr__(self, "stages", tuple(self.stages))
        _check("ConvConfig", self.colors, self.classes, len(self.chain), *self.chain)
        if not self.eps > 0:
            raise ValueError(f"ConvConfig: eps={self.eps!r}; it should be positive")

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data."""
        stages = [{"channels": stage.channels, "inner": list(stage.inner)} for stage in self.stages]
        return {**dataclasses.asdict(self), "chain": list(self.chain), "stages": stages}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote."""
        stages = tuple(StageSize(stage["channels"], tuple(stage["inner"])) for stage in data.get("stages", ()))
        return cls(**{**data, "stages": stages})


def _check(owner: str, *sizes: object) -> None:
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{owner}: found a size of {size!r}; sizes are whole numbers, 1 or more")


class ConvNorm(nn.Module):
    """A convolution without bias, and the batch norm of each channel that it writes."""

    def __init__(self, reads: int, writes: int, kernel: int, stride: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(reads, writes, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(writes, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Block(nn.Module):
    """relu(x' + b(relu(a(x)))), where x' is x or, in a stage's first block, x in the stage's channels and size."""

    def __init__(self, reads: int, inner: int, channels: int, first: bool, eps: float) -> None:
        super().__init__()
        stride = 2 if first else 1
        self.a = ConvNorm(reads, inner, 3, stride, eps)
        self.b = ConvNorm(inner, channels, 3, 1, eps)
        self.shortcut = ConvNorm(reads, channels, 1, stride, eps) if first else None

    def forward(self, x: Tensor) -> Tensor:
        passed = x if self.shortcut is None else self.shortcut(x)
        return F.relu(passed + self.b(F.relu(self.a(x))))


class ConvNet(nn.Module):
    """Logits [batch, classes] of images [batch, colors, height, width]."""

    def __init__(self, config: ConvConfig, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.config = config
        reads = config.colors
        self.chain = nn.ModuleList()
        for width in config.chain:
            self.chain.append(ConvNorm(reads, width, 3, 1, config.eps))
            reads = width
        self.stages = nn.ModuleList()
        for stage in config.stages:
            blocks = nn.ModuleList()
            for place, inner in enumerate(stage.inner):
                blocks.append(Block(reads, inner, stage.channels, place == 0, config.eps))
                reads = stage.channels
            self.stages.append(blocks)
        self.head = nn.Linear(reads, config.classes)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.chain:
            x = F.relu(layer(x))
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        return self.head(x.mean(dim=(-2, -1)))


@torch.no_grad()
def randomise_convnet(model: nn.Module, seed: int) -> nn.Module:
    """Fill a net's convolutions, batch norms, statistics and linear maps so that none is at its default; return it.

    Gains are uniform in [0.5, 1.5) and so are variances; shifts and means are normal with std 0.3; weights normal with
    std 1/sqrt(what they read). Drawn in float64 on the CPU, so a seed means the same in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(x: Tensor, std: float) -> None:
        x.copy_(torch.empty(x.shape, dtype=torch.float64, device="cpu").normal_(std=std, generator=generator))

    def positive(x: Tensor) -> None:
        x.copy_(torch.empty(x.shape, dtype=torch.float64, device="cpu").uniform_(0.5, 1.5, generator=generator))

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            positive(module.weight)
            positive(module.running_var)
            normal(module.bias, 0.3)
            normal(module.running_mean, 0.3)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            normal(module.weight, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                normal(module.bias, 0.3)
    return model
