"""expand_convnet: Net2Net for convolutional nets in memory, ours and ResNet of transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from growformer.api.planned import method_named
from growformer.errors import RequestError
from growformer.families.convnet import CONVNET
from growformer.families.resnet import RESNET
from growformer.planning import Plan, apply
from growformer.planning.conv_growth import Stage, Trunk, plan_trunk

if TYPE_CHECKING:
    import torch

__all__ = ["expand_convnet", "plan_convnet"]

REDUCTION = 4
"""What a bottleneck layer of transformers' ResNet divides its stage's channels by; it stands in the code."""


def plan_convnet(
    model: torch.nn.Module,
    *,
    method: str = "net2net",
    seed: int = 0,
    layers_at: Mapping[str, Sequence[int]] | None = None,
    **request: Any,
) -> Plan:
    """What growing a convolutional net would do, tensor by tensor.

    Args:
        model: a `growformer.models.ConvNet`, or transformers' ResNetForImageClassification or ResNetModel.
        method: the way of growing, by name; all channels grow by its way for mlp, layers by its way for layer.
        seed: of the draws.
        layers_at: places of new layers in the grown net, by "link" (of the chain) or "stage 0", "stage 1", ...
        request: sizes by the names of the config: `chain` and `stages` of ours; `embedding_size`, `hidden_sizes` and
            `depths` of ResNet.

    Raises:
        RequestError: a size that is smaller, of the wrong kind, or that the net or the method cannot have.
        PatternError: where config and tensors do not belong together.
    """
    ours = type(model).__name__ in CONVNET.architectures
    if not ours and type(model).__name__ not in RESNET.architectures:
        known = ", ".join((*CONVNET.architectures, *RESNET.architectures))
        raise RequestError(f"{type(model).__name__} is no convolutional net that grows here; {known} are")
    family, trunk = (CONVNET, _chained) if ours else (RESNET, _staged)
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    family = family.of(config)
    fields = ("chain", "stages") if ours else ("embedding_size", "hidden_sizes", "depths")
    if unknown := set(request) - set(fields):
        raise RequestError(f"{', '.join(sorted(unknown))}: {family.name} grows by {', '.join(fields)}")
    grown = {**config, **{name: _plain(value) for name, value in request.items()}}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    trunks = trunk(config), trunk(grown)
    asked = {name: grown[name] for name in request}
    return plan_trunk(family, method_named(method), (config, grown), trunks, shapes, asked, seed, layers_at)


def expand_convnet(
    model: torch.nn.Module, *, allow_dead: bool = False, allow_change: bool = False, **request: Any
) -> torch.nn.Module:
    """A larger net that computes the same function in eval mode; the source is left as it is.

    Args:
        model: see `plan_convnet`, as all else.
        allow_dead: go on where new channels can never learn (written with zeros under a ReLU, say).
        allow_change: go on where the function changes.

    Returns:
        A net of the same class, in the same dtype, on the same device and in the same mode.

    Raises:
        RequestError: as `plan_convnet`; or new channels could never learn, or the function changes, and nobody asked.
    """
    import torch

    plan = plan_convnet(model, **request)
    say = ("allow_dead=True goes on all the same", "allow_change=True goes on all the same")
    plan.require_allowed(dead=allow_dead, change=allow_change, say=say)
    state = apply(plan, {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    like = next(model.parameters())
    with torch.device("meta"):  # its own draws would be thrown away
        grown = type(model)(_config(model, plan))
    grown.load_state_dict(state, assign=True)
    return grown.to(like.device).train(model.training)


def _config(model: torch.nn.Module, plan: Plan) -> Any:
    config: Any = model.config
    if type(model).__name__ in CONVNET.architectures:
        return type(config).from_dict(plan.target_config)
    config = copy.deepcopy(config)
    for name in plan.request:
        setattr(config, name, plan.target_config[name])
    return config


def _plain(value: Any) -> Any:
    """A size, or sizes, as config files hold them."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return {"channels": value.channels, "inner": list(value.inner)} if hasattr(value, "inner") else value


def _chained(config: Mapping[str, Any]) -> Trunk:
    """The sizes of our net."""
    stages = tuple(
        Stage(_size("channels", stage["channels"]), tuple((n,) for n in _sizes("inner", stage["inner"])))
        for stage in config["stages"]
    )
    return Trunk(config["colors"], _sizes("chain", config["chain"]), stages)


def _staged(config: Mapping[str, Any]) -> Trunk:
    """The sizes of transformers' ResNet. A shortcut has a convolution where channels or the image's size change."""
    stem = _size("embedding_size", config["embedding_size"])
    sizes, depths = _sizes("hidden_sizes", config["hidden_sizes"]), _sizes("depths", config["depths"])
    if len(sizes) != len(depths):
        raise RequestError(f"hidden_sizes has {len(sizes)} entries, depths {len(depths)}; one for each stage")
    bottleneck = config["layer_type"] == "bottleneck"
    stages = []
    for channels, depth in zip(sizes, depths, strict=True):
        inner = (channels // REDUCTION,) * 2 if bottleneck else (channels,)
        stages.append(Stage(channels, (inner,) * depth))
    bridged = stem != sizes[0] or bool(config["downsample_in_first_stage"])
    return Trunk(config["num_channels"], (stem,), tuple(stages), bridged, config["hidden_act"] == "relu")


def _size(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{name}={value!r}: a size is a whole number, 1 or more")
    return value


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise RequestError(f"{name}={value!r}: it lists a size for each stage or layer")
    return tuple(_size(name, each) for each in value)
