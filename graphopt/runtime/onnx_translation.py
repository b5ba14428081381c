"""PyTorch's ONNX exporter, node by node: what is captured already is not traced once more.

``torch.onnx.export`` traces whatever it is given again, to take apart the ops that it has no translation for
and to spell out the casts that PyTorch makes by itself. Few nodes need that (1 of the 500 that a Llama of 36
layers ends with), so only those are traced, as a program of their own; all others go to their translation as
they are. What is private to the exporter is used in this file and in no other.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
import torch.utils._pytree as pytree
from onnxscript.version_converter import convert_version
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
from graphopt.ir.aten import is_kept_whole
from graphopt.ir.graph import Graph, is_getitem, is_symbolic
from graphopt.ir.op import OPS
from graphopt.kernels._attention_onnx import of_equal_sizes
from graphopt.kernels._onnx import OPSET, group_norm, linear
from graphopt.runtime.region import extract

aten = torch.ops.aten

_NODE = "graphopt_node"


def translate(graph: Graph) -> tuple[ir.Model, dict[str, str]]:
    """Translate a graph, and simplify nothing.

    Args:
        graph: tensors in, tensors out.

    Returns:
        The model; and by the name under which the exporter knows a node, the name of the graph's node that
        it is, or is a part of.

    Raises:
        Exception: whatever the exporter raises where it has no translation.
    """
    from torch.onnx._internal.exporter import _core

    with quiet():
        program = _as_program(graph, _taken_apart(graph))
        found = _core._exported_program_to_onnx_program(program, registry=_exporter().registry)
        convert_version(found.model, OPSET, fallback=True)  # its translations are written for opset 18
    model: ir.Model = found.model
    return model, {n.name: (n.meta.get("custom") or {}).get(_NODE, "") for n in program.graph.nodes}


def has_translation(node: fx.Node) -> bool:
    """True when the exporter knows a node's op, or every op that it takes it apart into."""
    return _is_known(node.target) or all(map(_is_known, _parts(node)))


# The exporter


@dataclass(frozen=True)
class _Exporter:
    """What PyTorch's exporter knows.

    Args:
        registry: the translations, ours before its own.
        decompositions: how it takes apart other ops.
        promotions: which operands PyTorch casts by itself, op by op.
    """

    registry: Any
    decompositions: dict[Any, Callable[..., Any]]
    promotions: Any


def _exporter() -> _Exporter:
    return _exporter_with(tuple(OPS))


@functools.lru_cache(maxsize=1)
def _exporter_with(ops: tuple[str, ...]) -> _Exporter:
    """To read its translations takes the exporter 0.7 s, so it is done again only when an op was added."""
    from torch.onnx._internal.exporter import _decomp, _registration
    from torch.onnx._internal.fx.passes.type_promotion import TypePromotionTable

    with quiet():
        registry = _registration.ONNXRegistry.from_torchlib(OPSET)
    for view in registry.get_decomps(aten.view.default):  # its own reshape takes a size of 0 for "as it was"
        registry.register_op(aten.reshape.default, view.onnx_function, is_complex=view.is_complex)
    attention = aten.scaled_dot_product_attention.default
    for theirs in registry.get_decomps(attention):
        registry.register_op(attention, of_equal_sizes(theirs.onnx_function))
    translations: tuple[tuple[Any, Any], ...] = (
        *((OPS[name].overload, OPS[name].onnx) for name in ops),
        (aten.linear.default, linear),
        (aten.group_norm.default, group_norm),
    )
    for target, translation in translations:
        registry.register_op(target, translation)
    known = set(_decomp.get_onnx_implemented_overloads(registry))
    table = _decomp.create_onnx_friendly_decomposition_table(known)
    return _Exporter(registry, table, TypePromotionTable())


def _is_known(target: Any) -> bool:
    return not isinstance(target, torch._ops.OpOverload) or _exporter().registry.is_registered(target)


def _parts(node: fx.Node) -> list[Any]:
    """What the exporter takes a call apart into; the call itself when it cannot."""
    target: Any = node.target
    trace = make_fx(lambda args, kwargs: target(*args, **kwargs), _exporter().decompositions)
    try:
        with FakeTensorMode():  # sizes as numbers: tracing must not narrow the graph's own
            call = fx.map_arg((node.args, node.kwargs), lambda x: _dense(concrete(x.meta["val"], "cpu")))
            parts = trace(*call).graph.nodes
    except Exception:
        return [target]
    return [part.target for part in parts if part.op == "call_function"]


