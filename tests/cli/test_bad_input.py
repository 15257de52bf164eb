"""A bad request is refused in one clear message, before anything is written: exit code 2, nothing left behind."""

import json
import os
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growformer import api
from growformer.api import folders
from growformer.errors import RequestError
from growformer.families import FAMILIES
from growformer.planning.sizes import MOST_CHANNELS, MOST_LAYERS, growable

from .harness import Cli, state, suggestions

COMMANDS = pytest.mark.parametrize("command", ["plan", "expand"])

# Keywords of the Python call: as keys they would collide with its arguments.
PARAMETERS = ("source", "src", "out", "self", "method", "seed", "layers_at", "dtype", "progress", "prove_level")

# fmt: off
REQUESTS = [
    ("", "nothing was asked; llama grows by hidden_size=SIZE, .*num_hidden_layers=SIZE, vocab_size=SIZE"),
    ("hiden_size=48", "unknown key hiden_size: did you mean hidden_size"),
    ("n_embd=48", "unknown key n_embd: did you mean hidden_size"),
    ("layers=5", "unknown key layers: did you mean num_hidden_layers"),
    ("zzz=48", "unknown key zzz: llama grows by hidden_size, "),
    ("vocab_size=36", "vocab_size=36 is smaller than the source's 37; growing never takes away"),
    *((f"{key}=1", f"unknown key {key}: ") for key in PARAMETERS),
    ("hidden_size=big", "hidden_size=big: a size is a whole number, such as hidden_size=1024"),
    ("hidden_size=48.0", "hidden_size=48.0: a size is a whole number"),
    ("hidden_size=1e3", "hidden_size=1e3: a size is a whole number"),
    ("hidden_size=0x30", "hidden_size=0x30: a size is a whole number"),
    ("hidden_size=1_000", "hidden_size=1_000: a size is a whole number"),
    ("hidden_size=+48", r"hidden_size=\+48: a size is a whole number"),
    ("hidden_size=٤٨", "hidden_size=٤٨: a size is a whole number"),
    ("hidden_size=-3", "hidden_size=-3: a size is a positive whole number"),
    ("hidden_size=0", "hidden_size=0: a size is a positive whole number"),
    ("hidden_size=16", "hidden_size=16 is smaller than the source's 24; growing never takes away"),
    ("hidden_size=24", "hidden_size=24 is the source's own size; ask for a larger one"),
    ("hidden_size=48 hidden_size=36", "hidden_size is asked for twice: 48 and 36"),
    ("hidden_size", "'hidden_size': a request is KEY=VALUE, such as hidden_size=1024"),
    ("hidden_size=", "'hidden_size=': a request is KEY=VALUE"),
    ("=48", "'=48': a request is KEY=VALUE"),
    ("head_dim=13", "head_dim=13: rotary positions turn channels in pairs; head_dim=14 works"),
    ("head_dim=9", "head_dim=9 is smaller than the source's 10"),
    ("head_dim=100", r"rope_theta would become 10000\^\(100/10\), beyond float32.*; head_dim=96 works"),
    ("hidden_size=26", "of num_attention_heads=4, which llama's config class refuses; hidden_size=28 works"),
    ("num_key_value_heads=3", "num_attention_heads=4 is no multiple of num_key_value_heads=3; "),
    ("num_attention_heads=5", "num_attention_heads=5 is no multiple of num_key_value_heads=2; "),
    ("num_hidden_layers=5 --layers-at a,b", "--layers-at a,b: the places of the new layers are numbers, such as 1,3,5"),
    ("num_hidden_layers=5 --layers-at 1,", "--layers-at 1,: the places of the new layers are numbers"),
    ("num_hidden_layers=5 --layers-at 1,1", r"places \[1, 1\] should be 2 different numbers from 0 to 4"),
    ("num_hidden_layers=5 --layers-at 1,5", r"places \[1, 5\] should be 2 different numbers from 0 to 4"),
    ("num_hidden_layers=5 --layers-at -1,2", r"places \[-1, 2\] should be 2 different numbers"),
    ("num_hidden_layers=5 --layers-at 1", r"places \[1\] should be 2 different numbers"),
    ("hidden_size=48 --layers-at 1", "new layers were placed, but no new layer was asked for"),
    ("hidden_size=48 --method papr", r"method .papr. is unknown; did you mean paper\? growformer methods lists"),
]
GPT2_REQUESTS = [
    ("hidden_size=48", "unknown key hidden_size: did you mean n_embd"),
    ("num_attention_heads=8", "unknown key num_attention_heads: did you mean n_head"),
    ("head_dim=9", "head_dim: gpt2 has no such field: its head size is n_embd / n_head; ask for n_embd="),
    ("n_positions=16", "n_positions=16 is smaller than the source's 32; growing never takes away"),
    ("n_embd=26", "n_embd=26 is no multiple of n_head=4; n_embd=28 works"),
    ("n_embd=25 n_head=6", "n_embd=25 is no multiple of n_head=6; n_embd=36 works"),
    ("n_embd=24 n_head=12", "makes the head size 2, smaller than the source's 6; n_embd=72 works"),
]
OPTIONS = [
    ("--dtype int8", "dtype='int8' is unknown; there are float32, float64, bfloat16, float16"),
    ("--prove half", "prove='half' is unknown; there are auto, structure, full"),
    ("--max-shard-size 5XB", "'5XB' is no size in bytes; write a number and one of B, KB, MB"),
    ("--max-shard-size 0", "'0' is no size in bytes"),
    ("--max-shard-size -5GB", "'-5GB' is no size in bytes"),
]
# fmt: on


