"""A source that cannot be grown is refused like a bad request: one message, exit code 2, nothing left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from growformer.algebra import replace
from growformer.api import folders
from growformer.families import FAMILIES

from .harness import Cli, state

COMMANDS = pytest.mark.parametrize("command", ["plan", "expand"])
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
UP_BIAS = "model.layers.{}.mlp.up_proj.bias"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Path], object]


def tensors(change: Callable[[Tensors], object]) -> Damage:
    """Damage done to the tensors of a folder."""

    def damage(src: Path) -> None:
        found = dict(load_file(src / "model.safetensors"))
        change(found)
        save_file(found, src / "model.safetensors", metadata={"format": "pt"})

    return damage


def bytes_(change: Callable[[bytes], bytes]) -> Damage:
    """Damage done to the bytes of the safetensors file."""
    return lambda src: (src / "model.safetensors").write_bytes(change((src / "model.safetensors").read_bytes()))


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Damage done to the header of the safetensors file."""

    def damage(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + length])
        change(found)
        text = json.dumps(found).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return bytes_(damage)


def shards(change: Callable[[Path, dict[str, Any]], object]) -> Damage:
    """The same checkpoint in two files, and damage done to them or to the index."""

    def damage(src: Path) -> None:
        found = dict(load_file(src / "model.safetensors"))
        (src / "model.safetensors").unlink()
        place = {name: SHARDS[i % 2] for i, name in enumerate(found)}
        for shard in SHARDS:
            save_file({name: found[name] for name in found if place[name] == shard}, src / shard)
        index: dict[str, Any] = {"metadata": {}, "weight_map": place}
        change(src, index)
        (src / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def weights(src: Path) -> Path:
    return src / "model.safetensors"


# fmt: off
WEIGHTS: dict[str, tuple[Damage, str]] = {
    "empty": (bytes_(lambda _: b""), "model.safetensors: 0 bytes, too short for a safetensors file"),
    "cut": (bytes_(lambda b: b[:-100]), "model.safetensors: its tensors end at byte .*: the file was cut"),
    "cut in the header": (bytes_(lambda b: b[:100]), "ask for a header of .* bytes, in a file of 100 .*: cut"),
    "longer": (bytes_(lambda b: b + b"x"), "its tensors end at byte .*: bytes that no tensor owns"),
    "garbage": (bytes_(lambda b: bytes(range(256))), "ask for a header of .*: cut, or no safetensors file"),
    "garbage header": (bytes_(lambda b: b[:8] + b"x" * (len(b) - 8)), "header does not begin with '{': no safetensors"),
    "half a header": (bytes_(lambda b: b[:8] + b[8:300] + b" " * (len(b) - 300)), "not readable as JSON"),
    "offsets": (header(lambda h: h[NORM].update(data_offsets=[0, 96])), "begins at byte .*: it overlaps the one"),
    "offsets below 0": (header(lambda h: h[NORM].update(data_offsets=[-1, 95])), "data_offsets is no list of sizes"),
    "shape": (header(lambda h: h[NORM].update(shape=[23])), "shape .23. takes 736 bits, its offsets .* hold 768"),
    "unknown dtype": (header(lambda h: h[NORM].update(dtype="F7")), "unknown dtype 'F7'; known: F64, "),
    "missing": (lambda src: weights(src).unlink(), "has neither model.safetensors nor .*; found config.json"),
    "a folder": (lambda src: (weights(src).unlink(), weights(src).mkdir()), "model.safetensors: is no regular file"),
    "missing shard": (shards(lambda src, _: (src / SHARDS[1]).unlink()), f"{SHARDS[1]}: missing .an incomplete"),
    "index that climbs": (shards(lambda _, i: i["weight_map"].update({NORM: "../x.safetensors"})),
                          "'../x.safetensors' does not name a file inside this folder"),
    "index without a map": (shards(lambda _, i: i.pop("weight_map")), "index.json: has no weight_map"),
    "index without a tensor": (shards(lambda _, i: i["weight_map"].pop(NORM)), f"does not place in it: '{NORM}'"),
    "no tensors": (tensors(lambda x: x.clear()), "tensor 'model.embed_tokens.weight' is missing from the checkpoint"),
    "missing tensor": (tensors(lambda x: x.pop(NORM)), "tensor 'model.norm.weight' is missing from the checkpoint"),
    "missing layer": (tensors(lambda x: [x.pop(k) for k in list(x) if ".2." in k]), r"layers.2\.\S+ is missing"),
    "extra tensor": (tensors(lambda x: x.update(odd=torch.ones(2))), "tensor 'odd': no pattern covers it"),
    "extra layer": (tensors(lambda x: x.update({k.replace(".2.", ".3."): x[k].clone() for k in [*x] if ".2." in k})),
                    r"layers.3\.\S+ is beyond what config.json says"),
    "extra bias": (tensors(lambda x: x.update({UP_BIAS.format(i): torch.ones(28) for i in range(3)})),
                   r"mlp_bias=False, and the checkpoint has some of the tensors \S+up_proj.bias"),
    "bias in one layer": (tensors(lambda x: x.update({UP_BIAS.format(0): torch.ones(28)})),
                          r"mlp_bias=False, and the checkpoint has some of the tensors \S+up_proj.bias"),
    "other shape": (tensors(lambda x: x.update({NORM: torch.ones(25)})),
                    r"'model.norm.weight' has shape .25., but its pattern .*hidden=24 from config.json gives .24."),
    "other dims": (tensors(lambda x: x.update({NORM: torch.ones(24, 1)})), r"has shape .24, 1., but its pattern"),
    "int8": (tensors(lambda x: x.update({UP: torch.ones(28, 24, dtype=torch.int8)})),
             f"'{UP}': stored as I8, it is quantised, and must be dequantised first; dtypes that grow: F64, F32"),
    "float8": (tensors(lambda x: x.update({UP: torch.ones(28, 24).to(torch.float8_e4m3fn)})), "F8_E4M3, it is quant"),
    "int32": (tensors(lambda x: x.update({UP: torch.ones(28, 24, dtype=torch.int32)})), "no floating-point weights"),
}

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "24"}, "LlamaConfig refuses it: .*'hidden_size' expected int, got str"),
    ({"hidden_size": None}, "LlamaConfig refuses it: .*'hidden_size' expected int, got NoneType"),
    ({"hidden_size": 24.0}, "LlamaConfig refuses it: .*'hidden_size' expected int, got float"),
    ({"hidden_size": True}, "LlamaConfig refuses it: .*'hidden_size' expected int, got bool"),
    ({"hidden_size": [24]}, "LlamaConfig refuses it: .*'hidden_size' expected int, got list"),
    ({"hidden_size": 0}, "config.json: hidden_size should be a positive whole number, not 0"),
    ({"hidden_size": -24}, "config.json: hidden_size should be a positive whole number, not -24"),
    ({"hidden_size": 10**9}, "config.json: hidden_size=1000000000: at most 262144 is planned"),
    ({"hidden_size": 28}, r"has shape .37, 24., .*hidden=28 from config.json.*do not belong together"),
    ({"num_hidden_layers": 0}, "config.json: num_hidden_layers should be a positive whole number, not 0"),
    ({"num_hidden_layers": -1}, "config.json: num_hidden_layers should be a positive whole number, not -1"),
    ({"num_hidden_layers": 2}, r"'model.layers.2\.\S+ is beyond what config.json says"),
    ({"num_hidden_layers": 4}, r"'model.layers.3\.\S+ is missing from the checkpoint"),
    ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers=1000000000: at most 4096 is planned"),
    ({"num_attention_heads": 0}, "LlamaConfig refuses it: "),
    ({"num_attention_heads": 5}, "LlamaConfig refuses it: .*not a multiple of the number of attention heads .5."),
    ({"num_key_value_heads": 3}, "config.json: num_attention_heads=4 is no multiple of num_key_value_heads=3; no "),
    ({"num_key_value_heads": None}, r"has shape .20, 24., .* with kv_heads=4, .* do not belong together"),
    ({"head_dim": "x"}, "LlamaConfig refuses it: .*'head_dim'"),
    ({"head_dim": 9}, "LlamaConfig refuses it: .*RoPE requires an even rotary dimension"),
    ({"vocab_size": 36}, r"has shape .37, 24., .* with vocab=36, .* do not belong together"),
    ({"rope_parameters": ..., "rope_theta": "abc"}, "rope_theta='abc'; one positive number is served"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -1e4}}, "rope_theta=-10000.0; one positive number"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "LlamaConfig refuses it: .*Missing required"),
    ({"rope_parameters": "x"}, "LlamaConfig refuses it: .*'rope_parameters'"),
    ({"rms_norm_eps": 1}, "LlamaConfig refuses it: .*'rms_norm_eps' expected float, got int"),
    ({"rms_norm_eps": "1e-5"}, "LlamaConfig refuses it: .*'rms_norm_eps' expected float, got str"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05; an eps is a finite number, 0 or more"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; an eps is a finite number"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf; an eps is a finite number"),
    ({"attention_bias": True}, r"attention_bias=True, and the checkpoint has none of the tensors \S+q_proj.bias"),
    ({"mlp_bias": True}, r"mlp_bias=True, and the checkpoint has none of the tensors \S+gate_proj.bias"),
    ({"dtype": 7}, "dtype=7 is no name of a dtype"),
    ({"dtype": "int9"}, "LlamaConfig refuses it: module 'torch' has no attribute 'int9'"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification is not served; llama "),
    ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', not a list; llama has "),
    ({"architectures": 7}, "architectures is 7, not a list"),
    ({"model_type": ...}, "model_type None is no family here; there are llama, mistral, "),
    ({"model_type": "xlnet"}, "model_type 'xlnet' is no family here"),
    ({"model_type": ["llama"]}, "model_type .'llama'. is no family here"),
    ({"quantization_config": {"quant_method": "gptq"}}, "the model is quantised .gptq.; .* dequantise it first"),
    ({"auto_map": {"AutoModel": "m.M"}}, "auto_map asks for code that comes with the model"),
]
GPT2_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"scale_attn_by_inverse_layer_idx": True}, "only scale_attn_by_inverse_layer_idx=False is"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False changes what gpt2 computes in a way that is not served"),
    ({"add_cross_attention": True}, "add_cross_attention=True changes what gpt2 computes"),
    ({"n_head": 0}, "config.json: n_head should be a positive whole number, not 0"),
    ({"n_head": 5}, "config.json: n_embd=24 is no multiple of n_head=5; no gpt2 has such sizes"),
    ({"n_inner": 95}, r"has shape .96., .* with mlp=95 from config.json gives .95."),
    ({"n_positions": 31}, r"has shape .32, 24., .* with positions=31, .* do not belong together"),
]
QWEN3_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"layer_types": ["full_attention"] * 2}, "Qwen3Config refuses it: .*must be equal to the number of `layer_types`"),
    ({"layer_types": ["full_attention"] * 4}, "Qwen3Config refuses it: .*must be equal to the number of `layer_types`"),
    ({"layer_types": ["odd"] * 3}, "Qwen3Config refuses it: .*`layer_types` entries must be in"),
]
UNBUILDABLE: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "hidden_size=48", {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}),
    ("llama", "hidden_size=48", {"hidden_act": "nope"}),
    ("gpt2", "n_embd=48", {"activation_function": "nope"}),
]
TEXTS = [
    ("", "config.json: not readable as JSON: Expecting value"),
    ("{", "config.json: not readable as JSON"),
    ("\xff", "config.json: not readable as JSON: 'utf-8' codec"),
    ("[]", "config.json: holds a JSON list, expected an object"),
    ('{"a": 1, "a": 2}', "config.json: the key 'a' is there twice"),
    ("{}", "config.json: model_type None is no family here"),
]
# fmt: on


