"""The pipeline: which passes run, and what it makes of whole models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import graphopt.passes
from graphopt.compiler.pass_ import PASSES, Pass, register
from graphopt.errors import PassError
from graphopt.kernels.attention import OP as ATTENTION
from graphopt.passes.default import CALIBRATING, PACKING, PIPELINE, packing, pipeline
from graphopt.passes.remove_dead_code import PASS as REMOVE_DEAD_CODE
from tests import _models as models
from tests._models import Example, padding, tokens
from tests.passes._harness import Ran, run


@pytest.fixture
def unplaced() -> Iterator[Pass]:
    """A registered pass that the pipeline does not list."""
    rule = register(Pass("fuse_everything", "fuse", lambda graph: (), lambda rewriter, match: None))
    yield rule
    del PASSES[rule.name]


def names(*args, **kwargs) -> list[str]:
    return [rule.name for rule in pipeline(*args, **kwargs)]


def test_every_pass_has_a_place_and_a_reason() -> None:
    folder = Path(str(graphopt.passes.__file__)).parent
    files = {path.stem for path in folder.glob("*.py") if not path.name.startswith("_")} - {"default"}
    entries = (*PIPELINE, *PACKING, *CALIBRATING)
    assert {entry.rule.name for entry in entries} == files
    assert all(entry.why for entry in entries)


def test_the_default_runs_everything_up_to_level_2() -> None:
    exact = [entry.rule for entry in PIPELINE if entry.rule.exact]
    assert names() == [rule.name for rule in exact if rule.level <= 2]
    assert names(level=3) == [rule.name for rule in exact]


def test_what_is_not_exact_runs_only_when_enabled() -> None:
    lossy = {entry.rule.name for entry in PIPELINE if not entry.rule.exact}
    assert lossy
    assert lossy.isdisjoint(names(level=9))
    assert lossy <= set(names(enable=lossy))


def test_level_0_runs_nothing() -> None:
    assert names(level=0) == []


def test_level_0_and_one_pass() -> None:
    assert names(level=0, enable=["fuse_linear"]) == ["fuse_linear"]
    assert names(level=0, enable=["fuse_linear", "remove_noops"]) == ["remove_noops"] * 2 + [
        "fuse_linear",
        "remove_noops",
    ]


def test_disabling_by_exact_name() -> None:
    assert "remove_noops" not in names(disable=["remove_noops"])
    assert set(names(disable=["fuse_add_layer_norm"])) == set(names()) - {"fuse_add_layer_norm"}
    assert names(enable=["fuse_linear"], disable=["fuse_linear"]) == names(disable=["fuse_linear"])


@pytest.mark.parametrize("argument", ["enable", "disable"])
def test_an_unknown_name_is_refused_and_near_ones_are_named(argument: str) -> None:
    with pytest.raises(PassError, match="there is no pass 'fuse_rms_nrom'") as caught:
        pipeline(**{argument: ["fuse_rms_nrom"]})
    assert "did you mean fuse_rms_norm" in str(caught.value)
    with pytest.raises(PassError, match=r"the passes are: .*remove_noops"):
        pipeline(**{argument: ["qqq"]})


def test_packing_runs_all_of_its_passes_but_those_disabled() -> None:
    assert packing() == [entry.rule for entry in PACKING]
    assert packing(["hoist_pack"]) == [entry.rule for entry in PACKING if entry.rule.name != "hoist_pack"]


def test_part_of_a_name_is_not_a_name() -> None:
    with pytest.raises(PassError, match=r"did you mean .*fuse_linear"):
        pipeline(disable=["linear"])


def test_a_pass_without_a_place_runs_when_enabled(unplaced: Pass) -> None:
    assert unplaced.name not in names()
    assert names(enable=[unplaced.name])[-2:] == [unplaced.name, REMOVE_DEAD_CODE.name]
    assert names(level=0, enable=[unplaced.name, unplaced.name]) == [unplaced.name]
    assert names(enable=[unplaced.name], disable=[unplaced.name]) == names()


# Whole models


def optimized(example: Example, dynamic: bool = False) -> Ran:
    return run(
        pipeline(),
        example.model,
        *example.args,
        kwargs=example.kwargs,
        dynamic=example.dynamic if dynamic else None,
        redraw=False,
    )


def masks(ran: Ran) -> Counter[tuple[bool, bool]]:
    """How many attentions have a mask over keys alone, (batch, 1, 1, keys), and are causal."""
    found: Counter[tuple[bool, bool]] = Counter()
    for node in ran.graph.calls:
        if node.target is ATTENTION.overload:
            mask, causal = node.args[3:5]
            assert mask is None or tuple(mask.meta["val"].shape[1:3]) == (1, 1)
            found[mask is not None, causal] += 1
    return found


def none(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 0)


def layers(example: Example) -> int:
    """How many the model has; the expected counts below are by layer."""
    config = getattr(example.model, "encoder" if isinstance(example.model, models.Embedder) else "config")
    return getattr(config, "config", config).num_hidden_layers


def of_bert(count: int, pooler: int = 1) -> dict[str, int]:
    return {
        "embedding_layer_norm": 1,
        "attention": count,
        "add_layer_norm": 2 * count,
        "linear_activation": count + pooler,
        "split_with_sizes": count,
        **none("scaled_dot_product_attention", "layer_norm", "gelu", "embedding", "add", "transpose"),
        **none("__and__", "ge", "index", "arange"),
    }


FIXED_AND_DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])


@FIXED_AND_DYNAMIC
def test_bert(dynamic: bool) -> None:
    example = models.bert()
    count = layers(example)
    ran = optimized(example, dynamic).counts(**of_bert(count))
    ran.counts(linear=3 * count)  # Q, K and V in one, output, the feed-forward block's second
    assert masks(ran) == {(True, False): count}
    if dynamic:
        for mask in (padding((4, 3, 1), 4), padding((9,), 9)):
            ran.agrees(tokens(*mask.shape), mask, 1 - mask)


def test_minilm() -> None:
    example = models.minilm()
    ran = optimized(example).counts(**of_bert(layers(example), pooler=0), masked_mean_pool=1)
    assert masks(ran) == {(True, False): layers(example)}


@FIXED_AND_DYNAMIC
def test_gpt2(dynamic: bool) -> None:
    example = models.gpt2()
    count = layers(example)
    ran = optimized(example, dynamic).counts(
        attention=count,
        add_layer_norm=2 * count + 1,  # the first one's sum is that of the embeddings
        layer_norm=0,
        add=0,
        linear_activation=count,
        linear=3 * count + 1,
        **none("addmm", "tanh", "pow", "transpose", "scaled_dot_product_attention", "cumsum", "index"),
    )
    assert masks(ran) == {(False, True): count}
    if dynamic:
        ran.agrees(tokens(3, 4)).agrees(tokens(1, 9))


@FIXED_AND_DYNAMIC
def test_llama(dynamic: bool) -> None:
    example = models.llama()
    count = layers(example)
    ran = optimized(example, dynamic).counts(
        attention=count,
        rope=2 * count,
        gated_mlp=count,
        rms_norm=1,
        add_rms_norm=2 * count,
        linear=3 * count + 1,  # Q, K and V in one, output, the feed-forward block's second; the head
        split_with_sizes=count,
        cos=int(dynamic),  # of half the table, once for all layers
        sin=int(dynamic),
        **none("rsqrt", "silu", "neg", "cat", "transpose", "__and__", "le", "index", "add"),
    )
    assert masks(ran) == {(True, True): count}
    if dynamic:
        for mask in (padding((4, 3, 1), 4), padding((9,), 9)):
            ran.agrees(tokens(*mask.shape), mask)


SLOW_IF_DYNAMIC = [False, pytest.param(True, marks=pytest.mark.slow)]


@pytest.mark.parametrize("dynamic", SLOW_IF_DYNAMIC, ids=["fixed", "dynamic"])
def test_t5(dynamic: bool) -> None:
    example = models.t5()
    ran = optimized(example, dynamic)
    encoder, decoder = example.model.config.num_layers, example.model.config.num_decoder_layers
    ran.counts(
        attention=encoder + 2 * decoder,
        rms_norm=2,
        add_rms_norm=2 * encoder + 3 * decoder,
        linear_activation=encoder + decoder,
        linear=3 * encoder + 6 * decoder + 1,  # Q, K and V in one; in cross-attention, K and V; the head
        **none("scaled_dot_product_attention", "rsqrt", "transpose", "ge", "__and__"),
    )
    if dynamic:
        ran.agrees(tokens(3, 4), tokens(3, 2, seed=1)).agrees(tokens(1, 9), tokens(1, 5, seed=1))


@FIXED_AND_DYNAMIC
def test_vit(dynamic: bool) -> None:
    example = models.vit()
    count = layers(example)
    ran = optimized(example, dynamic).counts(
        attention=count,
        add_layer_norm=2 * count + 1,  # the first one's sum is that of patches and positions
        layer_norm=0,
        add=0,
        linear_activation=count + 1,  # the pooler
        linear=3 * count,
        **none("gelu", "scaled_dot_product_attention"),
    )
    if dynamic:
        ran.agrees(models.randn(3, 3, 8, 8)).agrees(models.randn(1, 3, 8, 8))


def test_a_convolutional_network() -> None:
    ran = optimized(models.cnn())
    convolutions = ran.captured.op_counts()["aten.conv2d"]
    ran.counts(conv_activation=convolutions - 1, conv2d=1, batch_norm=0, relu=0, add=0)


def test_bert_in_half_precision() -> None:
    example = models.bert()
    example.model.to(torch.bfloat16)
    optimized(example).counts(**of_bert(layers(example)))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_attention_spelled_out_is_the_same_attention(name: str) -> None:
    """What transformers writes out in its eager attention."""
    example = models.FAMILIES[name]()
    called = optimized(example).graph.op_counts()
    example.model.set_attn_implementation("eager")
    spelled = optimized(example).counts(softmax=0, matmul=0)
    for op in ("graphopt.attention", "aten.linear", "aten.transpose"):
        assert spelled.graph.op_counts().get(op) == called.get(op)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_level_3(family: str) -> None:
    """What only level 3 runs fits in where it stands: nothing is reverted, a second run finds nothing."""
    example = models.FAMILIES[family]()
    ran = run(
        pipeline(level=3),
        example.model,
        *example.args,
        kwargs=example.kwargs,
        dynamic=example.dynamic,
        redraw=False,
    )
    if family in ("gpt2", "llama", "vit", "t5"):  # norms before the blocks, which take their factors in
        assert ran.kept["fold_norm_affine"]
