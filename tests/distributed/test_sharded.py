"""Growth of sharded models: what one process does, done by several."""

import warnings
from pathlib import Path

import pytest
import torch

from tests.distributed import checkpoints, refusals, scenarios, worlds

# One world runs them in turn: to start one takes longer than any of them.
TWO: list[worlds.Scenario] = [
    scenarios.growth_fsdp,
    scenarios.other_optimizers,
    scenarios.two_optimizers,
    scenarios.one_whole_parameter_at_a_time,
    refusals.refusals,
    refusals.control_another_seed_on_each_rank,
    checkpoints.ddp,
    checkpoints.save,
]
THREE: list[worlds.Scenario] = [
    scenarios.growth_fsdp,
    checkpoints.load_and_grow,
    checkpoints.load_into_a_larger_model,
]


def check(found: dict[str, str], scenario: worlds.Scenario) -> None:
    if found[scenario.__name__]:
        pytest.fail(found[scenario.__name__], pytrace=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, str]:
    return worlds.run(2, [*TWO, worlds.failing], folder)


@pytest.fixture(scope="module")
def three(folder: Path, two: dict[str, str]) -> dict[str, str]:
    return worlds.run(3, THREE, folder)


@pytest.mark.parametrize("scenario", TWO)
def test_on_two_ranks(two: dict[str, str], scenario: worlds.Scenario) -> None:
    check(two, scenario)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", THREE)
def test_on_three_ranks(three: dict[str, str], scenario: worlds.Scenario) -> None:
    check(three, scenario)


@pytest.mark.slow
def test_on_two_by_two_ranks(tmp_path: Path) -> None:
    check(worlds.run(4, [scenarios.growth_fsdp_and_tp], tmp_path), scenarios.growth_fsdp_and_tp)


def test_control_a_scenario_that_fails(two: dict[str, str]) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"rank 1:(?s:.*)only here"):
        check(two, worlds.failing)


def test_a_world_that_is_killed_is_started_once_more(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:  # by the filters of all tests, which make most of them errors
        found = worlds.run(2, [worlds.killed_once, worlds.failing], tmp_path)
    assert ["a world of 2 is started again" in str(one.message) for one in said] == [True]
    assert not found["killed_once"] and "only here" in found["failing"]


def test_control_a_world_that_is_always_killed(tmp_path: Path) -> None:
    with (
        pytest.warns(RuntimeWarning, match="started again"),
        pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGABRT"),
    ):
        worlds.run(2, [worlds.killed], tmp_path)
