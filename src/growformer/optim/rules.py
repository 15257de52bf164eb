"""State rules: what each optimizer keeps beside a parameter, as data, so that it can come along through a growth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from growformer.errors import RequestError

Decay = Literal["decoupled", "coupled", "decoupled_weight_decay", "joint"]
"""Where weight decay acts: on the weight; in the gradient; on either, as the group's field of that name says; or on the
weight, but at a rate that only the optimizer knows."""


@dataclass(frozen=True)
class StateRule:
    """What an optimizer class keeps beside each parameter.

    Attributes:
        moments: for each key whose tensor has the parameter's shape, the power of the gradient it scales with: 1 for a
            mean of gradients, 2 for a mean of squares, 0 for what has no unit and is only moved.
        counts: keys that are one number for the whole parameter, and are kept; the first is its count of steps.
        factored: pairs of keys (rows, columns) that hold a second moment's means over the last and the last but one
            dim.
        start: for keys of `moments`, the group's field that holds the value with which entries start; others start
            at 0.
        eager: the optimizer makes its state when it takes a parameter, not at the first step.
        update: the name of the formula of its update (see `updates`), for optimizers with bias correction.
        decay: where weight decay acts.
        dynamics: the power of s in the rate under which a weight multiplied by s moves as before (1 where updates have
            no unit, 2 where they are gradients); None: no rate does that.
    """

    moments: Mapping[str, int]
    counts: tuple[str, ...] = ("step",)
    factored: tuple[tuple[str, str], ...] = ()
    start: Mapping[str, str] = field(default_factory=dict)
    eager: bool = False
    update: str = ""
    decay: Decay = "coupled"
    dynamics: int | None = None

    @property
    def keys(self) -> set[str]:
        return {*self.moments, *self.counts, *(key for pair in self.factored for key in pair)}

    def decay_of(self, group: Mapping[str, Any]) -> Decay:
        """Where a group's weight decay acts: decoupled, coupled or joint."""
        if self.decay != "decoupled_weight_decay":
            return self.decay
        return "decoupled" if group.get(self.decay) else "coupled"


_ADAM: dict[str, int] = {"exp_avg": 1, "exp_avg_sq": 2}

RULES: dict[str, StateRule] = {
    "torch.AdamW": StateRule(moments={**_ADAM, "max_exp_avg_sq": 2}, update="adam", decay="decoupled", dynamics=1),
    "torch.Adam": StateRule(
        moments={**_ADAM, "max_exp_avg_sq": 2}, update="adam", decay="decoupled_weight_decay", dynamics=1
    ),
    "torch.NAdam": StateRule(
        moments=_ADAM, counts=("step", "mu_product"), update="nadam", decay="decoupled_weight_decay"
    ),
    "torch.RAdam": StateRule(moments=_ADAM, update="radam", decay="decoupled_weight_decay"),
    # exp_inf is a running maximum of |g|, not of its square.
    "torch.Adamax": StateRule(moments={"exp_avg": 1, "exp_inf": 1}, update="adamax"),
    "torch.SGD": StateRule(moments={"momentum_buffer": 1}, counts=(), dynamics=2),
    "torch.Adagrad": StateRule(moments={"sum": 2}, start={"sum": "initial_accumulator_value"}, eager=True),
    # The buffer holds gradients already divided by the root of square_avg.
    "torch.RMSprop": StateRule(moments={"square_avg": 2, "momentum_buffer": 0, "grad_avg": 1}),
    "torch.Adafactor": StateRule(moments={"variance": 2}, factored=(("row_var", "col_var"),), decay="decoupled"),
    "torch.Muon": StateRule(moments={"momentum_buffer": 1}, counts=(), decay="decoupled"),
    "transformers.Adafactor": StateRule(
        moments={"exp_avg_sq": 2, "exp_avg": 0},
        counts=("step", "RMS"),
        factored=(("exp_avg_sq_row", "exp_avg_sq_col"),),
        decay="joint",
    ),
}
"""By the class's package and name."""


def declare(cls: type, rule: StateRule) -> None:
    """Say what an optimizer class keeps beside each parameter.

    For an optimizer that differs from a known one in nothing that it keeps: `declare(MyAdamW, rule_of(AdamW))`.

    Args:
        cls: the class itself; what derives from it is declared by itself.
        rule: what it keeps.
    """
    RULES[_name(cls)] = rule


def rule_of(optimizer: Any) -> StateRule:
    """The rule of an optimizer, or of an optimizer class.

    Raises:
        RequestError: there is none.
    """
    cls = optimizer if isinstance(optimizer, type) else type(optimizer)
    if _name(cls) not in RULES:
        known = ", ".join(RULES)
        raise RequestError(
            f"what {_name(cls)} keeps beside each parameter is not declared; there are {known}. If all of its state "
            f"has the shape of its parameters: growformer.optim.declare({cls.__name__}, StateRule(moments={{key: power "
            f"of the gradient}})); or grow with optimizer=None and make a new optimizer"
        )
    return RULES[_name(cls)]


def _name(cls: type) -> str:
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}"
