"""`growformer families check`: the literals of a rotating part of the families, and what a check must notice."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from growformer.algebra import Family, Field, Norm
from growformer.api.checking import check_family, load_family
from growformer.api.checks.cover import cover_family
from growformer.api.checks.order import difference_of
from growformer.api.checks.results import FamilyReport
from growformer.api.checks.samples import save_tiny, serving
from growformer.api.checks.verifying import Verifier, verifier
from growformer.errors import RequestError, SourceError
from growformer.families import FAMILIES
from growformer.proof.bar import BAR
from growformer.report import families as report
from tests.families import sweep

LLAMA = FAMILIES["llama"]
PART = sweep.rotating(FAMILIES, sweep.sources_hash())


@pytest.fixture(scope="module")
def fresh() -> Iterator[Verifier]:
    with verifier() as found:
        yield found


@pytest.mark.parametrize("name", PART)
def test_a_family_is_as_it_says(name: str, fresh: Verifier) -> None:
    found = check_family(name, dtypes=("float64", "bfloat16"), within=fresh)
    assert found.failures == []
    assert found.permuted and found.controls and found.axes
    causal = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), "TokenFormerForCausalLM"}
    assert bool(found.decoding) == (found.architectures[0] in causal)
    assert all(growth.algebra is not None for growth in found.growths if growth.state == "exact")
    assert FamilyReport.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_the_shipped_results_are_of_these_sources() -> None:
    found = report.load_results()
    assert found["sources"] == sweep.sources_hash(), "results.json is of other sources: run `make families` (test-all)"
    assert list(found["families"]) == list(FAMILIES)
    assert {name: told["failures"] for name, told in found["families"].items() if not told["ok"]} == {}
    assert sweep.PAGE.read_text(encoding="utf-8") == report.markdown(found)


def test_the_hash_sees_every_source(tmp_path: Path) -> None:
    for part in sweep.PARTS:
        shutil.copytree(sweep.SOURCES / part, tmp_path / part)
    key = sweep.sources_hash()
    assert sweep.sources_hash(tmp_path) == key
    for path in (tmp_path / "algebra" / "lift.py", tmp_path / "api" / "checks" / "cover.py"):
        text = path.read_text()
        path.write_text(text + "\n")
        assert sweep.sources_hash(tmp_path) != key
        path.write_text(text)
    (tmp_path / "proof" / "new.py").touch()
    assert sweep.sources_hash(tmp_path) != key


def test_the_part_rotates() -> None:
    seen = {name for key in range(len(FAMILIES)) for name in sweep.rotating(FAMILIES, f"{key:x}")}
    assert seen == set(FAMILIES)
    assert all(len(set(sweep.rotating(FAMILIES, f"{key:x}"))) == sweep.SOME + 2 for key in range(99))


def wrong(name: str, tensor: str, pattern: str | None, **changes: Any) -> Family:
    """A family with one tensor's pattern replaced, or taken away."""
    family = FAMILIES[name]
    tensors = {key: text for key, text in {**family.tensors, tensor: pattern}.items() if text is not None}
    return replace(family, tensors=tensors, **changes)


@pytest.mark.parametrize(
    ("literal", "says"),
    [
        (wrong("llama", "model.norm.weight", None), "tensor 'model.norm.weight': no pattern covers it"),
        (wrong("llama", "model.norm.{layer}", "final: * hidden"), "the model has no tensor model.norm.{layer}"),
        (wrong("llama", "model.norm.weight", "final: * mlp"), r"'model.norm.weight' is [24], and its pattern"),
        (replace(LLAMA, sample={**LLAMA.sample, "intermediate_size": 24}), "hidden and mlp have one size, 24"),
        (replace(LLAMA, tasks={"score.weight": "_ <- hidden", "q.bias": "-> _"}), "has a tensor q.bias"),
        (replace(LLAMA, optional={}), "no tensor model.layers.{layer}.self_attn.q_proj.bias"),
        (replace(LLAMA, sample={"num_attention_heads": 5, "hidden_size": 24}), "LlamaForCausalLM: "),
    ],
)  # fmt: skip
def test_a_literal_that_does_not_fit(literal: Family, says: str) -> None:
    assert cover_family(FAMILIES["llama"]).problems == []
    assert [text for text in cover_family(literal).problems if says in text]


