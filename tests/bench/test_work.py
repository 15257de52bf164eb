"""The smoke suite, run: the same work once, the same bits, and results that stay."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from growformer import api
from growformer.bench.course import recipe_of, written
from growformer.bench.results import added_arms, read_results, write_once
from growformer.bench.summary import summarize
from growformer.bench.work import Bench
from growformer.errors import RequestError, SourceError
from growformer.report.bench import write_bench
from growformer.training.place import Place
from tests.bench.bench_kit import SMOKE, Told, smoke, suite_file, texts
from tests.training.train_kit import Cut, Watcher, weights


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The smoke suite, to its end."""
    root = tmp_path_factory.mktemp("bench")
    bench = Bench(SMOKE, root / "out", texts(root / "text"), Told())
    bench.claim()
    bench.work()
    return bench


def results(bench: Bench) -> dict[str, dict[str, Any]]:
    return read_results(bench.out)


def test_every_run_is_there_once(ended: Bench) -> None:
    found = results(ended)
    assert ended.wanted() == [] and summarize(found).missing == 0
    arms = len([arm for arm in ended.suite.arms if arm.same_as is None])
    assert len(found) == arms * len(ended.suite.rates) + arms * (len(ended.suite.seeds) - 1) + 1
    assert list((ended.out / "locks").iterdir()) == []


def test_the_order_is_arm_by_arm_or_seed_by_seed(ended: Bench, tmp_path: Path) -> None:
    def runs(by_seed: bool) -> list[tuple[str, int]]:
        made = Bench(SMOKE, tmp_path / "out", ended.data, Told(), by_seed=by_seed)
        return [(job.arm, job.seed) for job in made.wanted()]

    (tmp_path / "out" / "results").mkdir(parents=True)
    names = [arm.name for arm in ended.suite.arms if arm.same_as is None]
    assert runs(False) == runs(True) == [(name, 0) for name in names for _ in range(2)]  # the others wait for a rate
    for path in (ended.out / "results").glob("*--seed0.json"):
        (tmp_path / "out" / "results" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "out" / "results" / "grown--lr0.003--seed0.json").unlink()
    assert runs(False)[3:5] == [("grown", 0), ("grown-at-0", 1)] and runs(True)[:2] == [("grown", 0), ("scratch", 1)]


def test_a_growth_by_nothing_changes_no_bit(ended: Bench) -> None:
    found = results(ended)
    pairs = [
        (r["bits_per_byte"]["weights"], found[name.replace("nothing", "small")]["bits_per_byte"]["weights"])
        for name, r in found.items()
        if r["arm"] == "nothing" and name.replace("nothing", "small") in found
    ]
    assert len(pairs) == 1 and all(one == other for one, other in pairs)
    nothing = next(r for r in found.values() if r["arm"] == "nothing")
    assert len(nothing["growths"]) == 1 and len(set(nothing["growths"][0]["parameters"])) == 1
    # Other arms, other bits: the hash does tell weights apart.
    assert len({r["bits_per_byte"]["weights"] for r in found.values() if r["arm"] != "nothing"}) == len(
        [r for r in found.values() if r["arm"] != "nothing"]
    )


def test_cost_is_that_of_the_whole_run(ended: Bench) -> None:
    for result in results(ended).values():
        course = ended.courses[result["arm"]]
        assert result["steps"] == course.steps and result["flops"]["total"] == pytest.approx(course.flops)
        assert result["tokens"] == course.steps * ended.suite.batch_tokens
        if result["arm"] == "grown":
            assert 0 < result["flops"]["before_last_growth"] < result["flops"]["total"]
            assert result["growths"][0]["step"] == course.grows[0]
            before, after = result["growths"][0]["bits_per_byte"]
            assert before == pytest.approx(after, rel=1e-5)


