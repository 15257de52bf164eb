"""Convolutional nets grow as Transformers do: the same function to 1e-12 in eval mode, batch statistics and all.

Controls break one rule each, and the difference is seen.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from conv_kit import (
    IMAGES,
    NETS,
    REQUESTS,
    apart,
    chain,
    convnet,
    logits,
    new_entries,
    planned,
    relative,
    resnet,
)
from torch import Tensor, nn
from torch.nn import functional as F

from growformer.api.convnets import expand_convnet, plan_convnet
from growformer.errors import RequestError
from growformer.methods import METHODS
from growformer.models import ConvConfig, ConvNet, StageSize
from growformer.planning import Plan, apply, rows
from growformer.planning.apply import Applier
from growformer.proof.alive import dead_entries
from growformer.proof.bar import BAR
from growformer.proof.float64 import build64

SEEN = 1e-3
"""A change that is more than rounding."""

WIDTH = [name for name, method in METHODS.items() if "mlp" in method.ways and not method.ways["mlp"].ahead]
BOTH = ["paper", "zero-in", "net2net", "lemon", "staged"]
CASES = [(net, request, method) for net in NETS for request in ("wider", "deeper", "both") for method in BOTH]
CASES = [case for case in CASES if case[0] != "joined" or case[1] == "both"]
CASES += [(net, "wider", method) for net in ("bottleneck", "convnet") for method in WIDTH if method not in BOTH]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("net", "request_", "method"), CASES)
def test_the_function_is_kept_in_eval_mode(net: str, request_: str, method: str) -> None:
    model = NETS[net]()
    grown = expand_convnet(model, method=method, seed=3, allow_dead=True, **REQUESTS[net][request_])
    count = [sum(x.numel() for x in m.parameters()) for m in (model, grown)]
    assert count[1] > count[0]
    assert apart(model, grown) <= BAR


@pytest.mark.parametrize(("net", "request_"), [("bottleneck", "both"), ("basic", "both"), ("chain", "wider")])
@pytest.mark.parametrize("method", ["paper", "zero-in", "net2net"])
def test_it_is_kept_in_training_mode_where_no_layer_is_the_identity(net: str, request_: str, method: str) -> None:
    """Each channel has its own batch's statistics, and a copy has those of what it copies."""
    model = NETS[net]()
    grown = expand_convnet(model, method=method, seed=3, allow_dead=True, **REQUESTS[net][request_])
    assert relative(logits(model.train()), logits(grown.train())) <= BAR
    # Both have moved their running statistics, and agree on them.
    assert apart(model.eval(), grown.eval()) <= BAR


def test_the_identity_kernel_holds_in_eval_mode_only() -> None:
    model = chain()
    grown = expand_convnet(model, **REQUESTS["chain"]["deeper"])
    assert apart(model, grown) <= BAR
    assert relative(logits(model.train()), logits(grown.train())) > SEEN


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
def test_a_grown_resnet_loads_with_stock_from_pretrained(layer_type: str, bare: bool, tmp_path: Path) -> None:
    model = resnet(layer_type, bare, dtype=torch.float32)
    request = REQUESTS[layer_type]["both"]
    model.save_pretrained(tmp_path / "source")
    expand_convnet(model, seed=3, **request).save_pretrained(tmp_path / "grown")
    loaded, report = type(model).from_pretrained(tmp_path / "grown", output_loading_info=True)
    assert not any(report.values())
    assert list(loaded.config.hidden_sizes) == request["hidden_sizes"]
    assert list(loaded.config.depths) == request["depths"]
    # Growing in float64, from the stored numbers, is what the claim is of.
    source = build64(tmp_path / "source")
    grown = expand_convnet(source, seed=3, **request)
    old = logits(source).flatten(1)
    new = logits(grown).flatten(1)[:, : old.shape[1]]  # a bare model gives out channels: the old ones come first
    assert relative(old, new) <= BAR
    with torch.no_grad():
        images = IMAGES.float()
        a, b = (m(images)[0 if not bare else 1].flatten(1) for m in (model.eval(), loaded.eval()))
    assert relative(a, b[:, : a.shape[1]]) < 1e-4  # float32 rounds


