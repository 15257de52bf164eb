"""Recipes: what a mistake is answered with, and that the example is none."""

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest

from growformer.errors import RequestError
from growformer.training.recipe import differences, parse_recipe, read_recipe

PATH = Path("recipe.yaml")
EXAMPLE = resources.files("growformer.training").joinpath("example.yaml").read_text()


def test_the_example_is_a_recipe_of_three_stages() -> None:
    recipe = parse_recipe(EXAMPLE, PATH).recipe
    assert [entry.at.share for entry in recipe.grow] == [0.25, 0.5]
    assert recipe.grow[1].to == {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    assert (
        recipe.sequences == 32 and recipe.budget.kind == "steps" and recipe.optimizer.arguments["betas"] == [0.9, 0.95]
    )
    assert recipe.model.fields["num_hidden_layers"] == 2


MISTAKES = [
    ("steps: 1500", "step: 1500", "line 30: budget.step: is no key here; did you mean steps?"),
    ("steps: 1500", "steps: 0", "line 30: budget.steps: 0 is given; it must be greater than 0"),
    ("steps: 1500", "steps: many", "line 30: budget.steps: 'many' is given; it must be a valid integer"),
    ("steps: 1500", "steps: 3\n  tokens: 4", "line 29: budget: takes exactly one of steps, tokens and flops; given"),
    ("{share: 0.25}", "{share: 2}", "line 47: grow[0].at.share: 2.0 is given; it must be less than 1"),
    ("{share: 0.25}", "{share: soon}", "line 47: grow[0].at.share: 'soon' is given; it must be a valid number"),
    ("{share: 0.25}", "{step: [1, x]}", "line 47: grow[0].at.step: [1, 'x'] is given; it must be a valid integer"),
    ("{share: 0.25}", "{share: 0.2, step: 3}", "line 47: grow[0].at: takes exactly one of step, tokens, flops, sh"),
    ("{share: 0.25}", "{plateau: {windw: 3}}", "line 47: grow[0].at.plateau.windw: is no key here; did you mean windo"),
    ("{share: 0.25}", "{slope: {}}", "line 47: grow[0].at.slope: takes either law: {E, A, B, a, b}, or per_decade"),
    ("{share: 0.25}", "{sometime: 3}", "line 47: grow[0].at.sometime: is no key here; there are step, tokens, flops"),
    ("hidden_size: 128", "hidden_size: big", "line 52: grow[1].to.hidden_size: 'big' is given; it must be a valid int"),
    ("batch_tokens: 4096", "batch_tokens: 4000", "batch_tokens: 4000 is no multiple of sequence_length 128; 3968 is"),
    ("seed: 0", "seed: 0\nseed: 1", "line 28: seed is there twice"),
    ("shape: wsd", "shape: wds", "line 39: learning_rate.shape: 'wds' is none of 'wsd', 'cosine', 'linear' or 'const"),
    ("warmup: 0.02", "warmup: 0.9", "line 38: learning_rate: warmup=0.9 and decay=0.2 are 1.1 of the budget together"),
    ("shape: wsd ", "shape: cosine ", "line 38: learning_rate: decay belongs to shape: wsd; cosine has none: leave"),
    ("tie_word_embeddings: true", "from: x", "line 9: model: takes either from: FOLDER, or model_type and the fields"),
    ("data:\n", "dta:\n", "recipe.yaml: data: is missing"),
    ("seed: 0", "seed: [", "is no YAML"),
    ("precision: float32", "precision: fp8", "line 43: precision: 'fp8' is none of 'float32' or 'bf16'"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "says"), MISTAKES, ids=[new for _, new, _ in MISTAKES])
def test_a_mistake_is_answered_in_the_words_of_the_file(old: str, new: str, says: str) -> None:
    assert EXAMPLE.count(old) >= 1
    with pytest.raises(RequestError) as caught:
        parse_recipe(EXAMPLE.replace(old, new, 1), PATH)
    message = str(caught.value)
    assert says in message
    assert message.startswith("recipe.yaml") and "pydantic" not in message and "union" not in message


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        parse_recipe(EXAMPLE.replace("seed: 0", "sed: 0").replace("steps: 1500", "steps: -1"), PATH)
    assert sorted(line.split(": ")[1] for line in str(caught.value).splitlines()) == ["budget.steps", "sed"]


@pytest.mark.parametrize("text", ["", "- 1", "steps"])
def test_something_else_is_no_recipe(text: str) -> None:
    with pytest.raises(RequestError, match="expected keys such as model, data and budget"):
        parse_recipe(text, PATH)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(("said", "found"), [("1e6", 1e6), ("2.5e9", 2.5e9), ("1_000", 1000), ("1.0e+6", 1e6)])
def test_numbers_as_people_write_them(said: str, found: float) -> None:
    recipe = parse_recipe(EXAMPLE.replace("steps: 1500", f"tokens: {said}"), PATH).recipe
    assert recipe.budget.amount == found


def test_paths_start_at_the_recipe_s_folder() -> None:
    file = parse_recipe(EXAMPLE, Path("some/where/recipe.yaml"))
    assert file.file("train.txt") == Path("some/where/train.txt")
    assert file.file("/data/train.txt") == Path("/data/train.txt")


def test_differences_name_what_decides_the_weights() -> None:
    def changed(edit: Callable[[str], str]) -> list[str]:
        return differences(parse_recipe(EXAMPLE, PATH).recipe, parse_recipe(edit(EXAMPLE), PATH).recipe)

    assert changed(lambda text: text + "\n# a comment") == []
    assert changed(lambda text: text.replace("keep: 2", "keep: 5")) == []
    assert changed(lambda text: text.replace("lr: 3.0e-3", "lr: 1.0e-3")) == ["optimizer.lr: 0.003 was, 0.001 is"]
    assert changed(lambda text: text.replace("share: 0.5", "share: 0.6")) == ["grow[1].at.share: 0.5 was, 0.6 is"]
    assert changed(lambda text: text.replace("head_dim: 16", "head_dim: 32")) == ["model.head_dim: 16 was, 32 is"]