@COMMANDS
@pytest.mark.parametrize(("words", "says"), REQUESTS, ids=[words or "nothing" for words, _ in REQUESTS])
def test_requests(cli: Cli, command: str, words: str, says: str) -> None:
    cli.source()
    cli.refused(*cli.of(command, *words.split()), says=says)


@COMMANDS
@pytest.mark.parametrize(("words", "says"), GPT2_REQUESTS)
def test_requests_of_gpt2(cli: Cli, command: str, words: str, says: str) -> None:
    cli.source("gpt2")
    cli.refused(*cli.of(command, *words.split()), says=says)


@pytest.mark.parametrize(("words", "says"), OPTIONS)
def test_options(cli: Cli, words: str, says: str) -> None:
    cli.source()
    cli.refused(*cli.of("expand", "hidden_size=48", *words.split()), says=says)


@COMMANDS
@pytest.mark.parametrize("words", ["--bogus", "--seed x"])
def test_usage(cli: Cli, command: str, words: str) -> None:
    """What typer itself refuses has its own form, and the same exit code."""
    cli.source()
    before = state(cli.root)
    said = cli(*cli.of(command, "hidden_size=48", *words.split()))
    assert said.code == 2 and said.out == "" and said.err.startswith(f"Usage: growformer {command}")
    assert state(cli.root) == before


@COMMANDS
def test_a_growth_that_cannot_learn(cli: Cli, command: str) -> None:
    """`plan` shows it, `expand` refuses it, and names the size that learns."""
    cli.source("qwen3")
    if command == "plan":
        assert "Dead: head_dim 10 -> 14" in cli(*cli.of("plan", "head_dim=14")).out
        return
    message = cli.refused(*cli.of("expand", "head_dim=14"), says="zero times zero has no gradient.*--allow-dead")
    assert suggestions(message) == [{"head_dim": 20}]
    assert "Dead: " not in cli(*cli.of("plan", "head_dim=20")).out


@COMMANDS
@pytest.mark.parametrize(
    ("field", "most"),
    [("hidden_size", MOST_CHANNELS), ("intermediate_size", MOST_CHANNELS), ("num_hidden_layers", MOST_LAYERS)],
)
@pytest.mark.parametrize("size", [10**6, 10**9, 10**18])
def test_absurd_sizes_are_refused_at_once(cli: Cli, command: str, field: str, most: int, size: int) -> None:
    cli.source()
    start = time.monotonic()
    cli.refused(*cli.of(command, f"{field}={size}"), says=f"{field}={size}: at most {most} is planned")
    assert time.monotonic() - start < 10