def image_loss(network: nn.Module) -> Tensor:
    images = torch.randn(24, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    out = network(images)
    return F.cross_entropy(out if isinstance(out, Tensor) else out.logits, torch.arange(24) % 5)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["paper", "zero-in", "net2net"])
def test_every_new_entry_can_learn_or_is_named(net: str, method: str) -> None:
    plan = planned(net, "both", method)
    grown = expand_convnet(NETS[net](), method=method, seed=3, allow_dead=True, **REQUESTS[net]["both"])
    masks = new_entries(plan, grown)
    assert sum(int(mask.sum()) for mask in masks.values()) > 0
    # Written with zeros, channels stand where a ReLU has no slope; the plan says so.
    assert bool(sum(dead_entries(grown, masks, image_loss).values())) == bool(plan.dead) == (method == "zero-in")


def test_what_never_learns_must_be_asked_for() -> None:
    with pytest.raises(RequestError, match=r"no gradient ever reaches them.*allow_dead=True goes on"):
        expand_convnet(NETS["chain"](), method="zero-in", **REQUESTS["chain"]["wider"])


def test_zeros_on_both_sides_are_seen_as_dead() -> None:
    grown = expand_convnet(NETS["basic"](), method="paper", **REQUESTS["basic"]["both"])
    masks = new_entries(planned("basic", "both", "paper"), grown)
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    with torch.no_grad():
        grown.get_parameter(name)[8:] = 0
        grown.get_parameter(name.replace("convolution", "normalization"))[8:] = 0
    assert dead_entries(grown, masks, image_loss)[name] > 0


@pytest.mark.parametrize(("method", "part"), [("halves", True), ("hyperclone", False)])
def test_copies_part_where_their_readers_differ(method: str, part: bool) -> None:
    """Even shares give copies one gradient, so that they stay alike; shares drawn entry by entry do not."""
    grown = expand_convnet(chain(), method=method, chain=[12, 7, 9])
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        image_loss(grown).backward()
        optimizer.step()
    weight = grown.get_parameter("chain.0.conv.weight").detach()
    assert (float((weight[:6] - weight[6:]).abs().max()) > 1e-4) == part


# --- controls ---------------------------------------------------------------------------------------------------------


def edited(grown: nn.Module, suffix: str, edit: Callable[[Tensor], None]) -> nn.Module:
    """The net, with every tensor of its state whose name ends so changed in place."""
    hits = [x for name, x in grown.state_dict().items() if name.endswith(suffix)]
    assert hits
    with torch.no_grad():
        for x in hits:
            edit(x)
    return grown


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("embedder.normalization.running_mean", 0.0), ("embedder.normalization.running_var", 1.0)],
)
def test_control_statistics_that_do_not_grow(suffix: str, start: float) -> None:
    """Copies whose means, or variances, are those of a new batch norm."""
    model = resnet("basic")
    grown = expand_convnet(model, embedding_size=10)
    assert apart(model, grown) <= BAR
    assert apart(model, edited(grown, suffix, lambda x: x[6:].fill_(start))) > SEEN


@pytest.mark.parametrize("suffix", ["embedder.normalization.weight", "embedder.normalization.bias"])
def test_control_gains_and_shifts_that_do_not_grow(suffix: str) -> None:
    model = resnet("basic")
    grown = expand_convnet(model, embedding_size=10)
    assert apart(model, edited(grown, suffix, lambda x: x[6:].fill_(0.0))) > SEEN


def test_control_readers_that_are_not_divided() -> None:
    model = resnet("bottleneck")
    grown = expand_convnet(model, method="hyperclone", hidden_sizes=[8, 24])
    assert apart(model, grown) <= BAR
    assert apart(model, edited(grown, "classifier.1.weight", lambda x: x.mul_(2))) > SEEN


def test_control_a_shortcut_that_is_left_out() -> None:
    """All that writes a stage's stream writes its copies: the shortcut as well as the blocks."""
    model = resnet("bottleneck")
    grown = expand_convnet(model, hidden_sizes=[8, 24])
    name = "stages.1.layers.0.shortcut.convolution.weight"
    assert apart(model, edited(grown, name, lambda x: x[12:].zero_())) > SEEN


