"""tools/serving's verdicts and page, from results that are made up; what it measures is no part of the tests."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "serving"


def load(name: str) -> Any:
    """A module of the tool; none of those loaded here needs its environment."""
    spec = importlib.util.spec_from_file_location(f"serving_{name}", TOOL / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one(ratio: float) -> dict[str, Any]:
    return {"max": 3e-5, "rms": 1e-6, "kl": 1e-12, "top1": 1.0, "floor": 1e-6, "floor_max": 2e-5, "ratio": ratio}


def program() -> dict[str, Any]:
    floor = {"rms": 1e-6, "max": 2e-5, "draws": 8}
    told = {"positions": 9, "largest": 20.0, "floor": floor, "continued": 6}
    return told | {"growths": {"hidden": one(0.7) | {"greedy": 6}}, "controls": {"eps": one(40.0)}}


RESULTS: dict[str, Any] = {
    "versions": {"llama.cpp": "1"},
    "allowed": 2.0,
    "prompts": [7],
    "greedy_tokens": 64,
    "requests": {"hidden": {"hidden_size": 96}},
    "parameters": {"hidden": 390048},
    "logits": {"llama.cpp": program()},
    "apart": 4e-5,
    "float16 cache": 6e-2,
    "tokens missing": False,
    "peft": {"hidden": {"start": 0.0, "before": 3.0, "after": 2.0, "trained": 9.0, "reload": 0.0, "merged": 4e-5}},
    "lm-eval": program() | {"accuracy": {"original": 0.5, "hidden": 0.5}, "choices": 16},
}


def test_what_is_measured_is_on_the_page() -> None:
    page = load("page")
    assert page.failures(RESULTS) == []
    text = page.page(RESULTS)
    for row in (
        "| hidden | `hidden_size=96` | 390,048 |",
        "| hidden | 3.0e-05 | 2.0e-05 | 1.0e-12 | 0.70 | 6 of 6 | holds |",
        "| control: eps | 3.0e-05 | 2.0e-05 | 1.0e-12 | 40.00 |  | noticed |",
        "| hidden | 0 | 3.000 to 2.000 | 0 | 4.0e-05 |",
        "| hidden | 0.500 | 3.0e-05 | 0.70 | holds |",
        "does not load",
    ):
        assert row in text


@pytest.mark.parametrize(
    ("spoil", "says", "row"),
    [
        (lambda r: r["logits"]["llama.cpp"]["growths"]["hidden"].update(ratio=2.1), "2.10 noise floors", "FAILS"),
        (lambda r: r["logits"]["llama.cpp"]["growths"]["hidden"].update(ratio=float("nan")), "nan", "FAILS"),
        (lambda r: r["logits"]["llama.cpp"]["controls"]["eps"].update(ratio=1.0), "not noticed", "MISSED"),
        (lambda r: r["lm-eval"]["growths"]["hidden"].update(ratio=3.0), "lm-eval: hidden", "FAILS"),
        (lambda r: r["lm-eval"]["accuracy"].update(hidden=0.625), "accuracies differ", "0.625"),
        (lambda r: r["peft"]["hidden"].update(start=1e-7), "fresh adapter", "1e-07"),
        (lambda r: r["peft"]["hidden"].update(reload=1e-7), "loading", "1e-07"),
        (lambda r: r["peft"]["hidden"].update(after=3.5), "does not fall", "3.500"),
    ],
)
def test_what_is_wrong_is_told(spoil: Callable[[Any], None], says: str, row: str) -> None:
    page, results = load("page"), copy.deepcopy(RESULTS)
    spoil(results)
    (said,) = page.failures(results)
    assert says in said and row in page.page(results)


def test_without_a_checkpoint_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no checkpoint at"):
        load("run").source(tmp_path)
    assert not any(tmp_path.iterdir())
