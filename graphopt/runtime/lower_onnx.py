"""From a Graph to an ONNX model: PyTorch's exporter, with graphopt's ops and projections translated our way.

Nothing is copied: the model's initializers refer to the graph's own tensors until they are written to disk or
handed to a session.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.compiler.evaluate import concrete
from graphopt.errors import LoweringError
from graphopt.ir import provenance
from graphopt.ir.graph import Graph
from graphopt.ir.op import OPS
from graphopt.kernels._onnx import OPSET, group_norm, linear

aten = torch.ops.aten

_NODE = "graphopt_node"
_TRACED = re.compile(r"%(\w+)")


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
    program = _as_program(graph)
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table=_translations(),
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        raise LoweringError(f"ONNX export failed: {type(cause).__name__}: {_first_lines(cause)}") from error
    assert exported is not None
    model: ir.Model = exported.model
    _simplify(model)
    _name_inputs(model, graph)
    _strip_unused_outputs(model)
    _share_transposed(model)
    _annotate(model, graph, exported.exported_program)
    return model


def _simplify(model: ir.Model) -> None:
    """Fold constants and merge equal nodes; the exporter's own rewrite rules take a third of its time.

    What they do, our passes have done to the graph, and ONNX Runtime does when it loads the model.
    """
    common.InlinePass()(model)
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


def has_translation(node: fx.Node) -> bool:
    """True when the exporter knows a node's op, or every op that it takes it apart into."""
    return _is_known(node.target) or all(map(_is_known, _parts(node)))


@functools.cache
def _is_known(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target in _translations():
        return True
    return bool(_exporter_ops()[0].is_registered(target))


def _parts(node: fx.Node) -> list[Any]:
    """What the exporter takes a call apart into; the call itself when it cannot."""
    target: Any = node.target
    trace = make_fx(lambda args, kwargs: target(*args, **kwargs), _exporter_ops()[1])
    try:
        with FakeTensorMode():  # sizes as numbers: tracing must not narrow the graph's own
            call = fx.map_arg((node.args, node.kwargs), lambda source: concrete(source.meta["val"], "cpu"))
            parts = trace(*call).graph.nodes
    except Exception:
        return [target]
    return [part.target for part in parts if part.op == "call_function"]


@functools.cache
def _exporter_ops() -> tuple[Any, dict[Any, Callable[..., Any]]]:
    """What PyTorch's exporter translates, and how it decomposes other ops."""
    from torch.onnx._internal.exporter import _decomp, _registration

    with _quiet():
        registry = _registration.ONNXRegistry.from_torchlib(OPSET)
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    return registry, _decomp.create_onnx_friendly_decomposition_table(known)


def _first_lines(error: BaseException, count: int = 3) -> str:
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:count])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about its own deprecations; the user asked for neither."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    table: dict[Callable[..., Any], Callable[..., Any]] = {op.overload: op.onnx for op in OPS.values()}
    table[aten.linear.default] = linear
    table[aten.group_norm.default] = group_norm
    return table


def _as_program(graph: Graph) -> ExportedProgram:
    """The graph as an ExportedProgram: constants lifted to buffers, flat inputs and outputs."""
    lifted, made = fx.Graph(), {}
    constants = [node for node in graph.nodes if node.op == "get_attr"]
    inputs: list[InputSpec] = []
    for node in (*constants, *graph.placeholders):
        new = lifted.placeholder(node.name)
        new.meta["val"] = node.meta["val"]
        made[node] = new
        is_weight = node.op == "get_attr"
        inputs.append(
            InputSpec(
                InputKind.BUFFER if is_weight else InputKind.USER_INPUT,
                TensorArgument(new.name),
                str(node.target) if is_weight else None,
                persistent=True if is_weight else None,
            )
        )
    for node in graph.calls:
        new = lifted.node_copy(node, made.__getitem__)
        new.meta = {**node.meta, "custom": {_NODE: node.name}}
        made[node] = new
    results: Any = graph.output.args[0]
    lifted.output(tuple(made[node] for node in results))
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(made[n].name), None) for n in results]
    state = {str(node.target): graph.constants[str(node.target)].tensor for node in constants}
    flat = torch.utils._pytree.tree_structure
    call = torch.export.ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=flat(((0,) * len(graph.placeholders), {})),
        out_spec=flat((0,) * len(results)),
    )
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=lifted,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints={},
        module_call_graph=[torch.export.ModuleCallEntry("", call)],
        example_inputs=None,
        constants={},
    )


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
        used = len(node.outputs)
        while used > 1 and not node.outputs[used - 1].uses() and node.outputs[used - 1] not in results:
            used -= 1
        if used < len(node.outputs):
            node.resize_outputs(used)


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


def _annotate(model: ir.Model, graph: Graph, program: ExportedProgram | None) -> None:
    """Put our provenance beside the exporter's own, which names the traced node an ONNX node is part of."""
    ours = {node.name: node for node in graph.calls}
    traced = {node.name: node.meta.get("custom") or {} for node in program.graph.nodes} if program else {}
    for node in model.graph:
        found = _TRACED.match(node.metadata_props.get("pkg.torch.onnx.fx_node", ""))
        name = traced.get(found[1], {}).get(_NODE, found[1]) if found else ""
        if name in ours:
            place = provenance.of(ours[name])
            node.metadata_props["graphopt.node"] = name
            node.metadata_props["graphopt.source"] = place.source
            node.metadata_props["graphopt.module"] = place.module
