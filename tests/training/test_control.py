"""A growth by nothing: asked for by name only, and without a trace in the weights."""

from pathlib import Path
from typing import Any

import pytest

from growformer.errors import RequestError
from growformer.planning.choices import Choices
from growformer.training.log import read_log
from tests.training.train_kit import MODEL, equal, recipe, train, training_state, weights

NOTHING: dict[str, Any] = {"at": {"step": 5}, "to": {"intermediate_size": 20, "num_hidden_layers": 1}}


def test_it_changes_no_bit(tmp_path: Path) -> None:
    assert all(MODEL[name] == size for name, size in NOTHING["to"].items())
    without, _ = train(recipe(tmp_path / "a", grow=None), tmp_path / "a" / "run")
    control = recipe(tmp_path / "b", grow=[{**NOTHING, "control": True}])
    with_it, _ = train(control, tmp_path / "b" / "run")
    assert weights(without.model) == weights(with_it.model)
    assert equal(training_state(without)["optimizers"], training_state(with_it)["optimizers"])
    growth = next(line for line in read_log(with_it.log) if line["kind"] == "growth")
    assert growth["step"] == 5 and growth["parameters"][0] == growth["parameters"][1]
    assert growth["bits_per_byte"][0] == growth["bits_per_byte"][1]
    # A growth by something does leave a trace.
    grown, _ = train(
        recipe(tmp_path / "c", grow=[{**NOTHING, "to": {"intermediate_size": 28}}]), tmp_path / "c" / "run"
    )
    assert weights(grown.model) != weights(without.model)


def test_it_is_refused_where_it_is_not_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"grow\[0\].*changes no size"):
        train(recipe(tmp_path, grow=[NOTHING]), tmp_path / "run")
    with pytest.raises(RequestError, match="same='perhaps' is unknown; there are refused, planned"):
        Choices(same="perhaps")
