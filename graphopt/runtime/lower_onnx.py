"""From a Graph to an ONNX model: PyTorch's exporter, with graphopt's ops and projections translated our way.

Nothing is copied: the model's initializers refer to the graph's own tensors until they are written to disk or
handed to a session.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from torch import fx

from graphopt.errors import LoweringError
from graphopt.ir import provenance
from graphopt.ir.graph import Graph, op_name
from graphopt.ir.tuning import Tuning, spelled
from graphopt.runtime.onnx_packing import pack_projections
from graphopt.runtime.onnx_rows import keep_rows
from graphopt.runtime.onnx_translation import quiet, translate

# The residual norms, and which of their inputs is added to the sum. Their last outputs may be left out.
_BIAS_OF = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}

# Whether the norm adds the bias of a product. The CUDA provider's Gemm copies a bias into its output in a
# kernel of its own; its residual norms read one on the way.
_NORM_ADDS_BIAS: dict[Tuning, bool] = {"any": False, "cuda": True}

# Whether attention takes Q, K and V packed, which the CPU's kernel does not.
_IS_PACKED: dict[Tuning, bool] = {"any": False, "cuda": True}

_TRANSLATED = re.compile(r"%(\w+)")


def to_onnx(graph: Graph) -> ir.Model:
    """Lower a graph; inputs and outputs keep their order, and every node its provenance.

    Args:
        graph: tensors in, tensors out; dynamic sizes become symbolic dimensions.

    Returns:
        The model. Each node's ``metadata_props`` carry ``graphopt.node``, ``graphopt.source`` (the user's
        ``file:line``) and ``graphopt.module``.

    Raises:
        LoweringError: an op has no translation.
    """
    try:
        model, names = translate(graph)
    except Exception as error:
        raise _failed(graph, error) from error
    _simplify(model)
    if spelled(_IS_PACKED):
        pack_projections(model)
    _name_inputs(model, graph)
    _strip_unused_outputs(model)
    _share_transposed(model)
    if spelled(_NORM_ADDS_BIAS):
        _add_bias_in_norm(model)
    keep_rows(model)
    _annotate(model, graph, names)
    return model


def _simplify(model: ir.Model) -> None:
    """Fold constants and merge equal nodes; the exporter's own rewrite rules take a third of its time.

    What they do, our passes have done to the graph, and ONNX Runtime does when it loads the model.
    """
    common.InlinePass()(model)
    with quiet():
        fold_constants_ir(model)
    for step in (
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)


def _failed(graph: Graph, error: Exception) -> LoweringError:
    """The exporter's error, with the node that it names."""
    cause = error.__cause__ or error
    found = _TRANSLATED.search(str(error))
    node = next((node for node in graph.calls if found is not None and node.name == found[1]), None)
    what = f"{node.name} ({op_name(node)}): " if node is not None else ""
    return LoweringError(
        f"ONNX export failed: {what}{type(cause).__name__}: {_first_lines(cause)}",
        where=place(node) if node is not None else None,
    )


def place(node: fx.Node) -> str | None:
    """The user's line and module that a node comes from, in words; None where that is not known."""
    found = provenance.of(node)
    module = f"{found.module} ({found.module_type})" if found.module else ""
    return ", ".join(filter(None, (found.source, module))) or None


def _first_lines(error: BaseException, count: int = 3) -> str:
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:count])


def _name_inputs(model: ir.Model, graph: Graph) -> None:
    """Give the inputs the graph's names, unless one of them means something else inside."""
    names = [node.name for node in graph.placeholders]
    taken = {value.name for node in model.graph for value in node.outputs} | set(model.graph.initializers)
    if not taken.intersection(names):
        for value, name in zip(model.graph.inputs, names, strict=True):
            value.name = name


def _strip_unused_outputs(model: ir.Model) -> None:
    """Drop trailing outputs that nobody reads (the sum of a residual norm): the kernel then skips them."""
    results = set(model.graph.outputs)
    for node in model.graph:
        if node.op_type not in _BIAS_OF:
            continue
        used = len(node.outputs)
        while used > 1 and not node.outputs[used - 1].uses() and node.outputs[used - 1] not in results:
            used -= 1
        if used < len(node.outputs):
            node.resize_outputs(used)


def _add_bias_in_norm(model: ir.Model) -> None:
    """Let a residual norm add the bias of the product before it."""
    for node in model.graph:
        at = _BIAS_OF.get(node.op_type)
        if at is None:
            continue
        product = _product_alone(node.inputs[0]) or _product_alone(node.inputs[1])
        if product is not None and (len(node.inputs) <= at or node.inputs[at] is None):
            node.resize_inputs(max(at + 1, len(node.inputs)))
            node.replace_input_with(at, product.inputs[2])
            product.resize_inputs(2)


def _product_alone(value: ir.Value | None) -> ir.Node | None:
    """The Gemm with a bias that made a value, reshaped perhaps, if nobody else reads it on the way."""
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Gemm":
            return node if len(node.inputs) == 3 and node.attributes.get_float("beta", 1.0) == 1.0 else None
        value = node.inputs[0] if node.op_type == "Reshape" else None
    return None


def _share_transposed(model: ir.Model) -> None:
    """Let Gemm read a transposed weight (GPT-2's Conv1D) as the model keeps it: written out, it is copied."""
    for value in model.graph.initializers.values():
        tensor = getattr(value.const_value, "raw", None)
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or tensor.is_contiguous():
            continue
        reads = [(node, index, node.attributes.get_int("transB", 0)) for node, index in value.uses()]
        if not tensor.t().is_contiguous() or {(n.op_type, i, t) for n, i, t in reads} != {("Gemm", 1, 1)}:
            continue
        value.const_value = ir.tensor(tensor.t(), name=value.name)
        value.shape = ir.Shape(tensor.t().shape)
        for node, _, _ in reads:
            node.attributes["transB"] = ir.AttrInt64("transB", 0)


def _annotate(model: ir.Model, graph: Graph, names: Mapping[str, str]) -> None:
    """Put our provenance beside the exporter's own, which names the node that an ONNX node is part of."""
    ours = {node.name: node for node in graph.calls}
    for node in model.graph:
        found = _TRANSLATED.match(node.metadata_props.get("pkg.torch.onnx.fx_node", ""))
        name = names.get(found[1], "") if found else ""
        if name in ours:
            origin = provenance.of(ours[name])
            node.metadata_props["graphopt.node"] = name
            node.metadata_props["graphopt.source"] = origin.source
            node.metadata_props["graphopt.module"] = origin.module
