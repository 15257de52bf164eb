"""What the tests of convolutional nets share: sources, requests, and how far two nets are apart."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from growformer.api.convnets import plan_convnet
from growformer.models import ConvConfig, ConvNet, StageSize, randomise_convnet
from growformer.planning import Plan
from growformer.proof.float64 import require_float64, true_float64

IMAGES = torch.randn(4, 3, 18, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def resnet(layer_type: str, bare: bool = False, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
    """A stock ResNet of two stages, nothing in it at its default, in eval mode."""
    sizes = {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [2, 3], **fields}
    config = transformers.ResNetConfig(num_channels=3, layer_type=layer_type, num_labels=5, **sizes)
    model = (transformers.ResNetModel if bare else transformers.ResNetForImageClassification)(config)
    return randomise_convnet(model, 1).to(dtype).eval()


def convnet() -> nn.Module:
    """Our net: a chain of two, a stage of two blocks, a stage of three; in eval mode."""
    stages = (StageSize(8, (9, 10)), StageSize(11, (12, 13, 14)))
    return randomise_convnet(ConvNet(ConvConfig(3, 5, (6, 7), stages)), 1).eval()


def chain() -> nn.Module:
    """Our net without stages; in eval mode."""
    return randomise_convnet(ConvNet(ConvConfig(3, 5, (6, 7, 9))), 1).eval()


NETS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: resnet("basic"),
    "bottleneck": lambda: resnet("bottleneck"),
    "joined": lambda: resnet("basic", embedding_size=8),
    "convnet": convnet,
    "chain": chain,
}

_WIDE = {"hidden_sizes": [14, 24]}
_DEEP = {"depths": [4, 4]}
_STAGES = {"link": [1, 3], "stage 0": [1], "stage 1": [2, 4]}

REQUESTS: dict[str, dict[str, dict[str, Any]]] = {
    "basic": {
        "wider": {"embedding_size": 10, **_WIDE},
        "deeper": _DEEP,
        "both": {"embedding_size": 10, **_WIDE, **_DEEP},
    },
    "bottleneck": {
        "wider": {"embedding_size": 10, **_WIDE},
        "deeper": _DEEP,
        "both": {"embedding_size": 10, **_WIDE, **_DEEP},
    },
    # The first stage has no convolution in its shortcut: the stem's channels are the stage's.
    "joined": {
        "wider": {"embedding_size": 14, **_WIDE},
        "deeper": _DEEP,
        "both": {"embedding_size": 14, **_WIDE, **_DEEP},
    },
    "convnet": {
        "wider": {"chain": [8, 11], "stages": [StageSize(12, (13, 14)), StageSize(15, (18, 17, 16))]},
        "deeper": {
            "chain": [6, 6, 7, 7],
            "stages": [StageSize(8, (9, 20, 10)), StageSize(11, (12, 13, 5, 14, 6))],
            "layers_at": _STAGES,
        },
        "both": {
            "chain": [8, 8, 11, 11],
            "stages": [StageSize(12, (13, 20, 14)), StageSize(15, (18, 17, 6, 16, 7))],
            "layers_at": _STAGES,
        },
    },
    "chain": {
        "wider": {"chain": [8, 11, 13]},
        "deeper": {"chain": [6, 6, 7, 7, 9, 9]},
        "both": {"chain": [8, 8, 11, 13]},
    },
}
REQUESTS["chain"]["both"]["layers_at"] = {"link": [1]}


@torch.no_grad()
def logits(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    """What a net says of images, in true float64."""
    require_float64(model, "The net")
    with true_float64():
        out = model(images)
    return out if isinstance(out, Tensor) else out.logits if "logits" in out else out.pooler_output


def relative(a: Tensor, b: Tensor) -> float:
    """max|a-b| / max|a|."""
    return float((a - b).abs().max() / a.abs().max())


def apart(model: nn.Module, grown: nn.Module) -> float:
    return relative(logits(model), logits(grown))


def new_entries(plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """For each parameter of the grown net, where its entries are none of the source's, or come once more."""
    masks = {}
    parameters = dict(model.named_parameters())
    for tensor in plan.tensors:
        if tensor.name not in parameters:
            continue
        mask = torch.zeros(tensor.shape, dtype=torch.bool)
        seen: set[tuple[int, ...]] = set()
        for block in tensor.blocks():
            box = tuple(slice(at, at + size) for at, size in zip(block.start, block.shape, strict=True))
            mask[box] = block.source is None or block.source in seen
            seen |= {block.source} if block.source is not None else set()
        masks[tensor.name] = mask
    return masks


def planned(net: str, request: str, method: str) -> Plan:
    return plan_convnet(NETS[net](), method=method, seed=3, **REQUESTS[net][request])