def test_what_is_shared_is_what_would_have_been_trained(ended: Bench, tmp_path: Path) -> None:
    """The same run without a trunk; its warm-up is the same but for how shares of different budgets round."""
    course = ended.courses["grown"]
    recipe = recipe_of(ended.suite, ended.data, course, 0.01, 1, None)
    path = tmp_path / "recipe.yaml"
    path.write_text(written(recipe))
    place = api.train(path, tmp_path / "run")
    one, other = (
        [json.loads(line) for line in log.read_text().splitlines()]
        for log in (place.log, ended.out / "work" / "grown--lr0.01--seed1" / "log.jsonl")
    )
    losses = [[line["loss"] for line in lines if line["kind"] == "step"] for lines in (one, other)]
    assert len(losses[0]) == course.steps > course.trunk > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_result_holds_what_it_takes_to_repeat_it(ended: Bench) -> None:
    result = results(ended)["grown--lr0.01--seed0"]
    assert result["recipe"]["optimizer"]["lr"] == 0.01 and result["recipe"]["seed"] == 0
    assert result["recipe"]["data"] == {"train": "train.txt", "valid": "valid.txt"}
    assert str(ended.out) not in json.dumps(result) and str(ended.data) not in json.dumps(result)
    assert result["suite"]["analysis"]["curve"] == ["scratch-half", "scratch"]
    assert set(result["data"]) == {"train.txt", "valid.txt", "test.txt"} and result["versions"]["torch"]
    assert len(result["curve"][-1]) == 4 and len(result["evaluations"]) > 3 and result["seconds"] > 0
    assert len(result["source"]) == 16