def test_a_number_too_long_to_print(cli: Cli) -> None:
    cli.source()
    message = cli.refused(*cli.of("plan", "hidden_size=" + "9" * 5000), says="a size is a whole number")
    assert len(message) < 200


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_the_disk_cannot_hold_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sizes that are planned: answered by `plan`, and refused by `expand` before a byte is written."""
    cli.source()
    words = [f"hidden_size={MOST_CHANNELS}", f"intermediate_size={MOST_CHANNELS}", "num_hidden_layers=100"]
    assert "16,632 -> 20.62T parameters" in cli(*cli.of("plan", *words)).out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 10**11))
    cli.refused(*cli.of("expand", *words), says="out: needs 82.5 TB, and its disk has 100.0 GB free; make room for")


SUGGESTED = [
    ("llama", "hidden_size=26", 1),
    ("llama", "num_key_value_heads=3", 2),
    ("llama", "num_key_value_heads=5", 1),
    ("llama", "num_attention_heads=5", 1),
    ("llama", "num_attention_heads=25", 2),
    ("llama", "num_attention_heads=7 num_key_value_heads=7", 1),
    ("llama", "num_attention_heads=9 num_key_value_heads=3", 2),
    ("llama", "num_attention_heads=6 num_key_value_heads=4", 2),
    ("llama", "head_dim=13", 1),
    ("llama", "head_dim=13 hidden_size=26", 1),
    ("llama", "head_dim=100", 1),
    ("llama", "head_dim=97 hidden_size=26", 1),
    ("llama-mqa", "num_attention_heads=15 num_key_value_heads=5 hidden_size=25", 2),
    ("llama-gqa", "num_key_value_heads=3", 1),  # divides its 6 heads, but splits groups of 3 into groups of 2
    ("qwen3", "head_dim=13", 1),
    ("gpt2", "n_embd=26", 1),
    ("gpt2", "n_embd=25 n_head=6", 1),
    ("gpt2", "n_head=12 n_embd=24", 1),
]


@pytest.mark.parametrize(("kind", "words", "count"), SUGGESTED)
def test_suggested_requests_work(cli: Cli, kind: str, words: str, count: int) -> None:
    cli.source(kind)
    message = cli.refused(*cli.of("plan", *words.split()), says=" works")
    asked = dict(word.split("=") for word in words.split())
    found = suggestions(message)
    assert len(found) == count, message
    for change in found:
        said = cli(*cli.of("plan", *(f"{key}={value}" for key, value in {**asked, **change}.items())))
        assert said.code == 0, (message, said.err)
        assert "Dead: " not in said.out


@pytest.mark.parametrize("kind", ["llama", "llama-gqa", "qwen3", "gpt2"])
def test_any_request_is_granted_or_refused_with_one_that_works(bases: dict[str, Path], kind: str) -> None:
    """A plan or a RequestError, never another error; and what a refusal names is granted."""
    config = json.loads((bases[kind] / "config.json").read_text())
    fields = growable(FAMILIES[config["model_type"]])
    sizes = st.integers(1, 8).flatmap(lambda n: st.integers(1, 12 * n))
    seen = {"granted": 0, "refused": 0}

    @settings(max_examples=60)
    @given(st.dictionaries(st.sampled_from(fields), sizes, min_size=1, max_size=3))
    def run(request: dict[str, int]) -> None:
        request = {k: (config.get(k) or 96) + v for k, v in request.items()}
        try:
            api.plan(bases[kind], **request)
            seen["granted"] += 1
        except RequestError as error:
            seen["refused"] += 1
            found = suggestions(str(error))
            assert found, error
            for change in found:
                api.plan(bases[kind], **{**request, **change})

    run()
    assert seen["granted"] and seen["refused"]


def test_suggestions_that_lie_are_seen(bases: dict[str, Path]) -> None:
    """Negative control of the two tests above: what they parse is put to the test."""
    (change,) = suggestions("growformer: head_dim=13: pairs; head_dim=15, hidden_size=28 works with the rest")
    assert change == {"head_dim": 15, "hidden_size": 28}
    assert suggestions("a is no multiple; b=2 or c=3, d=4 works") == [{"b": 2}, {"c": 3, "d": 4}]
    assert suggestions("hidden_size=16 is smaller than the source's 24; growing never takes away") == []
    with pytest.raises(RequestError):
        api.plan(bases["llama"], **change)


@pytest.mark.parametrize("kind", ["file", "empty folder", "full folder", "dangling link"])
def test_an_out_that_exists(cli: Cli, kind: str) -> None:
    cli.source()
    if kind == "file":
        cli.out.write_text("mine")
    elif kind == "dangling link":
        cli.out.symlink_to("gone")
    else:
        cli.out.mkdir()
        if kind == "full folder":
            (cli.out / "mine").write_text("mine")
    cli.refused(
        *cli.of("expand", "hidden_size=48"), says="/out: exists already and is left as it is; name a new folder"
    )


OUTS = [
    ("gone/out", "gone/out: its parent .*/gone is not a folder that exists; make it, or choose another OUT"),
    ("src/config.json/out", "its parent .*/src/config.json is not a folder that exists"),
    ("src", "/src: exists already"),
    ("src/../src", "/src: exists already"),
    ("src/out", "/src/out: is inside the source .*/src, which is left as it is; choose an OUT elsewhere"),
    ("link/out", "/link/out: is inside the source .*/src, which is left as it is"),
    ("o" * 300, "cannot be written: File name too long"),
]


@pytest.mark.parametrize(("out", "says"), OUTS, ids=[out[:20] for out, _ in OUTS])
def test_an_out_that_cannot_be(cli: Cli, out: str, says: str) -> None:
    cli.source()
    (cli.root / "link").symlink_to("src")
    cli.refused("expand", cli.src, cli.root / out, "hidden_size=48", says=says)


@pytest.mark.parametrize("out", ["src/out", "gone/out"])
def test_a_bad_out_is_told_before_the_work(cli: Cli, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.setattr(folders, "plan", lambda *_, **__: pytest.fail("planned"))
    cli.source()
    cli.refused("expand", cli.src, cli.root / out, "hidden_size=48", says="OUT")


def test_an_out_beside_a_source_of_the_same_beginning(cli: Cli) -> None:
    """Negative control: src-grown is not inside src."""
    cli.source()
    assert cli("expand", cli.src, cli.root / "src-grown", "hidden_size=48", "--prove", "structure").code == 0


WIDER = {"hidden_size": 48}
OTHER_BASE = {"rope_type": "default", "rope_theta": 5e5}
TO = [
    ({}, "to.json: every size is the source's own, so nothing is asked"),
    ({"hidden_size": 12}, "hidden_size=12 is smaller than the source's 24"),
    ({"hidden_size": "48"}, "to.json: transformers' LlamaConfig refuses it: .*'hidden_size' expected int, got str"),
    (WIDER | {"attention_dropout": 0.5}, "to.json: attention_dropout is 0.5 and the source's is 0.0; it is no size"),
    (WIDER | {"hidden_act": "gelu"}, "to.json: hidden_act is 'gelu' and the source's is 'silu'"),
    (WIDER | {"tie_word_embeddings": True}, "to.json: tie_word_embeddings is True and the source's is False"),
    (WIDER | {"rms_norm_eps": 1e-2}, "rms_norm_eps is 0.01, and growth to its sizes makes it 0.0005"),
    (WIDER | {"rope_parameters": OTHER_BASE}, "rope_parameters is {.*500000.0.*}, and growth .* makes it {.*10000.0"),
    (WIDER | {"model_type": "qwen3"}, "to.json: model_type 'qwen3' is not 'llama'"),
    (WIDER | {"model_type": "nope"}, "to.json: model_type 'nope' is none that the installed transformers knows"),
]


@COMMANDS
@pytest.mark.parametrize(("changes", "says"), TO)
def test_a_config_to_grow_to(cli: Cli, command: str, changes: dict[str, Any], says: str) -> None:
    to = cli.root / "to.json"
    to.write_text(json.dumps(json.loads((cli.source() / "config.json").read_text()) | changes))
    cli.refused(*cli.of(command, "--to", to), says=says)


@COMMANDS
def test_a_config_to_grow_to_that_cannot_be_read(cli: Cli, command: str) -> None:
    cli.source()
    to = cli.root / "to.json"
    cli.refused(*cli.of(command, "--to", to), says="to.json: cannot be read: No such file")
    cli.refused(*cli.of(command, "--to", cli.root), says="has no config.json")
    to.write_text("[1]")
    cli.refused(*cli.of(command, "--to", to), says="to.json: holds a JSON list, expected an object")
    shutil.copy(cli.src / "config.json", to)
    to.write_text(to.read_text().replace('"hidden_size": 24', '"hidden_size": 48'))
    cli.refused(
        *cli.of(command, "hidden_size=48", "--to", to), says="hidden_size is asked for and is in .*; say it once"
    )


@pytest.mark.parametrize(("name", "says"), [("gone/plan.json", "No such file"), ("src/config.json", "File exists")])
def test_a_plan_that_cannot_be_saved(cli: Cli, name: str, says: str) -> None:
    cli.source()
    cli.refused(*cli.of("plan", "hidden_size=48", "--save", cli.root / name), says=f"{name}: cannot be written: {says}")


def test_families_and_verify_refuse_in_the_same_way(cli: Cli) -> None:
    cli.source()
    cli.refused("families", "nope", says=f"family 'nope' is unknown; there are {', '.join(FAMILIES)}")
    cli.refused("verify", cli.src, cli.root / "gone", says="gone: does not exist")
    cli.refused("verify", cli.src, cli.src, says="growformer.json")


def test_a_good_request_passes_the_same_harness(cli: Cli) -> None:
    """Negative control: `plan` exits 0 and writes nothing, `expand` exits 0 and makes OUT and nothing else."""
    cli.source()
    before = state(cli.root)
    assert cli(*cli.of("plan", "hidden_size=48")).code == 0
    assert state(cli.root) == before
    said = cli(*cli.of("expand", "hidden_size=48", "--prove", "structure"))
    assert said.code == 0 and said.err == ""
    new = {name.split("/")[0] for name in state(cli.root).items() - before.items() for name in name[:1]}
    assert new == {"out"} and before.items() <= state(cli.root).items()
    assert {"config.json", "model.safetensors", "growformer.json", "README.md"} <= {p.name for p in cli.out.iterdir()}


def test_the_harness_sees_what_is_left_behind(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of `refused`: a good request, a file left behind and a second line all fail."""
    cli.source()
    with pytest.raises(AssertionError):
        cli.refused(*cli.of("plan", "hidden_size=48"), says="")
    cli.refused(*cli.of("plan"), says="nothing was asked")

    def leaves(*_: Any, **__: Any) -> None:
        (cli.src / "left").touch()
        raise RequestError("refused")

    def two_lines(*_: Any, **__: Any) -> None:
        raise RequestError("refused\nand again")

    for wrong in (leaves, two_lines):
        monkeypatch.setattr(api, "plan", wrong)
        with pytest.raises(AssertionError):
            cli.refused(*cli.of("plan", "hidden_size=48"), says="refused")


