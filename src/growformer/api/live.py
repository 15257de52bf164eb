"""grow: a model that is being trained, with its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from growformer.api.models import expand
from growformer.api.planned import plan
from growformer.errors import RequestError
from growformer.training.growable import require_live, stock

if TYPE_CHECKING:
    import torch
    import transformers

    from growformer.optim.tables import Pace
    from growformer.planning import Plan

ModelT = TypeVar("ModelT", bound="torch.nn.Module")
OptimizerT = TypeVar("OptimizerT", bound="torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None")


def grow(
    model: ModelT,
    optimizer: OptimizerT = None,  # type: ignore[assignment]
    *expansions: Any,
    warmup: int = 0,
    freeze_old: bool = False,
    keep_dynamics: bool = False,
    fade: int | None = None,
    closure: Callable[..., torch.Tensor] | None = None,
    steps: int = 100,
    learning_rate: float = 1e-3,
    averages: Sequence[torch.nn.Module] = (),
    shard: Callable[[Any], Any] | None = None,
    **request: Any,
) -> tuple[ModelT, OptimizerT]:
    """Grow a model in the middle of its training, without changing what it computes.

    The objects stay the same: modules, parameters, config, hooks, the optimizer with its groups, and schedulers go on.
    Moments follow the weights, new entries start with none and at an age of their own. If anything fails, all is as it
    was.

    Args:
        model: a stock Hugging Face model, compiled or not, between two steps: no gradients, no pending backward pass.
            One with LoRA adapters of PEFT grows in the rank of an adapter: `r`, `rank_pattern`, `adapter_name`.
        optimizer: over its parameters, or a list of several that share them (Muon's and AdamW's); of classes with a
            state rule (`growformer.optim`). None: the model alone.
        expansions: see `plan`.
        warmup: steps over which the learning rate of new entries rises linearly from 0.
        freeze_old: old entries are held as they are; `growformer.optim.rates_of(optimizer).thaw()` ends it.
        keep_dynamics: a tensor that is multiplied by s learns at a rate under which it moves as before, times s.
        fade: for methods that fade new entries in (`msg`, `gated`): the steps over which they do. 0: they stay zero,
            for `growformer.training.line_search` or to learn from there.
        closure: for methods that ask a loss, which gives it with its graph, on batches of your choice. For `gradmax`:
            loss(), of the model. For `ligo`: loss(forward), where `forward` is called as the grown model would be.
            It is called before anything changes, and no gradient is left behind.
        steps, learning_rate: of Adam, for lifts that are learned (`ligo`). Moments follow the copies that a lift starts
            as.
        averages: copies of the model that follow it (an EMA's), which grow with it and get the same new entries.
        shard: for a model sharded under torch.distributed: the function that has sharded it (`fully_shard`,
            `parallelize_module`). It is called on the grown model, which is then a new object and returned; the small
            one is used up, the optimizer stays. All ranks call grow at once, with the same arguments.
        request: see `plan` (`method`, `seed`, `layers_at` and `ignore_fields` among them); and `allow_change=True`,
            for methods that make another function of the model.

    Returns:
        The model and the optimizer that were given; with `shard`, a new model.

    Raises:
        RequestError: as `plan`; or the model, the optimizer or the moment is none in which growth is possible, with
            what would make it so.
        SourceError: a parameter cannot grow in memory.
    """
    from growformer.checkpoint.skeleton import stock_skeleton
    from growformer.optim.fade import require_fade
    from growformer.optim.tables import Pace
    from growformer.training.adapters import adapted
    from growformer.training.live import grow_live

    pace = Pace(warmup=warmup, freeze_old=freeze_old, keep_dynamics=keep_dynamics, fade=fade or 0)
    if adapted(model):
        left = {"an expansion": expansions, "averages": averages, "shard": shard, "fade": fade, "closure": closure}
        _grow_rank(model, optimizer, pace, left, request)
        return model, optimizer
    if shard is not None:
        if averages:
            raise RequestError("averages of sharded models do not grow along: grow without them, and begin anew")
        from growformer.distributed import grow_sharded  # with torch.distributed, which takes its time to load

        def planned(bare: transformers.PreTrainedModel) -> Plan:
            made = live_plan(bare, *expansions, **request)
            require_fade(made, fade)
            if made.behind or made.learned:
                raise RequestError(f"{made.method}: the parameters are sharded, and it needs whole ones; paper works")
            return made

        return grow_sharded(model, optimizer, planned, shard, pace), optimizer
    inner = stock(model)
    copies = [stock(average) for average in averages]
    old = stock_skeleton(inner)  # before a plan meets tensors that it knows nothing of
    made = live_plan(inner, *expansions, **request)
    require_fade(made, fade)
    made.require_closure(closure is not None, "growformer.grow(..., closure=loss)")
    lifted = None
    if closure is not None and made.lifted:
        if averages:
            raise RequestError(f"{made.method}: the lift is learned for the model; averages begin anew from it")
        lifted = expand(inner, *expansions, closure=closure, steps=steps, learning_rate=learning_rate, **request)
        closure = None
    grow_live(inner, optimizer, made, old=old, pace=pace, averages=copies, closure=closure, values=lifted)
    return model, optimizer


def _grow_rank(
    model: torch.nn.Module, optimizer: Any, pace: Pace, left: dict[str, Any], request: dict[str, Any]
) -> None:
    """The growth of a model with adapters: that of an adapter's rank, and of nothing else."""
    from growformer.training.adapters import grow_adapter

    kind = type(model).__name__
    odd = [name for name in request if name not in ("r", "rank_pattern", "adapter_name", "seed")]
    odd += [name for name, value in left.items() if value]
    if odd:
        raise RequestError(
            f"{odd[0]}: {kind} has adapters of PEFT, and under them the base does not grow in memory. Their rank does: "
            f"r=16. Or merge_and_unload() them first; or grow base and adapter as saved folders (expand_checkpoint, "
            f"with follow= for the adapter)"
        )
    grow_adapter(model, optimizer, pace=pace, **request)


def live_plan(
    model: transformers.PreTrainedModel, *expansions: Any, allow_change: bool = False, **request: Any
) -> Plan:
    """The plan of a growth that live modules can follow.

    Raises:
        RequestError: as `plan`; some new entries could never learn, or the grown model's modules are of other classes.
    """
    made = plan(model, *expansions, **request)
    require_live(made, model, change=allow_change)
    return made


def new_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Which entries of a model's parameters the last growth made.

    Args:
        model: that `grow` or `expand` has grown.

    Returns:
        By parameter name, a bool tensor of its shape, on its device; True throughout where the parameter is new as a
        whole. Parameters without a new entry are left out.

    Raises:
        RequestError: the model has not been grown.
    """
    from growformer.checkpoint.layout import layout_of
    from growformer.optim.carry import new_entries

    inner = stock(model)
    made = getattr(inner, "growformer_plan", None)
    if made is None:
        raise RequestError("the model has not been grown: growformer.grow(model, ...) or growformer.expand(model, ...)")
    layout = layout_of(inner)
    found = new_entries(made, layout)
    masks = {name: found[name] for name, _ in inner.named_parameters()}
    return {name: mask.to(inner.device) for name, mask in masks.items() if bool(mask.any())}
