"""`growformer bench` and `growformer report` at the command line."""

import json

import yaml

from growformer.bench.suite import Suite
from tests.bench.bench_kit import SMOKE, smoke, suite_file, texts
from tests.cli.harness import Cli


def test_the_schema(cli: Cli) -> None:
    schema = json.loads(cli("bench", "--schema").out)
    assert schema["title"] == "Suite" and schema["additionalProperties"] is False
    assert set(smoke()) <= set(schema["properties"]) == set(Suite.model_json_schema()["properties"])


def test_the_plan_writes_nothing(cli: Cli) -> None:
    texts(cli.root / "text")
    before = sorted(cli.root.rglob("*"))
    said = cli("bench", SMOKE, "--data", cli.root / "text", "--plan")
    assert said.code == 0 and "16 trials of learning rates, 9 further runs" in said.out
    assert all(arm["name"] in said.out for arm in smoke()["arms"])
    assert sorted(cli.root.rglob("*")) == before


def test_a_suite_and_its_report(cli: Cli) -> None:
    data = smoke() | {"rates": [0.01], "seeds": [0]}
    data["arms"] = data["arms"][:2]
    suite = suite_file(cli.root / "suite.yaml", data)
    texts(cli.root / "text")
    out = cli.root / "out"
    said = cli("bench", suite, "--data", cli.root / "text", "--out", out)
    assert said.code == 0 and f"the report: growformer report {out}" in said.out, said
    assert yaml.safe_load((out / "suite.yaml").read_text()) == data
    said = cli("report", out)
    assert said.code == 0 and f"Report: {out / 'report.html'}" in said.out
    assert "growing against scratch" in (out / "report.html").read_text()
    assert (out / "report-courses.svg").is_file()
    said = cli("bench", suite, "--data", cli.root / "text", "--out", out)
    assert said.code == 0 and "0 runs known to be left" in said.out


def test_refusals(cli: Cli) -> None:
    texts(cli.root / "text")
    cli.refused("bench", says="bench takes a suite")
    cli.refused("bench", SMOKE, says="bench takes a folder for its results")
    cli.refused("bench", cli.root / "none.yaml", "--plan", says="cannot be read")
    cli.refused("bench", SMOKE, "--data", cli.root, "--plan", says="does not hold train.txt, valid.txt, test.txt")
    cli.refused("report", cli.root, says="holds no results yet")