def test_the_installed_command_refuses_in_the_same_way(cli: Cli) -> None:
    """In a process of its own, with transformers' warnings on the real error stream."""
    cli.source()
    cli.config(rope_parameters={"rope_type": "nope", "rope_theta": 1e4})
    before = state(cli.root)
    script = Path(sysconfig.get_path("scripts"), "growformer")
    words = [script, *map(str, cli.of("expand", "hidden_size=48"))]
    env = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("growformer: ") and run.stderr.count("\n") == 1 and "'nope'" in run.stderr
    assert state(cli.root) == before


@pytest.mark.parametrize("command", ["plan", "expand"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("head_dim=20", "--rope", "spiral"), "rope='spiral' is unknown; there are theta, strided, longrope"),
        (("head_dim=14", "--rope", "strided"), "head_dim=14 is no whole multiple of 10; head_dim=20 works"),
        (("hidden_size=36", "--rope", "strided"), "says where rotary pairs go when head_dim grows"),
        (("vocab_size=40", "--new-tokens", "shut"), "new_tokens='shut' is unknown; there are open, closed"),
        (("vocab_size=40", "--new-tokens", "closed"), "the head of llama has no bias"),
    ],
)
def test_a_choice_that_cannot_be_made(cli: Cli, command: str, words: tuple[str, ...], says: str) -> None:
    cli.source()
    cli.refused(*cli.of(command, *words), says=says)
