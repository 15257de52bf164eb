"""What the commands print: plans, families and methods; for people, for machines, and on a terminal."""

import json
import os
import pty
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from tiny import save

from growformer import api
from growformer.cli.main import app
from growformer.families import FAMILIES
from growformer.methods import METHODS
from growformer.planning import Plan
from growformer.planning.sizes import growable
from growformer.report.methods import COLUMNS

from .harness import Cli, state

SCRIPT = Path(sysconfig.get_path("scripts"), "growformer")


def cells(text: str) -> list[list[str]]:
    """The cells of every table row in a text, without the spaces that set them."""
    rows = (line for line in text.splitlines() if line.startswith("|") and not line.startswith("|-"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


def test_a_plan_for_people(cli: Cli) -> None:
    cli.source()
    before = state(cli.root)
    said = cli(*cli.of("plan", "hidden_size=36", "intermediate_size=40", "num_hidden_layers=4"))
    assert (said.code, said.err) == (0, "") and state(cli.root) == before
    made = api.plan(cli.src, hidden_size=36, intermediate_size=40, num_hidden_layers=4)
    old, new = made.parameters
    assert said.out.startswith(f"llama, method paper: {old:,} -> {new:,} parameters\n")
    rows = cells(said.out)
    assert ["tensors", "how many", "shape", "grown", "fidelity", "factor"] in rows
    assert ["model.embed_tokens.weight", "1", "37 x 24", "37 x 36", "identical", "1"] in rows
    assert ["model.layers.{layer}.mlp.up_proj.weight", "3", "28 x 24", "40 x 36", "identical", "1"] in rows
    assert ["model.layers.{layer}.mlp.up_proj.weight", "1", "-", "40 x 36", "new", ""] in rows
    assert ["model.layers.{layer}.mlp.down_proj.weight", "1", "-", "36 x 40", "new, zero", ""] in rows
    assert ["model.norm.weight", "1", "24", "36", "rounded", "sqrt(2/3)"] in rows
    assert ["config.json", "was", "becomes"] in rows
    assert ["hidden_size", "24", "36"] in rows and ["num_hidden_layers", "3", "4"] in rows
    assert ["rms_norm_eps", "0.001", str(1e-3 * 24 / 36)] in rows
    assert not any(row[0] == "head_dim" for row in rows)
    count = made.fidelity
    assert f"Fidelity: {count['identical']} tensors identical, 0 scaled" in said.out
    assert f"{count['rounded']} rounded once, {count['new']} new." in said.out
    # Two tables in a row are one in Markdown.
    assert re.search(r"\|\n\n\| config.json", said.out)


def test_what_moves_along_and_what_is_dead_is_said(cli: Cli) -> None:
    cli.source("gpt2")
    out = cli(*cli.of("plan", "n_head=6")).out
    assert "Moves along: n_embd 24 -> 36: it is n_head x the head size, which stays 6\n" in out
    said = cli(*cli.of("plan", "n_embd=48")).out
    assert "Moves along: head size 6 -> 12 (key and value)" in said and "Dead" not in said


def test_a_plan_for_machines(cli: Cli) -> None:
    cli.source()
    words = ("head_dim=14", "num_hidden_layers=5", "--layers-at", "0,4", "--seed", "7")
    said = cli(*cli.of("plan", *words, "--json"))
    data = json.loads(said.out)
    assert said.code == 0 and said.err == ""
    made = Plan.from_json(data)
    assert made.to_json() == data
    assert made.layers == {"layer": [None, 0, 1, 2, None]} and made.seed == 7
    direct = api.plan(cli.src, head_dim=14, num_hidden_layers=5, layers_at=[0, 4], seed=7)
    assert json.loads(direct.dumps()) == data
    assert json.loads(api.plan(cli.src, head_dim=14, num_hidden_layers=5, seed=7).dumps()) != data


def test_a_plan_is_saved(cli: Cli) -> None:
    cli.source()
    file = cli.root / "plan.json"
    before = state(cli.root)
    said = cli(*cli.of("plan", "hidden_size=48", "--save", file))
    assert said.code == 0 and said.out.startswith("llama, method paper")
    assert state(cli.root).keys() - before.keys() == {"plan.json"} and before.items() <= state(cli.root).items()
    assert json.loads(file.read_text()) == json.loads(cli(*cli.of("plan", "hidden_size=48", "--json")).out)


@pytest.mark.parametrize(
    ("kind", "request_"),
    [
        ("llama", {"hidden_size": 36, "head_dim": 14, "num_hidden_layers": 5}),
        ("qwen3", {"hidden_size": 36, "head_dim": 26, "num_hidden_layers": 5}),
        ("gpt2", {"n_embd": 48, "n_inner": 200}),
    ],
)
def test_a_config_to_grow_to_is_the_same_as_its_sizes(cli: Cli, kind: str, request_: dict[str, int]) -> None:
    """Whether it is the source's with new sizes, or that of a model grown so: as a file, or as a folder."""
    cli.source(kind)
    words = [f"{key}={value}" for key, value in request_.items()]
    asked = json.loads(cli(*cli.of("plan", *words, "--json")).out)
    folder = cli.root / "to"
    folder.mkdir()
    source = json.loads((cli.src / "config.json").read_text())
    layers = {"layer_types": ["full_attention"] * 5} if "layer_types" in source else {}
    for config in (source | request_ | layers, asked["target_config"]):
        (folder / "config.json").write_text(json.dumps(config))
        for to in (folder, folder / "config.json"):
            said = cli(*cli.of("plan", "--to", to, "--json"))
            assert said.code == 0, said.err
            got = json.loads(said.out)
            assert {k: v for k, v in got.items() if k != "request"} == {
                k: v for k, v in asked.items() if k != "request"
            }
            assert request_.items() <= got["request"].items()


def test_a_config_to_grow_to_and_one_more_size(cli: Cli) -> None:
    cli.source()
    to = cli.root / "to.json"
    to.write_text(json.dumps(json.loads((cli.src / "config.json").read_text()) | {"hidden_size": 48}))
    both = json.loads(cli(*cli.of("plan", "--to", to, "intermediate_size=40", "--json")).out)
    assert both["request"] == {"hidden_size": 48, "intermediate_size": 40}


def test_a_config_to_grow_to_whose_experts_are_split(cli: Cli) -> None:
    save(cli.root / "moe", "mixtral", num_local_experts=3, num_experts_per_tok=2)
    request = {"intermediate_size": 14, "num_local_experts": 6, "num_experts_per_tok": 4}
    to = cli.root / "to.json"
    to.write_text(json.dumps(json.loads((cli.root / "moe" / "config.json").read_text()) | request))
    words = [f"{name}={value}" for name, value in request.items()]
    for said in (cli("plan", cli.root / "moe", "--to", to, "--json"), cli("plan", cli.root / "moe", *words, "--json")):
        assert said.code == 0, said.err
        assert json.loads(said.out)["request"] == request and json.loads(said.out)["moved"] == []
        assert json.loads(said.out)["axes"]["mlp"]["slices"] == 2


def test_an_expansion_for_machines_and_for_people(cli: Cli) -> None:
    cli.source()
    said = cli(*cli.of("expand", "hidden_size=48", "--prove", "structure", "--json"))
    data = json.loads(said.out)
    assert (said.code, said.err, data["exit_code"], data["out"]) == (0, "", 0, str(cli.out))
    assert {c["name"]: c["passed"] for c in data["claims"] if c["passed"] is not None} == {"structure": True}
    said = cli("expand", cli.src, cli.root / "other", "hidden_size=48", "--prove", "structure")
    assert said.code == 0 and said.out.startswith(f"{cli.root}/other: 16,632 -> 33,264 parameters, ")
    assert [row[3] for row in cells(said.out)][:2] == ["verdict", "holds"]


def test_families(cli: Cli) -> None:
    rows = cells(cli("families").out)
    assert rows[0] == ["family", "model_type", "grows by"]
    assert [row[0] for row in rows[1:]] == list(FAMILIES)
    assert rows[1][:2] == ["llama", "llama"]
    assert re.sub(r" \([^)]*\)", "", rows[1][2]) == ", ".join(growable(FAMILIES["llama"]))
    data = json.loads(cli("families", "--json").out)
    assert [entry["name"] for entry in data] == list(FAMILIES)
    grows = {entry["name"]: entry["grows"] for entry in data}
    assert grows["gpt2"] == growable(FAMILIES["gpt2"])


@pytest.mark.parametrize("name", FAMILIES)
def test_one_family(cli: Cli, name: str) -> None:
    said = cli("families", name)
    found = cells(said.out)
    axes, tensors = dict(FAMILIES[name].axes), dict(FAMILIES[name].tensors)
    assert said.code == 0 and f"{name}: tensors" in said.out
    assert [row[0] for row in found] == ["axis", *axes, "tensor", *tensors]
    data = json.loads(cli("families", name, "--json").out)
    assert data["tensors"] == tensors and list(data["axes"]) == list(axes)


def test_methods(cli: Cli) -> None:
    rows = cells(cli("methods").out)
    assert rows[0] == list(COLUMNS)
    assert [row[0] for row in rows[1 : len(METHODS) + 1]] == list(METHODS)
    told = json.loads(cli("methods", "--json").out)
    assert [entry["name"] for entry in told["methods"]] == list(METHODS)


def test_help_lists_the_commands(cli: Cli) -> None:
    said = cli("--help")
    names = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}
    assert said.code == 0 and {"plan", "expand", "verify", "families", "methods"} <= names
    assert all(re.search(rf"\b{name}\b", said.out) for name in names)
    for name in names:
        assert cli(name, "--help").out.lstrip().startswith(f"Usage: growformer {name}")


def test_help_and_lists_wait_for_no_torch() -> None:
    code = (
        "import sys\nfrom growformer.cli import main\n"
        "for words in (['--help'], ['methods'], ['families', 'llama']):\n"
        "    sys.argv = ['growformer', *words]\n"
        "    try: main.run()\n"
        "    except SystemExit as left: assert not left.code\n"
        "print('loaded:', sorted({'torch', 'transformers'} & set(sys.modules)))\n"
        "import torch\nprint('control:', 'torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("loaded: []\ncontrol: True\n")


def terminal(monkeypatch: pytest.MonkeyPatch, *streams: str) -> None:
    """Let streams say that they are a terminal, wide enough that no cell is folded."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for stream in streams:
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True)


def test_a_plan_on_a_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.source()
    plain = cli(*cli.of("plan", "hidden_size=36"))
    assert "\x1b[" not in plain.out
    terminal(monkeypatch, "stdout")
    rich = cli(*cli.of("plan", "hidden_size=36"))
    assert rich.code == 0 and "\x1b[1m" in rich.out
    bare = re.sub(r"\x1b\[[0-9;]*m", "", rich.out)
    assert cells(bare) == cells(plain.out) and len(cells(bare)) > 10


def test_an_expansion_on_a_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A progress bar on the error stream that leaves nothing behind, and coloured verdicts."""
    cli.source()
    terminal(monkeypatch, "stdout", "stderr")
    said = cli(*cli.of("expand", "hidden_size=36", "--prove", "structure"))
    assert said.code == 0 and "\x1b[32mholds" in said.out
    assert "prove: structure" in said.err and "Traceback" not in said.err


def test_a_refusal_on_a_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.source()
    terminal(monkeypatch, "stdout", "stderr")
    said = cli(*cli.of("plan", "hidden_size=big"))
    assert (said.code, said.out) == (2, "")
    assert said.err == "growformer: hidden_size=big: a size is a whole number, such as hidden_size=1024\n"


def test_the_installed_command_on_a_real_terminal_and_into_a_pipe() -> None:
    piped = subprocess.run([SCRIPT, "methods"], capture_output=True, text=True, check=True)
    assert "\x1b[" not in piped.stdout and "| paper" in piped.stdout
    ours, theirs = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"}
    with subprocess.Popen([SCRIPT, "methods"], stdout=theirs, stderr=subprocess.PIPE, env=env) as process:
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 4096):
                shown += data
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(ours)
        assert process.stderr is not None and process.stderr.read() == b""
    assert process.returncode == 0 and b"\x1b[1m" in shown and b"paper" in shown


def test_what_is_chosen_is_said_and_recorded(cli: Cli) -> None:
    cli.source()
    said = cli(*cli.of("plan", "head_dim=14", "--rope", "longrope"))
    assert said.code == 0
    assert "Note: rope_type default -> longrope: the frequencies of 7 pairs are listed one by one\n" in said.out
    assert "Note: rope=longrope: llama.cpp's converter drops the list" in said.out
    plain = cli(*cli.of("plan", "head_dim=14"))
    assert "longrope" not in plain.out and "rope_theta 10000 -> " in plain.out
    data = json.loads(cli(*cli.of("plan", "head_dim=20", "--rope", "strided", "--json")).out)
    assert data["request"] == {"head_dim": 20, "rope": "strided"}
    assert json.loads(api.plan(cli.src, head_dim=20, rope="strided").dumps()) == data
