"""Every family grows in place to what it grows to beside itself: weights, buffers, modules, config, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import growformer as gf
from growformer.api.checks.requests import Planner
from growformer.api.checks.samples import save_tiny, stock_named
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.training.likeness import SKIPPED, same, same_tensor

NAMES = sorted(set(FAMILIES) - {"reference"})
QUICK = ("gpt_oss", "mixtral", "whisper")
"""One matrix for all experts, experts that are fused in memory, and two stacks of layers."""


def loaded(folder: Path, architecture: str) -> Any:
    return stock_named(architecture).from_pretrained(folder, dtype=torch.float32)


def differences(live: Any, beside: Any) -> list[str]:
    """What differs between a model grown in place and one grown beside its source."""
    found = []
    ours, theirs = dict(live.named_modules()), dict(beside.named_modules())
    if list(ours) != list(theirs):
        return [f"modules {set(ours) ^ set(theirs)} or their order"]
    for path, module in theirs.items():
        mine = ours[path]
        for kind in ("_parameters", "_buffers"):
            for name, value in getattr(module, kind).items():
                if not same_tensor(getattr(mine, kind)[name], value):
                    found.append(f"{path}.{name}")
        for key in {*vars(mine), *vars(module)} - SKIPPED - {"name_or_path", "generation_config"}:
            if key not in vars(mine) or key not in vars(module) or not same(vars(mine)[key], vars(module)[key]):
                found.append(f"{path}: {key}")
        if hasattr(module, "config"):
            one, other = ({**x.config.to_dict(), "_name_or_path": ""} for x in (mine, module))
            found += [f"{path}: config.{key}" for key in {*one, *other} if one.get(key) != other.get(key)]
    return found


def check(name: str, folder: Path) -> None:
    family = FAMILIES[name]
    architecture = family.architectures[0]
    save_tiny(family, architecture, folder, dtype="float32")
    asked = {each.field: each for each in Planner(family, folder).asked()}
    grown = 0
    for each in asked.values():
        if each.new == each.old or each.new in each.dead:
            continue
        live, source = loaded(folder, architecture), loaded(folder, architecture)
        if gf.plan(source, **{each.field: each.new}).within_eps:
            with pytest.raises(RequestError, match="hand their last norm to new ones"):
                gf.grow(live, **{each.field: each.new})
            assert differences(live, source) == []
            continue
        gf.grow(live, **{each.field: each.new})
        assert differences(live, gf.expand(source, **{each.field: each.new})) == [], f"{name}: {each.field}={each.new}"
        assert differences(live, source), "the comparison sees a growth"
        grown += 1
    assert grown


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize("name", QUICK)
def test_in_place_as_beside(name: str, tmp_path: Path) -> None:
    check(name, tmp_path / "source")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_every_family_in_place_as_beside(name: str, tmp_path: Path) -> None:
    check(name, tmp_path / "source")
