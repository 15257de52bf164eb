"""Each rule broken, one at a time, through the public entry points: `verify` fails, and says which tensor or axis."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from growformer import api
from growformer.checkpoint import sha256
from growformer.errors import ChangedError
from growformer.planning import heads, resolve
from tests.tiny import save

ALL = {
    "hidden_size": 36,
    "intermediate_size": 41,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 14,
    "num_hidden_layers": 5,
}
LAYER = "model.layers.0."


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("controls")
    src = save(root / "src", "llama-tied-bias")
    api.expand_checkpoint(src, root / "out", dtype="float64", prove_level="structure", **ALL)
    return src, root / "out"


class Folder:
    """A copy of the grown folder to break; hashes in the receipt are made to fit, as one who lies would."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = load_file(path / "model.safetensors")
        self.config = json.loads((path / "config.json").read_text())
        self.receipt = json.loads((path / "growformer.json").read_text())

    def write(self) -> Path:
        save_file(self.tensors, self.path / "model.safetensors", metadata={"format": "pt"})
        (self.path / "config.json").write_text(json.dumps(self.config))
        files = self.receipt["target"]["files"]
        files |= {name: sha256(self.path / name) for name in ("model.safetensors", "config.json")}
        (self.path / "growformer.json").write_text(json.dumps(self.receipt))
        return self.path


def key_scale(f: Folder) -> None:
    for name, x in f.tensors.items():
        if "k_proj" in name:
            x *= (10 / 14) ** 0.5


def gain_scale(f: Folder) -> None:
    f.tensors["model.norm.weight"][:24] *= (36 / 24) ** 0.5


def eps_rule(f: Folder) -> None:
    f.config["rms_norm_eps"] = 1e-3


def one_closed_block(f: Folder) -> None:
    f.tensors[LAYER + "self_attn.o_proj.weight"][3, -1] = 0.1


def one_closed_stream(f: Folder) -> None:
    f.tensors["model.embed_tokens.weight"][5, 30] = 0.1


def new_layer_open(f: Folder) -> None:
    new = f.receipt["layers"]["layer"].index(None)
    f.tensors[f"model.layers.{new}.mlp.down_proj.weight"][0, 0] = 0.1


def heads_permuted(f: Folder) -> None:
    q = f.tensors[LAYER + "self_attn.q_proj.weight"].view(12, 14, 36)
    f.tensors[LAYER + "self_attn.q_proj.weight"] = q[[1, 0, *range(2, 12)]].reshape(168, 36).contiguous()


def rotary_base(f: Folder) -> None:
    f.config["rope_parameters"]["rope_theta"] = f.config["rope_theta"] = 10000.0


def one_bit(f: Folder) -> None:
    x = f.tensors[LAYER + "mlp.gate_proj.weight"]
    x[0, 0] = torch.nextafter(x[0, 0], torch.tensor(9.0, dtype=x.dtype))


def lie_layers(f: Folder) -> None:
    f.receipt["layers"]["layer"] = [0, 1, 2, None, None]


def lie_lift(f: Folder) -> None:
    f.receipt["axes"]["mlp"]["lift"] = [[13, None], [28, 0]]


def lie_closed(f: Folder) -> None:
    f.receipt["axes"]["mlp"]["closed"] = "writers"


def lie_scale(f: Folder) -> None:
    f.receipt["axes"]["hidden"]["scale"] = "3/2"


# What is broken, and what the message must name.
BROKEN: list[tuple[Callable[[Folder], None], str]] = [
    (key_scale, "k_proj"),
    (gain_scale, "model.norm.weight"),
    (eps_rule, "rms_norm_eps"),
    (one_closed_block, "layers.0.self_attn.o_proj.weight"),
    (one_closed_stream, "embed_tokens"),
    (new_layer_open, "mlp.down_proj.weight"),
    (heads_permuted, "layers.0.self_attn.q_proj.weight"),
    (rotary_base, "rope_theta"),
    (one_bit, "layers.0.mlp.gate_proj.weight"),
    (lie_layers, "layer"),
    (lie_lift, "mlp"),
    (lie_closed, "mlp"),
    (lie_scale, "hidden|embed_tokens|norm"),
]