@pytest.mark.parametrize("suffix", ["bias", "weight"])
def test_control_a_new_layer_whose_last_batch_norm_is_left_open(suffix: str) -> None:
    model = resnet("basic")
    grown = expand_convnet(model, depths=[3, 3], layers_at={"stage 0": [1]})
    name = f"stages.0.layers.1.layer.1.normalization.{suffix}"
    assert apart(model, grown) <= BAR
    assert apart(model, edited(grown, name, lambda x: x.fill_(0.5))) > SEEN


def test_control_readers_that_see_new_channels() -> None:
    model = convnet()
    grown = expand_convnet(model, method="paper", chain=[8, 7])
    assert apart(model, grown) <= BAR
    assert apart(model, edited(grown, "chain.1.conv.weight", lambda x: x[:, 6:].fill_(0.1))) > SEEN


def test_control_a_gain_that_closes_is_left_open() -> None:
    model = convnet()
    grown = expand_convnet(model, method="zero-in", allow_dead=True, chain=[8, 7])
    assert bool(grown.state_dict()["chain.0.conv.weight"][6:].any())  # the gain closes, not the kernel
    assert apart(model, edited(grown, "chain.0.norm.weight", lambda x: x[6:].fill_(1.0))) > SEEN


def test_control_an_identity_that_forgets_eps() -> None:
    model = chain()
    grown = expand_convnet(model, chain=[6, 6, 7, 9], layers_at={"link": [1]})
    assert apart(model, grown) <= BAR
    assert apart(model, edited(grown, "chain.1.norm.running_var", lambda x: x.fill_(1.0))) > BAR


# --- plans and refusals -----------------------------------------------------------------------------------------------


def test_new_channels_and_layers_start_as_net2net_has_them() -> None:
    model = convnet()
    grown = expand_convnet(model, method="net2net", **REQUESTS["convnet"]["both"]).state_dict()
    old = model.state_dict()
    # Equation 3: each new channel is an old one again, and what reads m alike has 1/m of the weights.
    rows = [
        int((old["chain.0.conv.weight"] - row).abs().flatten(1).sum(1).argmin()) for row in grown["chain.0.conv.weight"]
    ]
    for statistic in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(grown[f"chain.0.norm.{statistic}"], old[f"chain.0.norm.{statistic}"][rows])
    assert rows[:6] == [*range(6)]
    # The identity between: one in the middle of each channel's own kernel.
    kernel = torch.zeros(8, 8, 3, 3, dtype=torch.float64)
    kernel[range(8), range(8), 1, 1] = 1
    assert torch.equal(grown["chain.1.conv.weight"], kernel)
    read = grown["chain.2.conv.weight"]
    for channel in range(6):
        mine = [i for i, row in enumerate(rows) if row == channel]
        whole = read[:7, mine].sum(1)
        assert torch.allclose(whole, old["chain.1.conv.weight"][:, channel], rtol=0, atol=1e-15)
        assert all(torch.equal(read[:, mine[0]], read[:, i]) for i in mine)


