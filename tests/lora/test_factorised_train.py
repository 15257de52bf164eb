"""`growformer train` with products: the loss goes on at each growth in rank, a cut run resumes, the end is stock."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from growformer.errors import RequestError
from growformer.proof.bar import BAR
from growformer.proof.float64 import true_float64
from growformer.training.factorised import grow_rank, products
from growformer.training.log import read_log
from growformer.training.saving import checkpoints, read_model
from tests.lora.kit import logits, relative
from tests.training.train_kit import equal, recipe, train, training_state, weights

PRODUCTS: dict[str, Any] = {"rank": 2, "grow": [{"step": 4, "rank": 4}, {"step": 7, "rank": 6}], "dense": 9}


def lines(place: Any, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_log(place.log) if line["kind"] == kind]


def test_a_run_and_the_same_run_cut(tmp_path: Path) -> None:
    path = recipe(tmp_path, grow=None, factorised=PRODUCTS)
    place, watcher = train(path, tmp_path / "whole")
    ranks = lines(place, "rank")
    assert [(line["step"], line["rank"]) for line in ranks] == [(4, 4), (7, 6), (9, None)]
    for line in ranks:
        before, after = line["bits_per_byte"]
        assert abs(after - before) <= 64 * torch.finfo(torch.float32).eps * before
        assert line["parameters"][0] < line["parameters"][1]
    assert sum("products grown to rank" in said for said in watcher.said) == 3
    model = AutoModelForCausalLM.from_pretrained(place.model)
    assert not products(model) and ranks[-1]["parameters"][1] == model.num_parameters()
    # Steps of products cost less, by what the log says.
    steps = {line["step"]: line["flops"] for line in lines(place, "step")}
    assert steps[1] < steps[6] - steps[5] < steps[12] - steps[11]
    for at in (5, 11):
        cut, _ = train(path, tmp_path / f"cut{at}", cut_at=at)
        last = checkpoints(cut.checkpoints)[-1]
        held = products(read_model(last))
        assert bool(held) == (at < 11)
        train(path, cut.out, resume=True)
        assert weights(cut.model) == weights(place.model)
        assert equal(training_state(cut), training_state(place))


def test_from_rank_4_to_full_in_four_growths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each growth of the run is done on a copy in true float64 as well: growths in rank, and the merge at the end."""
    apart: list[float] = []

    def watched(model: Any, optimizers: Any, rank: int | None, **asked: Any) -> Any:
        double = copy.deepcopy(model).double()
        with true_float64(strict=False):
            before = logits(double)
            grow_rank(double, None, rank)
            assert (rank is None) == (not products(double))
            apart.append(relative(before, logits(double)))
        return grow_rank(model, optimizers, rank, **asked)

    monkeypatch.setattr("growformer.training.run.grow_rank", watched)
    ranks = [{"step": 3, "rank": 5}, {"step": 5, "rank": 6}, {"step": 7, "rank": 8}]
    place, _ = train(recipe(tmp_path, grow=None, factorised={"rank": 4, "grow": ranks, "dense": 9}), tmp_path / "run")
    assert len(apart) == 4 and max(apart) <= BAR
    for line in lines(place, "rank"):
        before, after = line["bits_per_byte"]
        assert abs(after - before) <= 64 * torch.finfo(torch.float32).eps * before
    losses = [line["loss"] for line in lines(place, "step")]
    assert len(losses) == 12 and losses[-1] < losses[0]


def test_it_ends_dense_where_no_step_is_named(tmp_path: Path) -> None:
    place, _ = train(recipe(tmp_path, grow=None, factorised={"rank": 3}), tmp_path / "run")
    assert [(line["step"], line["rank"]) for line in lines(place, "rank")] == [(12, None)]
    stored = dict(AutoModelForCausalLM.from_pretrained(place.model).named_parameters())
    # Never more than rank 3: what was trained is the product.
    singular = torch.linalg.svdvals(stored["model.layers.0.mlp.up_proj.weight"].detach().double())
    assert float(singular[3]) < 1e-6 * float(singular[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factorised": {"rank": 8, "grow": [{"step": 4, "rank": 6}]}, "grow": None}, "its ranks must rise"),
        ({"factorised": {**PRODUCTS, "dense": 5}, "grow": None}, "its steps must rise"),
        ({"factorised": PRODUCTS}, "grows in rank alone"),
        ({"factorised": PRODUCTS, "grow": None, "budget": {"flops": 1.0e9}}, "budget in steps or tokens"),
        ({"factorised": {"rank": 500}, "grow": None}, "factorised: rank=500: no weight between layers"),
    ],
    ids=str,
)
def test_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=said):
        train(recipe(tmp_path, changes), tmp_path / "run")