@COMMANDS
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(cli: Cli, command: str, case: str) -> None:
    damage, says = WEIGHTS[case]
    damage(cli.source())
    cli.refused(*cli.of(command, "hidden_size=48"), says=says)


@COMMANDS
def test_pickled_weights_with_the_line_that_converts_them(cli: Cli, command: str) -> None:
    weights(cli.source()).rename(cli.src / "pytorch_model.bin")
    cli.refused(*cli.of(command, "hidden_size=48"), says=r"pickled weights.*\n  python -c '.*save_pretrained", lines=2)


@COMMANDS
@pytest.mark.parametrize(
    ("kind", "words", "changes", "says"),
    [
        *(("llama", "hidden_size=48", *case) for case in CONFIGS),
        *(("gpt2", "n_embd=48", *case) for case in GPT2_CONFIGS),
        *(("qwen3", "num_hidden_layers=5", *case) for case in QWEN3_CONFIGS),
    ],
)
def test_configs(cli: Cli, command: str, kind: str, words: str, changes: dict[str, Any], says: str) -> None:
    cli.source(kind)
    cli.config(**changes)
    cli.refused(*cli.of(command, words), says=says)


@pytest.mark.parametrize(("kind", "words", "changes"), UNBUILDABLE)
def test_configs_that_only_building_the_stock_model_refutes(
    cli: Cli, kind: str, words: str, changes: dict[str, Any]
) -> None:
    cli.source(kind)
    cli.config(**changes)
    cli.refused(*cli.of("expand", words), says="the grown config.json: transformers cannot build .*: KeyError: 'nope'")