def test_what_is_missing_is_done_again_and_nothing_else(ended: Bench) -> None:
    files = sorted((ended.out / "results").iterdir())
    before = {path: path.read_bytes() for path in files}
    gone = next((ended.out / "results").glob("nothing--*.json"))
    gone.unlink()
    assert [job.name for job in ended.wanted()] == [gone.stem]
    again = Bench(SMOKE, ended.out, ended.data, Told())
    again.claim()
    again.work()
    old = json.loads(before.pop(gone))
    assert json.loads(gone.read_text())["bits_per_byte"] == old["bits_per_byte"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    ended: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in the middle of its tail, behind a checkpoint of its own; only this run is done."""
    data = smoke()
    data["arms"] = [
        arm for arm in data["arms"] if arm["name"] in ("scratch", "scratch-half", "small", "nothing", "grown")
    ]
    data["arms"][[a["name"] for a in data["arms"]].index("grown")].pop("step_zero")
    bench = Bench(suite_file(tmp_path / "suite.yaml", data), tmp_path / "out", ended.data, Told())
    bench.claim()
    job = next(job for job in bench.wanted() if job.name == "grown--lr0.01--seed0")
    place = Place(bench.out / "work" / job.name)

    def cut(self: Bench, recipe: Mapping[str, Any], where: Place) -> None:
        path = tmp_path / "cut.yaml"
        path.write_text(written(recipe))
        api.train(path, where.out, resume=True, watcher=Watcher(25 if where.out == place.out else None))

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_train", cut)
        with contextlib.suppress(Cut):
            bench._try(job)
    assert list((bench.out / "locks").iterdir()) == [] and not bench._result(job).exists()
    assert [path.name for path in place.checkpoints.iterdir()] == ["step-000000020"]
    assert bench._try(job)
    assert weights(place.model) == weights(ended.out / "work" / job.name / "model")


def test_a_rate_at_which_training_diverges_is_a_result(ended: Bench, tmp_path: Path) -> None:
    data = smoke() | {"rates": [0.01, 1e30], "clip_norm": None}
    bench = Bench(suite_file(tmp_path / "suite.yaml", data), tmp_path / "out", ended.data, Told())
    bench.claim()
    for name in ("grown--lr1e+30--seed0", "small--lr1e+30--seed0"):
        assert bench._try(next(job for job in bench.wanted() if job.name == name))
        result = json.loads((bench.out / "results" / f"{name}.json").read_text())
        assert result["bits_per_byte"] is None and "the loss is" in result["failure"]


def test_a_folder_keeps_its_suite(ended: Bench, tmp_path: Path) -> None:
    other = smoke()
    other["analysis"]["confidence"] = 0.9
    bench = Bench(suite_file(tmp_path / "suite.yaml", other), ended.out, ended.data, Told())
    with pytest.raises(RequestError, match="a suite is fixed before its first run"):
        bench.claim()


def test_a_folder_takes_more_arms_and_no_others(tmp_path: Path) -> None:
    less = smoke()
    less["arms"] = [arm for arm in less["arms"] if arm["name"] != "nothing"]
    data, out = texts(tmp_path / "text"), tmp_path / "out"
    Bench(suite_file(tmp_path / "less.yaml", less), out, data, Told()).claim()
    more = Bench(SMOKE, out, data, Told())
    more.claim()
    assert (out / "suite.yaml").read_text() == SMOKE.read_text()
    with pytest.raises(RequestError, match=r"no arm nothing; arms may be added"):
        Bench(tmp_path / "less.yaml", out, data, Told()).claim()
    other = smoke()
    other["arms"][0]["budget"] = 0.9
    with pytest.raises(RequestError, match=r"another arm scratch; arms may be added"):
        Bench(suite_file(tmp_path / "other.yaml", other), out, data, Told()).claim()


def test_results_before_and_after_arms_were_added_are_of_one_suite(ended: Bench, tmp_path: Path) -> None:
    found = results(ended)
    for name, result in found.items():
        if result["arm"] == "scratch":
            arms = [arm for arm in result["suite"]["arms"] if arm["name"] != "nothing"]
            result = {**result, "suite": {**result["suite"], "arms": arms}}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    read = read_results(tmp_path)
    assert added_arms(read) == ["nothing"] and added_arms(found) == []
    assert [line.loss for line in summarize(read).lines] == [line.loss for line in summarize(found).lines]
    other = json.loads((tmp_path / "small--lr0.01--seed0.json").read_text())
    other["suite"]["arms"][0]["budget"] = 0.9
    (tmp_path / "small--lr0.01--seed0.json").write_text(json.dumps(other))
    with pytest.raises(SourceError, match="arm scratch is another one there"):
        read_results(tmp_path)


def test_no_byte_is_used_twice(ended: Bench, tmp_path: Path) -> None:
    path = suite_file(tmp_path / "suite.yaml", smoke() | {"budget": {"tokens": 9000}})
    with pytest.raises(RequestError, match=r"arm (small|nothing): takes .* no byte is used twice"):
        Bench(path, tmp_path / "out", ended.data, Told())


def test_results_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "results" / "a.json"
    assert write_once(path, {"a": 1}) and not write_once(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_results_that_are_none(ended: Bench, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no results yet"):
        read_results(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(SourceError, match="is no result of a run"):
        read_results(tmp_path)
    one = next(iter(results(ended).values()))
    (tmp_path / "a.json").write_text(json.dumps(one))
    (tmp_path / "b.json").write_text(json.dumps({**one, "suite": {**one["suite"], "hash": "other"}}))
    with pytest.raises(SourceError, match="is of another suite"):
        read_results(tmp_path)


def test_the_report_of_true_results(ended: Bench, tmp_path: Path) -> None:
    page, figures = write_bench(ended.out, tmp_path / "page" / "report.html")
    html = page.read_text()
    names = ("courses", "costs", "losses", "savings")
    assert [path.name for path in figures] == [f"report-{name}.svg" for name in names]
    for name, result in results(ended).items():
        link = next(part for part in html.split('href="') if part.startswith("../") or f"/{name}.json" in part)
        assert f"/{name}.json" in html and link
        if result["arm"] == "nothing":
            assert "small: bit for bit" in html


@pytest.mark.slow
def test_two_processes_share_the_work(ended: Bench, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "growformer", "bench", str(SMOKE), "--data", str(ended.data), "--jobs", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    one, other = results(ended), read_results(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(one[name]["bits_per_byte"] == other[name]["bits_per_byte"] for name in one)
    assert list((tmp_path / "out" / "locks").iterdir()) == []
    assert sum(done.stdout.count(f"{name}: ") for name in one) == len(one)
