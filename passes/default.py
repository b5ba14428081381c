"""The pipeline: which passes run, in which order, and why there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from graphopt.compiler.pass_ import Pass, find, users_passes
from graphopt.passes import (
    cast_to_bfloat16,
    cast_to_float16,
    fold_attention_mask,
    fold_attention_scale,
    fold_constants,
    fold_conv_batch_norm,
    fold_conv_conv,
    fold_embedding_linear,
    fold_embedding_scale,
    fold_embedding_sum,
    fold_index,
    fold_linear_batch_norm,
    fold_linear_linear,
    fold_linear_reshape,
    fold_norm_affine,
    fold_scale,
    fold_sizes,
    fold_weight_layout,
    fuse_activation,
    fuse_add_layer_norm,
    fuse_add_rms_norm,
    fuse_attention,
    fuse_conv_activation,
    fuse_embedding_layer_norm,
    fuse_gated_mlp,
    fuse_group_norm,
    fuse_group_norm_silu,
    fuse_layer_norm,
    fuse_layer_norm_add,
    fuse_linear,
    fuse_linear_activation,
    fuse_linear_cross_entropy,
    fuse_masked_mean_pool,
    fuse_pointwise,
    fuse_quantized_linear,
    fuse_rms_norm,
    fuse_rms_norm_add,
    fuse_rope,
    fuse_sandwich_rms_norm,
    fuse_softmax,
    fuse_softmax_attention,
    hoist_pack,
    hoist_slice,
    merge_casts,
    merge_common_subexpressions,
    merge_convolutions,
    merge_linears,
    merge_permutes,
    merge_quantizations,
    merge_reshapes,
    pack_tokens,
    prune_asserts,
    prune_channels_by_magnitude,
    prune_heads_by_magnitude,
    prune_two_of_four,
    prune_zero_channels,
    prune_zero_heads,
    prune_zero_layers,
    quantize_conv_int8,
    quantize_linear_int4,
    quantize_linear_int8,
    quantize_linear_int8_static,
    quantize_linear_int8_weights,
    remove_dead_code,
    remove_noops,
    simplify_arithmetic,
    split_conv_activation,
)


@dataclass(frozen=True)
class Entry:
    """A place in the pipeline.

    Args:
        rule: the pass.
        why: the reason for its place.
    """

    rule: Pass
    why: str


PIPELINE: tuple[Entry, ...] = (
    Entry(prune_asserts.PASS, "first: nothing below folds, merges or fuses around what only a check reads"),
    Entry(remove_noops.PASS, "patterns then see producers, not casts and views that do nothing"),
    Entry(fold_sizes.PASS, "what is made of equal sizes is then equal, and merged below"),
    Entry(merge_casts.PASS, "likewise: a value, not the round trip that it makes through another type"),
    Entry(merge_quantizations.PASS, "likewise: codes, not the round trip that they make through numbers"),
    Entry(fold_index.PASS, "needs the ranges that index a mask before folding makes constants of them"),
    Entry(fold_embedding_scale.PASS, "a scaled lookup is a lookup for the next two"),
    Entry(
        fold_embedding_sum.PASS,
        "fewer lookups are left to fuse; needs them before folding makes rows of them",
    ),
    Entry(
        fuse_embedding_layer_norm.PASS, "needs the lookups before folding makes a row of the position table"
    ),
    Entry(fuse_quantized_linear.PASS, "before folding makes a float weight of the integers"),
    Entry(
        fold_constants.PASS, "masks, positions and rotary tables become values that later passes can look at"
    ),
    Entry(merge_common_subexpressions.PASS, "rotary tables and masks built once a layer become one"),
    Entry(remove_noops.PASS, "folding shows additions of 0 and masks that are true everywhere"),
    Entry(fold_conv_batch_norm.PASS, "before anything looks at what follows a convolution"),
    Entry(fold_conv_conv.PASS, "once no batch norm stands between two convolutions"),
    Entry(fuse_linear.PASS, "one spelling of a projection for every pass below"),
    Entry(fold_weight_layout.PASS, "what is left of products with a weight: those without a bias"),
    Entry(fold_linear_batch_norm.PASS, "once every projection is a linear"),
    Entry(fold_linear_reshape.PASS, "norms and sums then stand next to projections, in one shape"),
    Entry(fold_embedding_linear.PASS, "once every projection is a linear"),
    Entry(fold_linear_linear.PASS, "once no batch norm stands between two projections"),
    Entry(merge_permutes.PASS, "one spelling of a transpose for rope, attention and the channels' trackers"),
    Entry(hoist_slice.PASS, "while every layer is one node, before the fusions that positions cannot pass"),
    Entry(prune_heads_by_magnitude.PASS, "on request: whole heads first, then channels of what is left"),
    Entry(prune_channels_by_magnitude.PASS, "on request: before the fusions, as the exact ones below"),
    Entry(prune_two_of_four.PASS, "on request: on the weights that are left"),
    Entry(prune_zero_layers.PASS, "before heads and channels: what a removed layer holds needs no pruning"),
    Entry(prune_zero_heads.PASS, "before channels, which cannot take a whole head"),
    Entry(prune_zero_channels.PASS, "before the fusions, which hide what lies between two layers"),
    Entry(fuse_activation.PASS, "named before projections, convolutions and gates take them in"),
    Entry(fuse_softmax.PASS, "attention spelled out has a softmax then"),
    Entry(fuse_group_norm.PASS, "before layer norms, which take the norm of a reshaped tensor for theirs"),
    Entry(fuse_group_norm_silu.PASS, "once the norm and the activation have their names"),
    Entry(fuse_layer_norm.PASS, "one spelling of a norm for every pass below"),
    Entry(fuse_rms_norm.PASS, "before the residual norms, which match the whole norm"),
    Entry(fuse_rope.PASS, "before attention, whose transposes it shares"),
    Entry(fuse_attention.PASS, "after rope, so that both agree on tokens first"),
    Entry(fuse_softmax_attention.PASS, "what does not call torch's attention but spells it out"),
    Entry(fold_constants.PASS, "the masks that attention was spelled with become one value"),
    Entry(remove_noops.PASS, "transposes put around rope and attention cancel"),
    Entry(fold_attention_scale.PASS, "a factor of queries or keys costs no weights there"),
    Entry(
        fold_scale.PASS,
        "behind the fusions, whose patterns have factors of their own; before Q, K and V merge",
    ),
    Entry(fold_attention_mask.PASS, "looks at the mask that attention carries"),
    Entry(
        fold_norm_affine.PASS, "level 3; while the norms stand alone, before they merge with what precedes"
    ),
    Entry(fuse_gated_mlp.PASS, "before projections take their activations, which would hide the gate"),
    Entry(fuse_linear_cross_entropy.PASS, "the head of a loss, before heads are merged"),
    Entry(merge_linears.PASS, "finds Q, K and V behind attention; a gated block keeps its own two"),
    Entry(fuse_sandwich_rms_norm.PASS, "before the two ops that each take half of it"),
    Entry(
        fuse_rms_norm_add.PASS, "before the norms of sums, which move one tensor more where both would fit"
    ),
    Entry(fuse_layer_norm_add.PASS, "likewise"),
    Entry(fuse_add_layer_norm.PASS, "after embedding_layer_norm, which also ends in a norm of a sum"),
    Entry(fuse_add_rms_norm.PASS, "after rms_norm"),
    Entry(fuse_masked_mean_pool.PASS, "anywhere once casts and views that do nothing are gone"),
    Entry(fuse_linear_activation.PASS, "behind gated blocks and residual norms, which take theirs first"),
    Entry(merge_convolutions.PASS, "before convolutions take their activations in"),
    Entry(fuse_conv_activation.PASS, "what follows a convolution that batch norm is folded into"),
    Entry(merge_reshapes.PASS, "behind the fusions, whose patterns know the model's own spelling"),
    Entry(simplify_arithmetic.PASS, "behind the fusions: what they left is nobody's pattern"),
    Entry(fold_sizes.PASS, "the fusions asked for sizes of their own"),
    Entry(merge_common_subexpressions.PASS, "half rotary tables, once a layer, become one"),
    Entry(fold_constants.PASS, "half rotary tables and whatever the fusions made constant"),
    Entry(fuse_pointwise.PASS, "level 3; takes what no other pass has a name for, once nothing else follows"),
    Entry(quantize_linear_int8.PASS, "on request: of what is fused, so that activations are epilogues"),
    Entry(quantize_linear_int8_static.PASS, "likewise; its steps are those of the graph so far"),
    Entry(quantize_conv_int8.PASS, "likewise"),
    Entry(quantize_linear_int8_weights.PASS, "likewise"),
    Entry(quantize_linear_int4.PASS, "likewise"),
    Entry(cast_to_bfloat16.PASS, "on request: behind quantization, of what that left in float32"),
    Entry(cast_to_float16.PASS, "likewise"),
    Entry(remove_dead_code.PASS, "last: what the others left behind"),
)


PACKING: tuple[Entry, ...] = (  # on the rewritten graph, for a plan that computes real tokens only
    Entry(pack_tokens.PASS, "first: where the packed tokens end up"),
    Entry(hoist_pack.PASS, "moves the packing up from there"),
    Entry(remove_dead_code.PASS, "last: what computed the padding"),
)


CALIBRATING: tuple[Entry, ...] = (  # on the rewritten graph, before the ranges of its values are observed
    Entry(split_conv_activation.PASS, "what a convolution gives before its epilogue is a value then"),
)


def pipeline(level: int = 2, enable: Iterable[str] = (), disable: Collection[str] = ()) -> list[Pass]:
    """The passes that run, the user's own among them.

    Args:
        level: passes of this level and below run; 0 runs none but those enabled.
        enable: exact names of passes to run although their level is higher, although they are not exact, or
            although they have no place in the pipeline; these run behind it.
        disable: exact names of passes to leave out.

    Raises:
        PassError: a name is unknown; near names are listed.
    """
    rules = [entry.rule for entry in PIPELINE]
    own = users_passes()
    wanted, unwanted = [find(name).name for name in enable], [find(name).name for name in disable]
    placed = {rule.name for rule in (*rules, *own)}
    for rule in (*own, *(find(name) for name in dict.fromkeys(wanted) if name not in placed)):
        rules.insert(_place(rules, rule), rule)
    chosen = [rule for rule in rules if (rule.level <= level and rule.exact) or rule.name in wanted]
    return [rule for rule in chosen if rule.name not in unwanted]


def packing(disable: Collection[str] = ()) -> list[Pass]:
    """The passes that make a graph compute real tokens only, but for those disabled by exact name."""
    return [entry.rule for entry in PACKING if entry.rule.name not in disable]


def _place(rules: Sequence[Pass], rule: Pass) -> int:
    """Where a pass that has no entry runs: behind the one it names, else last but for the clearing up."""
    if rule.after is None:
        return len(rules) - 1
    after = find(rule.after)
    return max((i + 1 for i, other in enumerate(rules) if other is after), default=len(rules) - 1)
