"""Inputs that a model takes, and which channels of its outputs are the source's."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from growformer.algebra import Lift
from growformer.errors import UncheckedError
from growformer.proof.difference import compare_outputs, worst
from growformer.proof.inputs import Batch, Probe, from_json, probe_inputs
from growformer.proof.outputs import grown_axes, outputs, read_back
from tests.proof.every_model import MODELS, build


def probe(name: str, folder: Path, **sizes: int) -> Probe:
    build(name).config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [MODELS[name][0]]}))
    return probe_inputs(folder, **{"batch": 4, "length": 24, "seed": 0, **sizes})


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("llama", {"input_ids": [4, 24]}),
        ("bert", {"input_ids": [4, 24], "token_type_ids": [4, 24]}),
        ("bart", {"input_ids": [4, 24], "decoder_input_ids": [4, 16]}),
        ("bart-classify", {"input_ids": [4, 24]}),
        ("whisper", {"input_features": [4, 7, 32], "decoder_input_ids": [4, 16]}),
        ("vit", {"pixel_values": [16, 3, 12, 12]}),
        ("clip", {"input_ids": [4, 24], "pixel_values": [4, 3, 12, 12]}),
    ],
)
def test_a_model_gets_what_its_forward_pass_takes(name: str, plain: dict[str, list[int]], tmp_path: Path) -> None:
    assert probe(name, tmp_path).shapes["plain"] == plain


def test_sequences_are_padded_on_both_sides_to_several_lengths(tmp_path: Path) -> None:
    found = {batch.name: batch.inputs for batch in probe("bart", tmp_path).batches}
    assert list(found) == ["plain", "padded on the right", "padded on the left"]
    for side in ("right", "left"):
        inputs = found[f"padded on the {side}"]
        for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            real = inputs[mask].bool()
            lengths = real.sum(1).tolist()
            assert len(set(lengths)) == 4 and max(lengths) == real.shape[1]
            edge = real[:, 0] if side == "right" else real[:, -1]
            assert bool(edge.all()) and bool((inputs[ids][~real] == 1).all())
    assert not any("mask" in name for name in found["plain"])
    assert len(probe("vit", tmp_path).batches) == 1


def test_special_tokens_stand_where_they_mean_something_and_nowhere_else(tmp_path: Path) -> None:
    """BART's classifier pools at the end token and wants one a sequence; its decoder starts with another."""
    for batch in probe("bart", tmp_path).batches:
        ids, start = batch.inputs["input_ids"], batch.inputs["decoder_input_ids"]
        mask = batch.inputs.get("attention_mask", torch.ones_like(ids)).bool()
        assert (ids == 2).sum(1).tolist() == [1] * len(ids)
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
        assert bool((ids.gather(1, last[:, None]) == 2).all())
        assert not bool(torch.isin(ids[mask & (ids != 2)], torch.tensor([0, 1])).any())
        real = batch.inputs.get("decoder_attention_mask", torch.ones_like(start)).bool()
        assert bool((start.gather(1, real.long().argmax(1)[:, None]) == 2).all())


def test_positions_behind_the_padding_id_are_enough(tmp_path: Path) -> None:
    assert probe("roberta", tmp_path, length=99).shapes["plain"]["input_ids"] == [4, 33]
    assert probe("gpt2", tmp_path, length=99).shapes["plain"]["input_ids"] == [4, 32]


def test_inputs_go_through_json_and_back(tmp_path: Path) -> None:
    batches = probe("clip", tmp_path).batches
    told = [{"name": b.name, "inputs": {k: x.tolist() for k, x in b.inputs.items()}} for b in batches]
    back = from_json(json.loads(json.dumps(told)))
    assert isinstance(back, list) and [b.name for b in back] == [b.name for b in batches]
    for a, b in zip(batches, back, strict=True):
        assert all(torch.equal(x, b.inputs[name]) and x.dtype == b.inputs[name].dtype for name, x in a.inputs.items())


