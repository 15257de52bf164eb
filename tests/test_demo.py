"""The demo from end to end in a few steps, and that it fails where a growth is corrupted."""

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from growformer import api
from growformer.cli.demo import demo
from growformer.errors import ChangedError, GrowformerError, RequestError, SourceError, TargetError
from growformer.planning import Applier, Block
from growformer.proof.bar import BAR
from growformer.report.demo import render, write_report
from growformer.training import demo as demo_run
from growformer.training.loop import bits_per_byte
from growformer.training.text import is_held_out, library_text, spread

STEPS = 12


class Page(HTMLParser):
    """Counts tags and classes, and keeps the cells of the table and every attribute that could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        for name, value in attrs:
            if name == "class":
                self.count.update(f".{word}" for word in (value or "").split())
            if name in ("src", "href", "xlink:href", "srcset", "data"):
                self.fetched.append(f"{tag} {value}")
        if tag == "td":
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data.strip() + " "


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and wait long for it beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One short run into an empty folder: the folder, and what was printed."""
    out = tmp_path_factory.mktemp("demo")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        demo(out=out, steps=STEPS, seed=0)
    return out, said.getvalue()


@pytest.fixture(scope="module")
def results(ran: tuple[Path, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ran[0] / "results.json").read_text())
    return found


def test_five_events_grow_every_size_and_are_proved(results: Mapping[str, Any]) -> None:
    events = results["events"]
    assert [event["name"] for event in events] == ["MLP", "heads", "head dim", "hidden", "layers"]
    assert [event["step"] for event in events] == [2, 4, 6, 8, 10]
    start, final = results["start"], results["final"]
    assert all(final["sizes"][name] > size for name, size in start["sizes"].items())
    counts = [start["parameters"], *(event["parameters"][1] for event in events), final["parameters"]]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    for event in events:
        measured = event["proof"]["measured"]
        assert event["proof"]["exit_code"] == 0
        assert [claim["name"] for claim in event["proof"]["claims"]] == ["algebra", "stored", "alive"]
        assert all(claim["passed"] for claim in event["proof"]["claims"])
        assert measured["relative"] <= BAR
        assert measured["dead"] == 0 and measured["new_entries"] == event["parameters"][1] - event["parameters"][0]
    losses = [start["bits_per_byte"], *(event["bits_per_byte"][0] for event in events), final["bits_per_byte"]]
    falls = [before - after for before, after in pairwise(losses)]
    # Two steps of training lower the loss; a growth only rounds.
    jumps = [abs(before - after) for before, after in (event["bits_per_byte"] for event in events)]
    assert min(falls) > 100 * max(jumps)


def test_everything_said_is_in_the_results(ran: tuple[Path, str], results: Mapping[str, Any]) -> None:
    said = ran[1]
    for event in results["events"]:
        for loss in event["bits_per_byte"]:
            assert said.count(f"{loss:.6f}") >= 2
        assert f"{event['parameters'][0]:,} -> {event['parameters'][1]:,}" in said
        assert f"{event['proof']['measured']['relative']:.1e}" in said
    assert said.count("| holds") == len(results["events"])
    assert f"{results['final']['bits_per_byte']:.3f} bits per byte" in said
    text = library_text()
    assert results["text"]["bytes"] == [len(text.train), len(text.held_out)]


def test_the_model_loads_with_stock_transformers(ran: tuple[Path, str], results: Mapping[str, Any]) -> None:
    folder = ran[0] / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = spread(library_text().held_out, 128, 128)
    assert tokens.numel() == results["final"]["bytes"]
    assert bits_per_byte(model, tokens) == pytest.approx(results["final"]["bits_per_byte"], rel=1e-6)
    assert model.num_parameters() == results["final"]["parameters"]
    assert "A token is a byte" in (folder / "README.md").read_text()
    prompt = torch.tensor([list(b"def __init__(self")])
    text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3)
    assert text.shape[1] == prompt.shape[1] + 3


def test_the_report_has_the_marks_and_the_table(ran: tuple[Path, str], results: Mapping[str, Any]) -> None:
    html = (ran[0] / "report.html").read_text()
    page = Page(html)
    events = results["events"]
    drawings = 4
    assert page.count[".mark"] == drawings * len(events)
    assert page.count[".holds"] == len(events) and page.count[".fails"] == 0
    columns = len(page.cells) // len(events)
    for i, event in enumerate(events):
        row = " ".join(page.cells[i * columns : (i + 1) * columns])
        for wanted in (event["name"], *(f"{loss:.6f}" for loss in event["bits_per_byte"])):
            assert wanted in row
        assert f"{event['proof']['measured']['relative']:.1e}" in row
    # One file: nothing is fetched, and nothing runs.
    assert page.fetched == [] and page.count["script"] == page.count["link"] == 0
    assert "url(" not in html and "@import" not in html and "nan" not in html.lower().split()