def test_statistics_of_new_channels_are_those_of_a_new_batch_norm() -> None:
    grown = expand_convnet(resnet("basic"), method="paper", embedding_size=10).state_dict()
    name = "resnet.embedder.embedder.normalization."
    for statistic, start in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
        assert torch.equal(grown[name + statistic][6:], torch.full((4,), start, dtype=torch.float64))
    assert grown[name + "num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("net", NETS)
def test_a_plan_is_plain_data(net: str) -> None:
    plan = planned(net, "both", "net2net")
    assert Plan.from_json(json.loads(plan.dumps())).tensors == plan.tensors
    assert plan.function == "exact"


def test_the_source_is_left_as_it_is() -> None:
    model = resnet("basic")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    config = model.config.to_dict()
    logits(expand_convnet(model, **REQUESTS["basic"]["both"]).train())  # counts its batches in place
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.config.to_dict() == config


REFUSED = [
    ("basic", {"hidden_sizes": [8, 10]}, "never takes away"),
    ("basic", {"hidden_sizes": [8]}, "depths 2"),
    ("basic", {"hidden_sizes": 16}, "hidden_sizes=16"),
    ("basic", {"depths": [2, 0]}, "depths=0"),
    ("basic", {"depths": [1, 3]}, "never takes away"),
    ("basic", {"hidden_size": 16}, "embedding_size, hidden_sizes, depths"),
    ("basic", {"embedding_size": 8}, "first stage"),
    ("joined", {"embedding_size": 10}, "first stage"),
    ("basic", {"depths": [3, 3], "layers_at": {"stage 0": [0]}}, "first"),
    ("basic", {"depths": [3, 3], "layers_at": {"stage 7": [1]}}, "stage 7"),
    ("basic", {"depths": [3, 3], "method": "hyperclone"}, "layer"),
    ("basic", {"depths": [3, 3], "method": "stack"}, "layer=paper"),
    ("basic", {"hidden_sizes": [16, 12], "method": "bert2bert-aki"}, "next layer"),
    ("basic", {"hidden_sizes": [16, 12], "method": "llama-pro"}, "mlp=paper"),
    ("chain", {"chain": [6, 8, 7, 9], "layers_at": {"link": [1]}}, "identity"),
]


@pytest.mark.parametrize(("net", "request_", "said"), REFUSED)
def test_what_cannot_be_is_refused(net: str, request_: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        plan_convnet(NETS[net](), **request_)


def test_what_needs_a_relu_is_refused_without() -> None:
    model = resnet("basic", hidden_act="gelu")
    with pytest.raises(RequestError, match="ReLU"):
        plan_convnet(model, depths=[3, 3])
    with pytest.raises(RequestError, match="ReLU"):
        plan_convnet(model, method="zero-in", embedding_size=10)
    assert apart(model, expand_convnet(model, embedding_size=10, hidden_sizes=[14, 24])) <= BAR


def test_a_transformer_is_no_convolutional_net() -> None:
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(RequestError, match="ResNetModel"):
        plan_convnet(transformers.LlamaModel(config), hidden_size=16)


def test_a_config_is_plain_data_and_says_what_it_refuses() -> None:
    config = ConvConfig(3, 5, (6, 7), (StageSize(8, (9, 10)),))
    assert ConvConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ConvNet(config)(IMAGES).shape == (4, 5)
    for broken in ({"chain": ()}, {"chain": (0,)}, {"eps": 0.0}):
        with pytest.raises(ValueError, match="ConvConfig"):
            ConvConfig(**{"colors": 3, "classes": 5, "chain": (6,), **broken})


def test_rows_made_apart_are_those_made_together() -> None:
    """The identity as well, of which each row has its one elsewhere."""
    model = convnet()
    plan = planned("convnet", "both", "net2net")
    state = model.state_dict()
    whole = apply(plan, state)
    applier = Applier(plan, lambda name, rows: state[name] if rows is None else state[name][rows])
    for tensor in plan.tensors:
        if tensor.shape:
            parts = [applier.piece(tensor, at, at + 1) for at in range(tensor.shape[0])]
            assert torch.equal(torch.cat(parts), whole[tensor.name])


@pytest.mark.parametrize("method", ["net2net", "lemon", "dyadic", "sparkling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_picked_whole_are_those_made_block_by_block(
    method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned("bottleneck", "wider", method)
    state = {name: x.to(dtype) if x.is_floating_point() else x for name, x in NETS["bottleneck"]().state_dict().items()}
    found = []
    for many, picked in ((0, True), (1 << 30, False)):
        monkeypatch.setattr(rows, "MANY", many)
        assert any(rows.gathers(tensor) for tensor in plan.tensors) == picked
        found.append(apply(plan, state))
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_blocks_of_one_sort_are_judged_once() -> None:
    """A tensor's fidelity and factors are those of all its blocks, though only one of each sort is looked at."""
    for tensor in planned("convnet", "both", "net2net").tensors:
        blocks = [block for block in tensor.blocks() if block.source is not None]
        assert set(tensor.factors) == {block.factor for block in blocks}
        assert len(list(tensor.sorts())) <= max(1, len(list(tensor.blocks())))