@pytest.fixture
def copy(grown: tuple[Path, Path], tmp_path: Path) -> Folder:
    return Folder(Path(shutil.copytree(grown[1], tmp_path / "broken")))


def test_the_folder_written_again_unbroken_holds(grown: tuple[Path, Path], copy: Folder) -> None:
    assert api.verify(grown[0], copy.write(), level="structure").exit_code == 0


@pytest.mark.parametrize(("breaks", "names"), BROKEN, ids=[b.__name__ for b, _ in BROKEN])
def test_a_broken_rule_fails_and_is_named(
    grown: tuple[Path, Path], copy: Folder, breaks: Callable[[Folder], None], names: str
) -> None:
    breaks(copy)
    proof = api.verify(grown[0], copy.write(), level="structure")
    assert proof.exit_code == 1
    with pytest.raises(ChangedError) as caught:
        proof.raise_if_changed()
    assert any(name in str(caught.value) for name in names.split("|")), str(caught.value)


def test_a_changed_byte_is_found_by_its_hash(grown: tuple[Path, Path], copy: Folder) -> None:
    copy.write()
    with (copy.path / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    with (copy.path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    claims = {c.name: c for c in api.verify(grown[0], copy.path, level="structure").claims}
    assert claims["files"].passed is False
    assert "model.safetensors" in claims["files"].found


def appended_pairs(old: int, new: int, *how: object, **more: object) -> list[int]:
    """Rotary channels left where they were, so that channel i + k/2 turns with another frequency."""
    return list(range(old))


def appended_heads(
    old: tuple[int, int], new: tuple[int, int], copies: int
) -> tuple[list[int | None], list[int | None]]:
    """Query heads added at the end, so that they slide into other groups."""

    def tail(n: int, m: int) -> list[int | None]:
        return [*range(n), *[None] * (m - n)]

    return tail(old[0], new[0]), tail(old[1], new[1])


@pytest.fixture
def src(grown: tuple[Path, Path]) -> Iterator[Path]:
    yield grown[0]


@pytest.mark.parametrize(
    ("what", "wrong", "request_", "names"),
    [
        ("pair_places", appended_pairs, {"head_dim": 14}, "key"),
        ("head_growth", appended_heads, {"num_attention_heads": 8}, "heads"),
    ],
    ids=["rotary pairs appended", "query heads appended across groups"],
)
def test_a_plan_that_is_wrong_consistently_is_refused(
    src: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    wrong: Callable[..., Any],
    request_: dict[str, int],
    names: str,
) -> None:
    """The plan, the files and the receipt agree with each other; only the family's facts can tell."""
    monkeypatch.setattr(heads if what == "head_growth" else resolve, what, wrong)
    with pytest.raises(ChangedError, match=names):
        api.expand_checkpoint(src, tmp_path / "out", prove_level="structure", **request_)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    api.expand_checkpoint(src, tmp_path / "out", prove_level="structure", **request_)


def test_every_broken_weight_changes_the_function_too(grown: tuple[Path, Path], tmp_path: Path) -> None:
    """The functional check is a check of its own: with the certificate left out, it sees what changes logits."""
    from growformer.proof.bar import BAR
    from growformer.proof.functional import functional
    from growformer.proof.probe import probe_tokens

    tokens = probe_tokens(grown[0], 2, 24, 0).tokens
    assert functional(grown[0], grown[1], tokens).relative <= BAR
    for breaks in (key_scale, gain_scale, eps_rule, one_closed_block, one_closed_stream, heads_permuted, rotary_base):
        folder = Folder(Path(shutil.copytree(grown[1], tmp_path / breaks.__name__)))
        breaks(folder)
        assert functional(grown[0], folder.write(), tokens).relative > BAR, breaks.__name__