@COMMANDS
@pytest.mark.parametrize(("text", "says"), TEXTS)
def test_a_config_that_is_none(cli: Cli, command: str, text: str, says: str) -> None:
    (cli.source() / "config.json").write_text(text, encoding="latin-1")
    cli.refused(*cli.of(command, "hidden_size=48"), says=says)


@COMMANDS
def test_no_config_and_no_folder(cli: Cli, command: str) -> None:
    (cli.source() / "config.json").unlink()
    cli.refused(
        *cli.of(command, "hidden_size=48"), says="src: has no config.json; expected a Hugging Face model folder"
    )
    cli.src = weights(cli.src)
    cli.refused(*cli.of(command, "hidden_size=48"), says="is a file; expected the folder of a model, with config.json")
    cli.src = cli.root / "gone"
    cli.refused(*cli.of(command, "hidden_size=48"), says="gone: does not exist; expected the folder of a model")


@COMMANDS
def test_a_field_that_no_fact_covers(cli: Cli, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field of today's config classes is covered, so a family that forgot one stands in for tomorrow's."""
    cli.source("gpt2")
    cli.config(resid_pdrop=0.5)
    assert cli(*cli.of("plan", "n_embd=48")).code == 0
    monkeypatch.setitem(FAMILIES, "gpt2", replace(FAMILIES["gpt2"], neutral=()))
    says = r"resid_pdrop=0.5 is not gpt2's default .0.1., and no fact of the family says what growth must do"
    cli.refused(*cli.of(command, "n_embd=48"), says=says)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(cli: Cli, value: float) -> None:
    """Shapes do not tell, so `plan` passes; `expand` says it before it compares anything."""
    tensors(lambda x: x[UP].__setitem__((0, 0), value))(cli.source())
    assert cli(*cli.of("plan", "hidden_size=48")).code == 0
    cli.refused(*cli.of("expand", "hidden_size=48"), says=f"tensor '{UP}' holds infinite numbers or NaN")


def test_a_companion_that_leads_elsewhere(cli: Cli) -> None:
    (cli.root / "secret").write_text("s")
    (cli.source() / "LICENSE").symlink_to(cli.root / "secret")
    cli.refused(*cli.of("expand", "hidden_size=48"), says="LICENSE: is a link to .*, outside its folder")


# What looks odd and is fine: negative controls of the refusals above.
FINE: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "hidden_size=48", {}),
    ("llama", "hidden_size=48", {"architectures": ["LlamaForCausalLM"], "quantization_config": None, "auto_map": {}}),
    ("llama", "hidden_size=48", {"rms_norm_eps": 0.0, "max_position_embeddings": 7, "odd": 3}),
    ("llama", "hidden_size=48", {"rope_parameters": ..., "rope_theta": 5e5}),
    ("llama", "head_dim=96", {}),
    ("llama-tied-bias", "hidden_size=48", {}),
    ("qwen3", "num_hidden_layers=5", {"layer_types": ...}),
    ("gpt2", "n_embd=48", {"n_inner": None}),
]


@pytest.mark.parametrize(("kind", "words", "changes"), FINE)
def test_what_is_fine(cli: Cli, kind: str, words: str, changes: dict[str, Any]) -> None:
    cli.source(kind)
    cli.config(**changes)
    assert cli(*cli.of("plan", words)).code == 0
    said = cli(*cli.of("expand", words, "--prove", "structure"))
    assert said.code == 0 and said.err == "" and (cli.out / "model.safetensors").is_file()


def test_a_readme_in_another_encoding(cli: Cli) -> None:
    (cli.source() / "README.md").write_bytes("Für alle".encode("latin-1"))
    assert cli(*cli.of("expand", "hidden_size=48", "--prove", "structure")).code == 0


def test_a_file_that_cannot_be_copied(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "src/LICENSE")

    cli.source()
    monkeypatch.setattr(folders, "copy_companions", fails)
    cli.refused(*cli.of("expand", "hidden_size=48"), says="src/LICENSE: Permission denied")


def test_an_interrupt_leaves_nothing_and_is_no_verdict(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 130, as shells have it; 1 would say that the function changed."""

    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    cli.source()
    before = state(cli.root)
    monkeypatch.setattr(folders, "copy_companions", stops)
    said = cli(*cli.of("expand", "hidden_size=48"))
    assert said.code == 130 and "Traceback" not in said.err and state(cli.root) == before
