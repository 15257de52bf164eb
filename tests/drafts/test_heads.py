"""Task heads and the bare model: their tensors are read off beside the drafted one's, and nothing else is claimed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from growformer.algebra import Power
from growformer.api import expand_checkpoint
from growformer.api.checks.cover import cover_family
from growformer.api.checks.samples import save_tiny
from growformer.drafts import infer
from growformer.drafts.classes import classes_of
from growformer.drafts.probe import attempt, build
from growformer.drafts.trace import Guest, watch
from growformer.errors import PatternError
from growformer.families import FAMILIES
from tests.drafts.sampled import drafted

POOLER = {"bert.pooler.dense.weight": "pooled <- hidden", "bert.pooler.dense.bias": "-> pooled"}


def test_a_pooler_that_only_other_classes_have_is_drafted() -> None:
    family, hand = drafted("bert"), FAMILIES["bert"]
    assert POOLER.items() <= family.tasks.items()
    assert family.axes["pooled"] == hand.axes["pooled"]
    assert family.tasks["cls.seq_relationship.weight"] == "_ <- pooled"
    assert set(family.architectures) == set(hand.architectures)
    assert cover_family(family).problems == []
    # The control: without the pooler's patterns the classes that have one are not covered.
    without = replace(family, tasks={n: t for n, t in family.tasks.items() if n not in POOLER})
    said = [text for text in cover_family(without).problems if "bert.pooler.dense.weight" in text]
    assert any(text.startswith("BertModel:") for text in said)
    assert not any(text.startswith("BertForMaskedLM:") for text in said)


def test_one_name_in_two_classes_is_two_tensors() -> None:
    when = {conditions["architectures"][0]: changes for conditions, changes in drafted("distilbert").when}
    assert drafted("distilbert").tasks["classifier.weight"] == "_ <- pooled"
    # Where the class has no tensor of an axis, the axis goes, and what else names it.
    assert when["DistilBertForTokenClassification"] == {
        "axes": {"pooled": None},
        "tasks": {"pre_classifier.weight": None, "pre_classifier.bias": None, "classifier.weight": "_ <- hidden"},
    }
    # The control: a class whose tensors say the same as another's needs no case of its own.
    assert "DistilBertForQuestionAnswering" in drafted("distilbert").architectures
    assert "DistilBertForQuestionAnswering" not in when


def test_an_output_that_nothing_reads_stays_as_it_is() -> None:
    family = drafted("vit")
    assert family.tasks["vit.pooler.dense.weight"] == "pooled <- hidden"
    (frozen,) = [one for one in family.frozen if "pooled" in one.axes]
    assert frozen.axes == ("pooled",) and "output" in frozen.reason
    # The control: where a head reads what is pooled, it may grow.
    assert not any("pooled" in one.axes for one in drafted("bert").frozen)


def test_what_a_class_may_lack_it_may_lack_under_any_switch(tmp_path: Path) -> None:
    family = drafted("modernbert")
    assert family.tasks["decoder.bias"] == "-> vocab"
    assert "decoder.bias" not in family.optional and "decoder_bias" in family.neutral
    assert set(family.optional) <= set(family.tensors)
    folder = save_tiny(family, "ModernBertModel", tmp_path / "source")
    FAMILIES["modernbert"], hand = family, FAMILIES["modernbert"]
    try:
        grown = expand_checkpoint(folder, tmp_path / "out", intermediate_size=40, prove_level="structure")
        assert grown.plan.axes["mlp"] == {"old": 28, "new": 40} or grown.plan.axes["mlp"]["new"] == 40
        # The control: as a tensor that the switch promises, it is missed.
        switched = {**family.optional, "decoder.bias": "decoder_bias"}
        FAMILIES["modernbert"] = replace(family, optional=switched)
        with pytest.raises(PatternError, match="decoder_bias=True"):
            expand_checkpoint(folder, tmp_path / "other", intermediate_size=40, prove_level="structure")
    finally:
        FAMILIES["modernbert"] = hand


def test_logits_are_scaled_in_the_class_that_has_them() -> None:
    family = drafted("t5")
    assert isinstance(family.powers["logits"], Power)
    full = attempt({**family.sample, "model_type": "t5"}, run=False).full
    assert "logits" not in family.of({**full, "architectures": ["T5Model"]}).powers
    # The control.
    assert "logits" in family.of({**full, "architectures": ["T5ForConditionalGeneration"]}).powers


def test_classes_of_another_body_are_left_out_by_name() -> None:
    raw = {**FAMILIES["llama"].sample, "model_type": "llama"}
    model = build(raw)
    names = frozenset(model.state_dict())
    inner = {name.removeprefix("model.") for name in names}
    bodies = {
        "LlamaModel": inner - {"lm_head.weight"},
        "LlamaForSequenceClassification": (names | {"score.weight"}) - {"lm_head.weight"},
        "LlamaForTokenClassification": {f"transformer.{name}" for name in inner},
    }

    def of(name: str) -> set[str]:
        if name not in bodies:
            raise ValueError(name)
        return bodies[name]

    found = classes_of(model, names, of)
    assert [(one.name, one.lead, one.fresh, one.shows) for one in found.beside] == [
        ("LlamaModel", "model.", (), False),
        ("LlamaForSequenceClassification", "", ("score.weight",), True),
    ]
    assert found.bare == names - {"lm_head.weight"}
    assert "it has no model." in found.apart["LlamaForTokenClassification"]
    assert "does not build" in found.apart["LlamaForQuestionAnswering"]


class Body(torch.nn.Module):
    """x + f(x), with a head of its own where `head` says how wide."""

    def __init__(self, head: int = 0, broken: bool = False) -> None:
        super().__init__()
        self.table, self.f, self.broken = torch.nn.Embedding(7, 5), torch.nn.Linear(5, 5), broken
        self.head = torch.nn.Linear(5, head) if head else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + self.f(x)
        if self.broken:
            raise ValueError("no")
        return x if self.head is None else self.head(x)


def hosted(guest: Body, main: Body) -> Guest:
    guest.table, guest.f = main.table, main.f
    assert guest.head is not None
    own = {f"Guest:{name}": x for name, x in guest.head.named_parameters(prefix="head")}
    return Guest(guest, {"ids": torch.tensor([[1, 2, 4]])}, own)


def test_a_guest_shows_its_own_tensors_and_changes_nothing_else() -> None:
    main, given = Body(), {"ids": torch.tensor([[1, 2, 4]])}
    alone = watch(main, given)
    guest = hosted(Body(head=3), main)
    trace = watch(main, given, [guest])
    assert guest.ran and trace.guests == {"Guest:head.weight", "Guest:head.bias"}
    (stream,) = {node.root for dim in trace.residual for node in dim}
    rows, columns = trace.params["Guest:head.weight"]
    assert columns[0].root is stream and rows[0].root is not stream
    assert trace.params["Guest:head.bias"][0][0].root is rows[0].root
    for seen in ("adds", "streams", "residual", "sides", "norms", "scores"):
        assert len(getattr(trace, seen)) == len(getattr(alone, seen))
    # The control: one that does not run shows nothing.
    broken = hosted(Body(head=3, broken=True), main)
    trace = watch(main, given, [broken])
    assert not broken.ran and len(trace.adds) == len(alone.adds)
    assert trace.params["Guest:head.weight"][1][0].root is not next(n.root for d in trace.residual for n in d)


def test_a_head_by_the_same_name_that_reads_something_else_is_no_guest() -> None:
    main, given = Body(head=5), {"ids": torch.tensor([[1, 2, 4]])}
    assert main.head is not None

    def guest(broken: bool) -> Guest:
        """Shares the head; where `broken`, reads what the head itself wrote before."""
        other = Body(head=5)
        other.table, other.f, other.head = main.table, main.f, main.head
        if broken:
            assert other.head is not None
            other.head = torch.nn.Sequential(other.head, other.head)  # type: ignore[assignment]
        return Guest(other, given, {}, loose=frozenset({"head.weight"}))

    wrong, right = guest(True), guest(False)
    trace = watch(main, given, [wrong, right])
    assert right.ran and not wrong.ran
    rows, columns = trace.params["head.weight"]
    assert rows[0].root is not columns[0].root  # nothing of the refused run was taken over


def test_a_draft_from_a_classifier_serves_no_class_that_classifies_something_else() -> None:
    raw = {**FAMILIES["distilbert"].sample, "model_type": "distilbert"}
    found = infer({**raw, "architectures": ["DistilBertForSequenceClassification"]})
    assert "DistilBertForTokenClassification" not in found.family.architectures
    assert any("DistilBertForTokenClassification is not served" in said for said in found.guesses)
    assert "DistilBertModel" in found.family.architectures  # the control


@pytest.mark.slow
def test_a_field_that_the_config_class_fills_in_follows_the_one_it_repeats() -> None:
    assert drafted("deberta_v2").follows["pooler_hidden_size"] == "hidden_size"
    # The control: one that the sample states is a size of its own.
    assert "pooler_output_size" not in drafted("vit").follows
    assert drafted("vit").axes["pooled"] != drafted("vit").axes["hidden"]
