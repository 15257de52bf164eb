"""Positions that the code computes stand on the stream channel by channel: its channels have an order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from growformer.api.checks.order import Orders, differences
from growformer.api.checks.samples import save_tiny
from growformer.checkpoint import read_config
from growformer.checkpoint.stock import full_config
from growformer.families import FAMILIES
from growformer.proof import claim_runtime
from growformer.proof.bar import BAR
from tests.drafts.sampled import drafted


def test_channels_with_an_order_are_left_in_it(tmp_path: Path) -> None:
    family = drafted("xglm")
    (frozen,) = family.frozen
    assert frozen.axes == ("hidden",) and frozen.ordered
    folder = save_tiny(family, "XGLMForCausalLM", tmp_path / "source")
    full = full_config(read_config(folder))[0]
    orders = Orders(family.of(full), folder)
    assert "order" in orders.fixed["hidden"]
    assert not any("hidden" in group.split(", ") for group in orders.by_group)
    found = differences(orders)
    assert found and max(found.values()) <= BAR
    # The control: not said to have one, the stream is put in another, and that is another function.
    unsaid = replace(family, frozen=(replace(frozen, ordered=False),)).of(full)
    assert differences(Orders(unsaid, folder), {"hidden"})["hidden"] > 0.1


def test_stored_tables_have_no_order() -> None:
    assert not any(one.ordered for name in ("bert", "t5") for one in drafted(name).frozen)


def test_a_class_that_does_not_run_in_float64_is_judged_by_the_algebra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(FAMILIES["llama"], "LlamaForCausalLM", tmp_path / "wide")
    narrow = save_tiny(FAMILIES["llama"], "LlamaForCausalLM", tmp_path / "narrow", "float32")

    def refuses(*args: Any) -> Any:
        raise RuntimeError("value cannot be converted to type float without overflow")

    monkeypatch.setattr(claim_runtime, "noise_floor", refuses)

    def case(target: Path) -> Any:
        return SimpleNamespace(target=target, plan=SimpleNamespace(axes={}))

    claim = claim_runtime.runtime(case(folder), {}, {})
    assert claim.passed is None and not claim.required and "float64" in claim.detail
    # The control: stored in float32, that is a defect and not hidden.
    with pytest.raises(RuntimeError, match="overflow"):
        claim_runtime.runtime(case(narrow), {}, {})
