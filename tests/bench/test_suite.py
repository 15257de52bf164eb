"""Suites: what is refused, and that arms cost the same."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from growformer.api.planned import method_named
from growformer.api.training import growing
from growformer.bench.course import courses_of, entry_of, recipe_of, trunk_points
from growformer.bench.results import suite_hash
from growformer.bench.suite import FOLDER, Event, Suite, read_suite, text_folder
from growformer.errors import RequestError
from growformer.training.schedule import Entry
from tests.bench.bench_kit import SMOKE, smoke, suite_file, texts

SUITES = sorted(SMOKE.parent.glob("*.yaml"))


def changed(**arms: dict[str, Any]) -> dict[str, Any]:
    """The smoke suite with keys of arms changed."""
    data = copy.deepcopy(smoke())
    for arm in data["arms"]:
        arm.update(arms.get(arm["name"].replace("-", "_"), {}))
    return data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (changed(grown={"rates": [0.01]}), "every arm tries 2 different rates"),
        (changed(grown={"rates": [0.01, 0.01]}), "every arm tries 2 different rates"),
        (changed(grown={"grow": [{"at": 0.8}]}), "learning rate falls from 0.75 on"),
        (changed(grown={"grow": [{"at": 0.5}, {"at": 0.5}]}), "must come after the one before it"),
        (changed(grown={"step_zero": "small"}), "does not grow once, at: 0, from the same start and by the same"),
        (changed(grown={"grow": [{"at": 0.4, "method": "zero-in"}]}), "by the same method"),
        (changed(grown_at_0={"grow": [{"at": 0, "warmup": 3}]}), "warmup is of a growth in mid-run"),
        (changed(grown={"step_zero": "none"}), "there is no arm none"),
        (changed(grown={"start": {"hidden": 3}}), "hidden is no size that model names"),
        (changed(scratch={"grow": [{"at": 0.5}]}), "names no start"),
        (changed(scratch_half={"budget": 1.0}), "a curve needs different ones"),
        (changed(scratch={"name": "small"}), "small is there twice"),
        (changed(scratch={"name": "a--b"}), "arms.0..name|arms\\[0\\].name"),
        (changed(rank={"grow": [{"at": 0.4}], "start": {"hidden_size": 12}}), "an arm has grow or factorised"),
        (changed(rank={"factorised": {"rank": 4, "grow": [{"at": 0.3, "rank": 2}], "dense": 0.5}}), "ranks must rise"),
        (changed(rank={"factorised": {"rank": 2, "grow": [{"at": 0.6, "rank": 4}], "dense": 0.5}}), "shares must rise"),
        (changed(rank={"factorised": {"rank": 2, "dense": 0.9}}), "learning rate falls from 0.75 on"),
        (changed(nothing={"rates": [0.01, 0.1]}), "takes its learning rate from small"),
        (changed(small={"same_as": "nothing"}), "which must try some itself"),
        ({**smoke(), "seeds": [1, 1]}, "has one twice"),
        ({**smoke(), "analysis": {"curve": ["small", "scratch"]}}, "no arm of the final size from scratch"),
        ({**smoke(), "budget": {}}, "exactly one of tokens and flops"),
        ({**smoke(), "seed": 3}, "seed: Extra inputs"),
    ],
)
def test_refusals(tmp_path: Path, data: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_suite(suite_file(tmp_path / "suite.yaml", data))


def test_what_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_suite(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RequestError, match="is no YAML"):
        read_suite(tmp_path / "bad.yaml")


def test_the_text_is_found_where_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = read_suite(SMOKE)[0]
    beside = suite_file(tmp_path / "suite.yaml", smoke())
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"does not hold train.txt, valid.txt, test.txt; .*--data"):
        text_folder(suite, beside, None)
    there = texts(tmp_path / "text")
    assert text_folder(suite, beside, there) == there
    monkeypatch.setenv(FOLDER, str(there))
    assert text_folder(suite, beside, None) == there
    with pytest.raises(RequestError, match="does not hold"):
        text_folder(suite, beside, tmp_path)


def test_arms_cost_the_same_to_within_a_step(tmp_path: Path) -> None:
    suite = read_suite(SMOKE)[0]
    courses = courses_of(suite, texts(tmp_path / "text"), growing())
    for course in courses.values():
        assert abs(course.flops - course.budget) <= suite.batch_tokens * course.sizes[-1].flops_per_token / 2 * 1.01
        ends = [*course.grows, course.steps]
        spent = [(b - a) * s.flops_per_token for a, b, s in zip([0, *course.grows], ends, course.sizes, strict=True)]
        asked = 0.0
        if course.arm.name == "asked":  # the old model's loss on two batches; the new one's, forward, five times
            first, _, last = (size.flops_per_token for size in course.sizes)
            matrices = 2 * 24 * 24 * (32 - 16)  # of GradMax, which stand for the new units
            asked = suite.batch_tokens * (2 * (first + matrices) + 5 * last / 3)
            assert asked > suite.batch_tokens * last  # which a course without it would be off by
        assert course.flops == pytest.approx(sum(spent) * suite.batch_tokens + asked, rel=1e-12)
    assert courses["small"].steps > courses["grown"].steps > courses["scratch"].steps == courses["grown-at-0"].steps
    assert courses["scratch-half"].budget == courses["scratch"].budget / 2
    assert courses["grown"].grows == (round(0.4 * courses["grown"].steps),)


def test_what_arms_share_ends_before_they_part(tmp_path: Path) -> None:
    """A step before the growth, or where the learning rate begins to fall; arms without company share nothing."""
    suite = read_suite(SMOKE)[0]
    courses = courses_of(suite, texts(tmp_path / "text"), growing())
    small, grown, nothing = (courses[name] for name in ("small", "grown", "nothing"))
    assert grown.trunk == grown.grows[0] - 1 and nothing.trunk == nothing.grows[0] - 1
    assert small.trunk == int(0.75 * small.steps)
    assert trunk_points(courses, small.start) == [grown.trunk, nothing.trunk, small.trunk]
    assert courses["grown-at-0"].trunk == 0
    data = smoke()
    data["arms"] = [arm for arm in data["arms"] if arm["name"] not in ("small", "nothing")]
    alone = courses_of(Suite.model_validate(data), tmp_path / "text", growing())
    assert alone["grown"].trunk == 0


def test_each_rate_falls_over_the_same_share_of_its_own_steps(tmp_path: Path) -> None:
    suite = read_suite(SMOKE)[0]
    data = texts(tmp_path / "text")
    for course in courses_of(suite, data, growing()).values():
        recipe = recipe_of(suite, data, course, 0.01, 0, None)
        assert recipe["budget"] == {"steps": course.steps} and recipe["learning_rate"]["decay"] == suite.decay
        assert recipe["learning_rate"]["warmup"] * course.steps == pytest.approx(suite.warmup_steps)


def test_a_growth_within_the_warm_up_is_refused(tmp_path: Path) -> None:
    suite = Suite.model_validate(changed(grown={"grow": [{"at": 0.05}]}))
    with pytest.raises(RequestError, match=r"arm grown: has \d+ steps .*the warm-up takes 3"):
        courses_of(suite, texts(tmp_path / "text"), growing())


def test_a_method_that_cannot_is_refused_by_the_arms_name(tmp_path: Path) -> None:
    suite = Suite.model_validate(changed(grown={"grow": [{"at": 0.4, "method": "stack"}], "step_zero": None}))
    with pytest.raises(RequestError, match=r"^arm grown: grow\[0\]"):
        courses_of(suite, texts(tmp_path / "text"), growing())


def test_the_hash_knows_everything_but_the_place_of_the_text() -> None:
    one = Suite.model_validate(smoke())
    assert suite_hash(one) == suite_hash(Suite.model_validate({**smoke(), "data": {"folder": "elsewhere"}}))
    assert suite_hash(one) != suite_hash(Suite.model_validate({**smoke(), "rates": [0.003, 0.02]}))
    other = smoke()
    other["analysis"]["margin"] = 0.01
    assert suite_hash(one) != suite_hash(Suite.model_validate(other))


def asks_a_loss(event: Event) -> bool:
    return any(way.fill == "gradient" for way in method_named(event.method).ways.values())


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_committed_suites_are_read(path: Path) -> None:
    suite = read_suite(path)[0]
    assert suite.name == path.stem
    assert len(suite.seeds) >= (2 if path == SMOKE else 3) and len(suite.arms) >= (6 if path == SMOKE else 8)
    grown = [arm for arm in suite.arms if arm.model is None and arm.grow and arm.grow[0].at and not arm.same_as]
    late = [arm for arm in grown if any(event.fade or asks_a_loss(event) for event in arm.grow)]  # no run has it before
    assert len(grown) > len(late) and all(arm.step_zero for arm in grown if arm not in late)
    json.dumps(Suite.model_json_schema())


def test_a_growth_says_what_an_entry_of_a_recipe_can_say() -> None:
    own = {"sequence", "stages", "multiple_of"}
    assert set(Event.model_fields) == set(Entry.model_fields) - own


@pytest.mark.parametrize(
    "asking", [{"method": "gradmax", "probe_batches": 3}, {"method": "gated", "fade": "line-search"}]
)
def test_a_growth_that_asks_a_loss_is_of_a_run(asking: dict[str, Any]) -> None:
    suite = read_suite(SMOKE)[0]
    arm = next(arm for arm in suite.arms if arm.name == "grown")
    entry = Entry.model_validate(entry_of(suite, arm, Event.model_validate({"at": 0.4, **asking}), 7))
    assert {name: getattr(entry, name) for name in asking} == asking
    with pytest.raises(ValidationError, match="is of a growth in mid-run"):
        Event.model_validate({"at": 0, **asking})


def test_before_the_first_step_there_is_no_loss_to_ask(tmp_path: Path) -> None:
    text = texts(tmp_path / "text")
    for event, late in (({"method": "gradmax"}, {}), ({"method": "ligo", "allow_change": True}, {"lift_steps": 2})):
        for at, more in ((0, {}), (0.4, late)):
            grown = {"start": {"intermediate_size": 16}, "grow": [{"at": at, **event, **more}], "step_zero": None}
            suite = Suite.model_validate(changed(grown=grown))
            if at:
                assert courses_of(suite, text, growing())["grown"].grows[0] > 0
                continue
            with pytest.raises(RequestError, match=rf"^arm grown: grow\[0\]: {event['method']} asks a loss of a run"):
                courses_of(suite, text, growing())
