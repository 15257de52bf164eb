"""expand: a model in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from growformer.api.planned import on_disk, plan
from growformer.errors import SourceError
from growformer.planning import apply
from growformer.planning.plan import ALLOWED

if TYPE_CHECKING:
    import torch
    import transformers


def expand(
    model: transformers.PreTrainedModel,
    *expansions: Any,
    allow_change: bool = False,
    closure: Callable[..., torch.Tensor] | None = None,
    steps: int = 100,
    learning_rate: float = 1e-3,
    **request: Any,
) -> transformers.PreTrainedModel:
    """A larger model that computes the same function, in memory; the source is left as it is.

    Args:
        model: a stock Hugging Face model.
        expansions: see `plan`.
        allow_change: go on where the method makes another function of it.
        closure: for methods that ask a loss, which gives it with its graph, on batches of your choice. For `gradmax`:
            loss(), of the source. For `ligo`: loss(forward), where `forward` is called as the grown model would be.
        steps, learning_rate: of Adam, for lifts that are learned (`ligo`).
        request: see `plan`.

    Returns:
        A new stock model of the same class, or of that of the family that was asked for, in the same dtype, on the same
        device and in the same mode.

    Raises:
        RequestError: as `plan`.
    """
    from growformer.checkpoint.layout import layout_of, shared_names
    from growformer.optim.carry import Carry
    from growformer.optim.fade import behind
    from growformer.training.gradmax import fill_readers
    from growformer.training.ligo import Lifts, learn

    made = plan(model, *expansions, **request)
    made.require_allowed(dead=False, change=allow_change, say=ALLOWED)
    made.require_closure(closure is not None, "growformer.expand(..., closure=loss)")
    state = apply(made, {name: x.detach().cpu() for name, x in on_disk(model).items()})
    if closure is not None and not made.lifted:
        fill_readers(model, made, layout_of(model), [state.__getitem__], closure)
    config, cls = type(model.config).from_dict(dict(made.target_config)), type(model)
    if made.source_family:
        from growformer.checkpoint.stock import stock_class
        from growformer.proof.float64 import stock_config

        config = stock_config(made.target_config)
        cls = stock_class(config)
    grown = loaded(cls, config, state, model).to(model.device)
    grown.growformer_plan = made
    if closure is not None and made.lifted:
        lifts = Lifts(made, layout_of(grown), {name: x.detach() for name, x in on_disk(model).items()})
        learn(lifts, grown.train(model.training), closure, steps, learning_rate)
    if made.behind:
        held = shared_names(model)[0]
        grown.growformer_behind = behind(Carry(made, layout_of(model), layout_of(grown)), lambda name: held[name])
    return grown.train(model.training)


def loaded(
    cls: type[transformers.PreTrainedModel],
    config: transformers.PreTrainedConfig,
    state: Mapping[str, torch.Tensor],
    like: transformers.PreTrainedModel,
) -> transformers.PreTrainedModel:
    """A stock model with these tensors, on the CPU.

    Args:
        cls, config: its class and config.
        state: every tensor by its name on disk.
        like: whose dtype and kind of attention it has.

    Raises:
        SourceError: the tensors are not those of the class.
    """
    model, report = cls.from_pretrained(
        None,
        config=config,
        state_dict=dict(state),
        dtype=like.dtype,
        attn_implementation=like.config._attn_implementation,
        output_loading_info=True,
    )
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    if wrong:
        raise SourceError(f"the grown tensors do not fit {cls.__name__}: {', '.join(map(str, wrong[:4]))}")
    return model