def test_the_report_is_made_from_the_results_alone(ran: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = ran
    write_report(out / "results.json", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (out / "report.html").read_bytes()


def test_the_report_shows_a_failed_proof(results: Mapping[str, Any]) -> None:
    changed = json.loads(json.dumps(results))
    changed["events"][2]["proof"]["exit_code"] = 1
    page = Page(render(changed))
    assert page.count[".holds"] == len(changed["events"]) - 1
    assert page.count[".fails"] == 2


@pytest.mark.parametrize("steps", [6, 7, 40, 999, 1500, 20_000])
def test_the_report_takes_any_length(steps: int, results: Mapping[str, Any]) -> None:
    stretched = json.loads(json.dumps(results))
    stretched["steps"] = steps
    assert Page(render(stretched)).count["svg"] == 4 + 2


@pytest.mark.parametrize("text", ['{"format": 99}', "[]", "{"])
def test_other_results_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(SourceError, match=r"results\.json"):
        write_report(tmp_path / "results.json", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def refused(out: Path, error: type[GrowformerError], match: str, steps: int = 6) -> GrowformerError:
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(error, match=match) as caught:
        demo(out=out, steps=steps, seed=0)
    assert not (out / "results.json").exists() and not (out / "report.html").exists()
    return caught.value


def test_a_taken_folder_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_run, "library_text", lambda: pytest.fail("training began"))
    (tmp_path / "mine.txt").write_text("keep")
    for taken in (tmp_path, tmp_path / "mine.txt"):
        error = refused(taken, TargetError, "exists already")
        assert error.exit_code == 2 and str(taken) in str(error)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "out", RequestError, "6 or more", steps=5).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_left_out_factor_fails_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Wrong consistently: the plan that runs and the plan that is proved both leave out sqrt(k'/k).
    honest = Applier._old

    def forgetful(self: Applier, tensor: Any, block: Block) -> torch.Tensor:
        if tensor.name.endswith("layers.1.self_attn.k_proj.weight"):
            block = replace(block, factor=block.factor / block.factor)
        return honest(self, tensor, block)

    monkeypatch.setattr(Applier, "_old", forgetful)
    error = refused(tmp_path / "out", ChangedError, r"head dim \(head_dim=24\) at step 3.*algebra")
    assert error.exit_code == 1


def test_a_zeroed_block_fails_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Applier._old

    def zeroed(self: Applier, tensor: Any, block: Block) -> torch.Tensor:
        values = honest(self, tensor, block)
        return values * 0 if tensor.name.endswith("layers.0.mlp.up_proj.weight") else values

    monkeypatch.setattr(Applier, "_old", zeroed)
    refused(tmp_path / "out", ChangedError, r"MLP \(intermediate_size=192\) at step 1.*algebra")


def test_weights_other_than_the_proved_ones_fail_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = api.grow

    def off_by_one_bit(model: Any, *args: Any, **request: Any) -> None:
        honest(model, *args, **request)
        weight = model.get_parameter("model.norm.weight").data
        weight[3] = math.nextafter(float(weight[3]), 2) + 2**-23

    monkeypatch.setattr(api, "grow", off_by_one_bit)
    refused(tmp_path / "out", ChangedError, r"stored: other numbers.*model\.norm\.weight")


def test_new_entries_that_cannot_learn_fail_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Applier._fill
    monkeypatch.setattr(Applier, "_fill", lambda *args: honest(*args) * 0)
    refused(tmp_path / "out", ChangedError, r"MLP.*alive: dead: .*mlp")


def test_the_text_is_split_by_file(tmp_path: Path) -> None:
    names = [f"m{i}.py" for i in range(40)] + ["test/inside.py", "site-packages/x.py", "pkg/test/y.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"<{name}>".encode())
    text = library_text(tmp_path)
    train, held_out = (bytes(part.tolist()).decode() for part in (text.train, text.held_out))
    assert sum(text.files) == 40 and 0 < text.files[1] < text.files[0]
    assert "test" not in train + held_out and "site-packages" not in train + held_out
    for name in names[:40]:
        assert (f"<{name}>" in held_out) == is_held_out(name)
        assert (f"<{name}>" in train) != is_held_out(name)
    with pytest.raises(SourceError, match="0 training and 0 held-out"):
        library_text(tmp_path / "site-packages" / "none")
