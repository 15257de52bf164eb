"""The model card: front matter the Hub understands, and the proof in words."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from growformer.checkpoint import write_card

DATA: dict[str, Any] = {
    "request": {"hidden_size": 1024, "layers_at": [1, 3]},
    "proof": "| claim | error |\n|---|---|\n| algebra | 3e-16 |\n",
    "method": "paper",
    "seed": 0,
    "dtype": None,
    "growformer": "0.1.0",
}


def card(folder: Path, source: str | None = None, base: str = "org/name", **more: Any) -> tuple[dict[str, Any], str]:
    path = write_card(folder, source, base, DATA | more)
    assert path == folder / "README.md"
    loaded = ModelCard.load(path)  # the Hub's own reader
    return loaded.data.to_dict(), loaded.text


def test_without_a_source_card(tmp_path: Path) -> None:
    front, text = card(tmp_path)
    assert front == {
        "base_model": "org/name",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["growformer", "model-growth"],
    }
    for part in (
        "# org/name, grown\n",
        "## Grown with growformer\n",
        "grown by growformer 0.1.0",
        "| `hidden_size` | `1024` |",
        "| `layers_at` | `[1, 3]` |",
        "Made with method `paper`, seed `0`.",
        DATA["proof"],
        "growformer verify SRC OUT",
    ):
        assert part in text
    assert "dtype" not in text and "never get a gradient" not in text


def test_the_title_and_dead_blocks(tmp_path: Path) -> None:
    _, text = card(tmp_path, title="Larger", dead=["experts.3: never routed to"])
    assert "# Larger\n" in text
    assert "never get a gradient:\n\n- experts.3: never routed to\n" in text


def test_what_is_exact_only_up_to_eps(tmp_path: Path) -> None:
    _, text = card(tmp_path, within_eps=["layers: off by eps/2"])
    assert "within eps, not exactly:\n\n- layers: off by eps/2\n\n### Proof" in text
    assert "within eps" not in card(tmp_path)[1]


SOURCE = """---
license: other
license_name: odd
language:
- no
- en
tags: [text, growformer]
datasets: [a/b]
inference: false
base_model: older/model
base_model_relation: quantized
library_name: gguf
model-index: [{name: x}]
---
# The source's own text
"""


def test_the_source_cards_front_matter_stays(tmp_path: Path) -> None:
    front, text = card(tmp_path, SOURCE)
    assert front == {
        "license": "other",
        "license_name": "odd",
        "language": ["no", "en"],  # not False
        "datasets": ["a/b"],
        "inference": False,
        "base_model": "org/name",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["text", "growformer", "model-growth"],
    }
    assert "own text" not in text


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_endings_and_single_tags(tmp_path: Path, ending: str) -> None:
    front, _ = card(tmp_path, "---\nlicense: mit\ntags: one\n---\nText".replace("\n", ending))
    assert front["license"] == "mit" and front["tags"] == ["one", "growformer", "model-growth"]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "no front matter\n---\nlicense: mit\n---\n",
        "---\nlicense: mit\n",
        "---\n- a\n---\n",
        "---\n{: [\n---\n",
        "---\nd: 2024-13-01\n---\n",
        "---\nx: !!python/object/apply:os.getcwd []\n---\n",
        "---\ntags: [{a: b}]\n---\n",
    ],
)
def test_a_source_card_that_says_nothing(tmp_path: Path, source: str) -> None:
    front, _ = card(tmp_path, source)
    assert set(front) == {"base_model", "base_model_relation", "library_name", "tags"}
    assert front["tags"] == ["growformer", "model-growth"]


@pytest.mark.parametrize("base", ["/home/someone/models/tiny", "./tiny", "C:\\models\\tiny", "tiny", "../x/tiny/"])
def test_a_path_does_not_go_to_the_hub(tmp_path: Path, base: str) -> None:
    front, text = card(tmp_path, None, base)
    assert "base_model" not in front and "base_model_relation" not in front
    assert "# tiny, grown\n" in text and "models" not in text.replace("model's", "") and "someone" not in text


def test_cells_cannot_break_the_table(tmp_path: Path) -> None:
    _, text = card(tmp_path, request={"a|b": "x\ny`z"})
    assert "| `a\\|b` | `x y'z` |" in text