@pytest.mark.parametrize(
    ("name", "tensor", "pattern", "axes"),
    [
        ("llama", "model.layers.{layer}.self_attn.o_proj.weight", "hidden <- (value heads)", {"value"}),
        ("llama", "model.layers.{layer}.self_attn.v_proj.weight", "(v: kv_heads key) <- hidden", {"value"}),
        ("gpt2", "transformer.h.{layer}.attn.c_attn.weight",
         "hidden -> (heads (q: key | k: key | v: value))", {"heads"}),
        ("gpt2", "transformer.h.{layer}.attn.c_attn.bias",
         "-> (v: heads value | k: heads key | q: heads key)", {"value"}),
    ],
)  # fmt: skip
def test_a_wrong_layout_of_the_right_shape(
    name: str, tensor: str, pattern: str, axes: set[str], tmp_path: Path
) -> None:
    literal = wrong(name, tensor, pattern)
    assert cover_family(literal).problems == []
    src = save_tiny(literal, literal.architectures[0], tmp_path / "src")
    assert max(difference_of(FAMILIES[name], src, axes).values()) <= BAR
    assert max(difference_of(literal, src, axes).values()) > BAR


def test_a_wrong_fact_fails_in_the_process_that_proves(fresh: Verifier) -> None:
    """The scale of scores left out: every tensor fits, the planner and the certificate agree, the outputs do not."""
    family = FAMILIES["llama"]
    assert not isinstance(family.attention, tuple)
    found = check_family(
        replace(family, attention=replace(family.attention, scaled=False)), axes=["key"], dtypes=(), within=fresh
    )
    assert not found.ok and found.problems == ()
    (grown,) = (growth for growth in found.growths if growth.what == "head_dim")
    assert grown.state == "fails" and "algebra" in grown.detail
    assert {axis.axis: axis.state for axis in found.axes} == {"key": "fails", "value": "fails"}


NEWCOMER = """
from growformer.algebra import replace
from growformer.families.llama import LLAMA
NEWCOMER = replace(LLAMA, name="newcomer")
"""


def test_a_newcomer_s_file(tmp_path: Path) -> None:
    path = tmp_path / "newcomer.py"
    path.write_text(NEWCOMER)
    family = load_family(str(path))
    assert family.name == "newcomer" and next(iter(FAMILIES)) == "llama"
    with serving(family):
        assert "llama" not in FAMILIES and FAMILIES["newcomer"] is family
    assert next(iter(FAMILIES)) == "llama" and "newcomer" not in FAMILIES


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("x = 1", RequestError, "it holds none"),
        (NEWCOMER + "OTHER = replace(LLAMA, name='other')", RequestError, "it holds newcomer, other"),
        ("1 / 0", SourceError, "ZeroDivisionError"),
    ],
)
def test_a_file_that_is_no_literal(text: str, error: type[Exception], says: str, tmp_path: Path) -> None:
    path = tmp_path / "newcomer.py"
    path.write_text(text)
    with pytest.raises(error, match=says):
        load_family(str(path))
    with pytest.raises(SourceError, match="no such file"):
        load_family(str(tmp_path / "gone.py"))
    with pytest.raises(RequestError, match="unknown"):
        load_family("gone")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": replace(LLAMA.attentions[0], value="values")}, "attention 1 names the axis 'values'"),
        ({"norms": {**LLAMA.norms, "odd": Norm("4", "rms", eps=1e-5)}}, "norm 'odd' names the axis '4'"),
        ({"tensors": {**LLAMA.tensors, "x": "hidden <- (heads _)"}}, "_ inside a product or a sum"),
        ({"axes": {**LLAMA.axes, "extra": Field("no_such_size")}}, "its size from no_such_size, which the sample"),
        ({"streams": ("river",)}, "streams names the axis 'river'"),
    ],
)
def test_a_literal_that_names_what_it_does_not_declare_is_told_so(changes: dict[str, Any], said: str) -> None:
    found = cover_family(replace(LLAMA, **changes))
    assert any(said in problem for problem in found.problems)
    assert not found.samples  # nothing more is asked of it
    assert cover_family(LLAMA).problems == []
