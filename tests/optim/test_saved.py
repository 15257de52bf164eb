"""Which optimizer a saved state is of."""

from typing import Any

import pytest
import torch
import transformers

from growformer.errors import RequestError
from growformer.optim.rules import RULES
from growformer.optim.saved import rule_of_saved

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "torch.SGD": [{"momentum": 0.9}, {}],
    "torch.AdamW": [{}, {"amsgrad": True}, {"fused": True}],
    "torch.RMSprop": [{}, {"momentum": 0.9, "centered": True}],
    "transformers.Adafactor": [{"relative_step": False, "beta1": 0.9}, {"relative_step": False}],
}
PACKAGES = {"torch": torch.optim, "transformers": transformers}


def saved(name: str, **options: Any) -> dict[str, Any]:
    """The state of an optimizer that has taken a step, with what a schedule leaves in it."""
    package, _, cls = name.partition(".")
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    made = getattr(PACKAGES[package], cls)([parameter], lr=0.1, **options)
    torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1.0)
    parameter.grad = torch.ones(3, 4)
    made.step()
    state: dict[str, Any] = made.state_dict()
    return state


@pytest.mark.parametrize("name", RULES)
def test_every_declared_class_is_known_by_what_it_saves(name: str) -> None:
    for options in OPTIONS.get(name, [{}]):
        found, rule = rule_of_saved(saved(name, **options))
        # Adam and AdamW save the same keys, and grow alike.
        assert found == ("torch.AdamW" if name == "torch.Adam" else name)
        assert rule.moments == RULES[name].moments and rule.counts == RULES[name].counts


def test_others_are_refused() -> None:
    state = saved("torch.AdamW")
    odd = state | {"state": {0: {**state["state"][0], "shadow": torch.ones(3, 4)}}}
    more = state | {"param_groups": [state["param_groups"][0] | {"trust": 1.0}]}
    for wrong in (odd, more):
        with pytest.raises(RequestError, match=r"no declared optimizer; there are torch\.AdamW"):
            rule_of_saved(wrong)