def _dense(value: Any) -> Any:
    """A value whose strides say nothing: ONNX has none, and ops that are taken apart write them down."""
    fixed = isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)
    return value.contiguous() if fixed else value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn about their own deprecations, and log what they lack and what they cannot fold.

    The user asked for neither.
    """
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_TALKATIVE = (
    "torch.onnx._internal.exporter._registration",
    "onnxscript.optimizer._constant_folding",
    "onnx_ir.serde",  # of inner values whose type nothing states
)


# What it takes apart


@dataclass(frozen=True)
class _Parts:
    """The nodes that have no translation as they are, taken apart.

    Args:
        whole: those nodes.
        results: what computes them, for those that others read, by name.
        inputs: the graph's node that each placeholder of the parts stands for.
        constants: the constants that are new, by their placeholder.
    """

    whole: frozenset[fx.Node] = frozenset()
    results: dict[str, fx.Node] = field(default_factory=dict)
    inputs: dict[fx.Node, fx.Node] = field(default_factory=dict)
    constants: dict[fx.Node, torch.Tensor] = field(default_factory=dict)


def _taken_apart(graph: Graph) -> _Parts:
    """What the exporter makes of the nodes that are not ready, traced as a program of their own."""
    from torch.onnx._internal.exporter import _core

    whole = [node for node in graph.calls if not _is_ready(node)]
    whole += [user for node in whole for user in node.users if is_getitem(user)]
    region = extract(graph, whole, "parts")
    if not region.writes:
        return _Parts(frozenset(whole))
    program = _as_program(region.graph, _Parts())
    prepared = _core._prepare_exported_program_for_export(program, registry=_exporter().registry)
    values = {node.name: node for node in graph.nodes if node.op != "get_attr"}
    weights = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
    reads, inputs, constants = iter(region.reads), {}, {}
    specs = prepared.graph_signature.input_specs
    for node, spec in zip(prepared.graph.find_nodes(op="placeholder"), specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            inputs[node] = values[next(reads)]
        elif spec.target in weights:
            inputs[node] = weights[str(spec.target)]
        else:
            constants[node] = prepared.constants[str(spec.target)]
    made: Any = prepared.graph.output_node().args[0]
    return _Parts(frozenset(whole), dict(zip(region.writes, made, strict=True)), inputs, constants)


def _is_ready(node: fx.Node) -> bool:
    """True when a node goes to its translation as it is."""
    if is_symbolic(node) or is_getitem(node):
        return True
    whole = is_kept_whole(node.target) or node.target is aten.reshape.default
    return whole and _is_known(node.target) and not _is_promoted(node)


def _is_promoted(node: fx.Node) -> bool:
    """True when PyTorch casts operands of a call by itself, which ONNX does not."""
    rule = None
    if isinstance(node.target, torch._ops.OpOverload):
        rule = _exporter().promotions.get_rule(node.target.overloadpacket)
    if rule is None:
        return False
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    found = rule.preview_type_promotion(args, kwargs)
    casts = [(args[at], dtype) for at, dtype in found.args_dtypes.items()]
    casts += [(kwargs[name], dtype) for name, dtype in found.kwargs_dtypes.items()]
    return any(_dtype(leaf) != dtype for value, dtype in casts for leaf in pytree.tree_leaves(value))


def _dtype(value: Any) -> torch.dtype | None:
    """The dtype of a tensor, or the one that the exporter gives a number."""
    from torch.onnx._internal.fx.type_utils import from_scalar_type_to_torch_dtype

    if isinstance(value, torch.Tensor):
        return value.dtype
    found: torch.dtype | None = from_scalar_type_to_torch_dtype(type(value))
    return found


# The program


class _Lifted:
    """A graph under construction whose constants are inputs, as the exporter wants them."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.inputs: list[InputSpec] = []
        self.state: dict[str, torch.Tensor] = {}

    def take(self, node: fx.Node, tensor: torch.Tensor | None = None) -> None:
        """Add an input for a placeholder, or for a constant of that value."""
        new = self.graph.placeholder(node.name)
        new.meta["val"] = _dense(node.meta["val"])
        self.made[node] = new
        name = TensorArgument(new.name)
        if tensor is None:
            self.inputs.append(InputSpec(InputKind.USER_INPUT, name, None))
            return
        target = str(node.target) if node.op == "get_attr" else new.name
        self.inputs.append(InputSpec(InputKind.BUFFER, name, target, persistent=True))
        self.state[target] = tensor

    def copy(self, node: fx.Node, meta: dict[str, Any]) -> None:
        """Add a call."""
        new = self.graph.node_copy(node, self.made.__getitem__)
        new.meta = meta
        self.made[node] = new

    def copy_with_sources(self, node: fx.Node, inputs: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """Add a part, and the parts it needs that are not there yet; returns what it became."""
        needed, work = set(), [node]
        while work:
            part = work.pop()
            if part in inputs:
                self.made[part] = self.made[inputs[part]]
            elif part not in self.made and part not in needed:
                needed.add(part)
                work.extend(part.all_input_nodes)
        for part in sorted(needed):
            self.copy(part, part.meta)
        return self.made[node]


def _as_program(graph: Graph, parts: _Parts) -> ExportedProgram:
    """The graph as an ExportedProgram, parts in the place of what was taken apart."""
    lifted = _Lifted()
    for node in graph.nodes:
        if node.op == "get_attr":
            lifted.take(node, graph.constants[str(node.target)].tensor)
    for node, tensor in parts.constants.items():
        lifted.take(node, tensor)
    for node in graph.placeholders:
        lifted.take(node)
    for node in graph.calls:
        if node.name in parts.results:
            lifted.made[node] = lifted.copy_with_sources(parts.results[node.name], parts.inputs)
        elif node not in parts.whole:
            lifted.copy(node, {"nn_module_stack": {}, **node.meta, "custom": {_NODE: node.name}})
    results: Any = graph.output.args[0]
    made = [lifted.made[node] for node in results]
    lifted.graph.output(tuple(made))
    flat = pytree.tree_structure
    call = torch.export.ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=flat(((0,) * len(graph.placeholders), {})),
        out_spec=flat((0,) * len(made)),
    )
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in made]
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=lifted.graph,
        graph_signature=ExportGraphSignature(lifted.inputs, outputs),
        state_dict=lifted.state,
        range_constraints={},
        module_call_graph=[torch.export.ModuleCallEntry("", call)],
        example_inputs=None,
        constants={},
    )