def test_a_model_that_nothing_can_be_made_for_is_refused(tmp_path: Path) -> None:
    transformers.Wav2Vec2Config(architectures=["Wav2Vec2Model"]).save_pretrained(tmp_path)
    with pytest.raises(UncheckedError, match="Wav2Vec2Model takes no token ids"):
        probe_inputs(tmp_path, 2, 8, 0)


# --- outputs


def test_padding_is_not_compared_and_what_is_real_is() -> None:
    model = build("bert-base", torch.float64)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batches = [Batch("plain", {"input_ids": ids}), Batch("padded", {"input_ids": ids, "attention_mask": mask})]
    found = outputs(model, batches)
    assert {name: list(x.shape) for name, x in found.items()} == {
        "last_hidden_state": [2, 4, 24],
        "pooler_output": [2, 24],
        "last_hidden_state, padded": [6, 24],
        "pooler_output, padded": [2, 24],
    }


def test_nested_outputs_are_compared_too() -> None:
    model = build("clip", torch.float64)
    inputs = {"input_ids": torch.tensor([[5, 6, 2], [7, 8, 2]]), "pixel_values": torch.randn(2, 3, 12, 12)}
    before = outputs(model, inputs)
    assert "vision_model_output.last_hidden_state" in before and "logits_per_text" in before
    # What the pooled outputs do not see: a patch of the last layer's output.
    model.vision_model.encoder.layers[-1].mlp.fc2.bias.data[0] += 1
    differences = compare_outputs(before, outputs(model, inputs))
    assert differences["vision_model_output.last_hidden_state"].relative > 0
    assert differences["text_embeds"].relative == 0
    assert worst(differences).output in differences and worst(differences).relative > 0


def test_an_output_on_a_grown_axis_is_read_where_the_lift_says() -> None:
    a = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    lift = Lift.place(3, [4, 0, 2], 5)
    b = torch.zeros(5, 5)
    b[:, [4, 0, 2]] = a
    reads = {"hidden": lift}
    assert torch.equal(read_back("last_hidden_state", 3, b, reads)[0], a)
    assert compare_outputs({"x": a}, {"x": b}, reads)["x"].max_abs == 0
    # The control: in any other order, or on the first channels, it is another output.
    assert compare_outputs({"x": a}, {"x": b}, {"hidden": Lift.place(3, [0, 4, 2], 5)})["x"].relative > 0
    assert compare_outputs({"x": a}, {"x": b})["x"].relative > 0
    with pytest.raises(UncheckedError, match="no axis of the receipt"):
        read_back("last_hidden_state", 3, b, {"mlp": Lift.place(4, [0, 1, 2, 3], 5)})
    with pytest.raises(UncheckedError, match="several axes of the receipt"):
        read_back("last_hidden_state", 3, b, reads | {"pooled": Lift.place(3, [0, 1, 2], 5)})


def test_logits_grow_at_their_end_whatever_the_axes_say() -> None:
    value = torch.arange(10.0).view(2, 5)
    assert read_back("logits, padded on the left", 3, value, {"hidden": Lift.place(3, [4, 0, 2], 5)})[1] == 2
    assert torch.equal(read_back("start_logits", 3, value, {})[0], value[:, :3])


def test_copies_and_means_are_read_at_the_first_place_of_each_channel() -> None:
    told = {"hidden": {"old": 2, "lift": Lift.copies(2, 2).to_json()}, "mlp": {"old": 3, "lift": [[3, 0]]}}
    reads = grown_axes(told | {"key@layer=1": told["hidden"]})
    assert list(reads) == ["hidden"]
    assert torch.equal(read_back("x", 2, torch.tensor([[1.0, 2.0, 1.0, 2.0]]), reads)[0], torch.tensor([[1.0, 2.0]]))
    with pytest.raises(UncheckedError, match="different outputs"):
        compare_outputs({"x": torch.ones(1, 2)}, {"y": torch.ones(1, 2)})
