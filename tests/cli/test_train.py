"""`growformer train` at the command line: what it prints, writes and refuses."""

import json
from importlib import resources

import yaml

from growformer.training.recipe import Recipe
from tests.cli.harness import Cli
from tests.training.train_kit import recipe

EXAMPLE = resources.files("growformer.training").joinpath("example.yaml").read_text()


def test_the_example_and_the_schema(cli: Cli) -> None:
    said = cli("train", "--example")
    assert said.code == 0 and said.out.rstrip() == EXAMPLE.rstrip()
    schema = json.loads(cli("train", "--schema").out)
    assert schema["title"] == "Recipe" and schema["additionalProperties"] is False
    assert set(yaml.safe_load(EXAMPLE)) <= set(schema["properties"]) == set(Recipe.model_json_schema()["properties"])


def test_a_run(cli: Cli) -> None:
    path = recipe(cli.root, output="run", budget={"steps": 6}, grow=[{"at": {"step": 4}, "to": {"head_dim": 14}}])
    said = cli("train", path)
    assert said.code == 0, said
    run = cli.root / "run"
    assert "grown to head_dim=14" in said.out and f"Report: {run / 'report.html'}" in said.out
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "log.jsonl", "model", "recipe.yaml", "report.html"]
    html = (run / "report.html").read_text()
    assert html.count('class="mark"') == 4 and "head_dim 14" in html and "sequence_length: 16" in html
    cli.refused("train", path, says="holds a run that has ended; --resume goes on with it")
    (run / "report.html").unlink()
    said = cli("train", path, "--resume")
    assert said.code == 0 and "this run has ended" in said.out and (run / "report.html").exists()


def test_refusals(cli: Cli) -> None:
    cli.refused("train", says="train takes a recipe.*--example prints one")
    cli.refused("train", cli.root / "none.yaml", says="cannot be read")
    cli.refused("train", recipe(cli.root), says="names no output.*--out FOLDER")
    cli.refused("train", recipe(cli.root, budget={"step": 1}), "--out", cli.root / "x", says="did you mean steps")
    two = recipe(cli.root, budget={"steps": 0}, seed=-1)
    cli.refused("train", two, "--out", cli.root / "x", says="budget.steps", lines=2)
