"""A whole graph as one ONNX model for others to run: named, described, and of an opset that they have.

What the executor hands to its own session is lowered in ``lower_onnx``; here it gets the user's names of
inputs, outputs and dimensions, says what it is in its metadata, and is held to the opset and to the domains
that were asked for. ``onnx_file`` writes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any, Literal

import onnx.defs
import onnx_ir as ir
import torch
import torch.utils._pytree as pytree
from torch import fx

from graphopt.capture.outputs import children
from graphopt.errors import InputError, LoweringError
from graphopt.ir.graph import Graph, has_effect, is_symbolic
from graphopt.ir.graph import op_name as name_of
from graphopt.ir.op import op_of
from graphopt.ir.tuning import Tuning, tuned_for
from graphopt.kernels._onnx import OPSET
from graphopt.runtime.lower_onnx import place, to_onnx
from graphopt.runtime.onnx_translation import has_translation

Device = Literal["cpu", "cuda"]
OLDEST_OPSET = 18  # PyTorch's own translations are written for it
NEWEST_OPSET = 24  # beyond the one that models are written in: to it, operators only took on more types

_OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def exported(graph: Graph, device: Device, portable: bool = False, opset: int = OPSET) -> ir.Model:
    """Lower a graph for somebody else's ONNX Runtime.

    Args:
        graph: rewritten or not; it stays as it is. Its assertions are left out: ONNX has none.
        device: whose fused kernels the model is spelled for.
        portable: use ONNX's own operators only.
        opset: of ONNX's own operators, 18 to 24.

    Returns:
        The model. Inputs, outputs and dynamic dimensions have the user's names; ``metadata_props`` tell the
        structure of inputs and outputs, and the opsets. Weights are the graph's own tensors.

    Raises:
        InputError: the device or the opset is unknown.
        LoweringError: a node has no translation, or none in that opset or in ONNX's own operators.
    """
    if device not in ("cpu", "cuda"):
        raise InputError(f"device={device!r} is unknown", hint="one of: cpu, cuda")
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise InputError(f"opset={opset!r} cannot be written", hint=f"{OLDEST_OPSET} to {NEWEST_OPSET}")
    tensors = _of_tensors(graph)
    tuning: Tuning = "portable" if portable else device
    with tuned_for(tuning):
        _require_translations(tensors)
        model = to_onnx(tensors)
    if portable:
        _require_own_operators(model)
    if opset != OPSET:
        _declare(model, opset)
    names = _Names(model)
    inputs = _name_inputs(model, graph, names)
    outputs = _name_outputs(model, graph, names)
    _name_dimensions(model, graph)
    _describe(model, tuning, inputs, outputs)
    return model


# What there is to export


def _of_tensors(graph: Graph) -> Graph:
    """A copy that returns its tensors only, and asserts nothing."""
    copy = graph.clone()
    results: Any = copy.output.args[0]
    for result in results:
        if isinstance(result, fx.Node) and is_symbolic(result):
            raise LoweringError(
                f"the output {result.name} is a size, which no ONNX model returns",
                where=place(result),
                hint="return tensors only, or name the outputs to keep: optimize(..., outputs=[...])",
            )
    copy.output.args = (tuple(result for result in results if isinstance(result, fx.Node)),)
    assertions = [node for node in copy.calls if has_effect(node)]
    copy.erase_dead(assertions, proved=assertions)
    copy.drop_unused_constants()
    copy.module.recompile()
    return copy


def _require_translations(graph: Graph) -> None:
    for node in graph.calls:
        reason = None
        if not has_translation(node):
            reason = "has no ONNX translation"
        elif op_of(node.target) is not None and _is_double(node.meta["val"]):
            reason = "is fused, and ONNX Runtime's fused kernels do not take float64"
        if reason is not None:
            raise LoweringError(
                f"{node.name} ({name_of(node)}) {reason}",
                where=place(node),
                hint="export a model without it, or save the model for graphopt",
            )


def _is_double(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in leaves)


# What it may be written in


def _require_own_operators(model: ir.Model) -> None:
    for node in _nodes(model):
        if node.domain not in ("", "ai.onnx"):
            raise LoweringError(
                f"{_label(node)} has no spelling in ONNX's own operators: it is {node.domain}'s",
                where=_place(node),
                hint="portable=False",
            )
    for domain in [domain for domain in model.opset_imports if domain]:
        del model.opset_imports[domain]


def _declare(model: ir.Model, opset: int) -> None:
    """Declare another opset, in which every node must mean what it means in the one that it is written in."""
    for node in _nodes(model):
        reason = _differs(node, opset) if node.domain in ("", "ai.onnx") else None
        if reason is not None:
            raise LoweringError(
                f"{_label(node)} {reason}", where=_place(node), hint=f"opset={OPSET}, or one between the two"
            )
    model.opset_imports[""] = opset


def _differs(node: ir.Node, opset: int) -> str | None:
    """Why a node is not the same in another opset."""
    ours = onnx.defs.get_schema(node.op_type, OPSET, "")
    try:
        other = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return f"is not in opset {opset}: it is in {ours.since_version}"
    if ours.since_version == other.since_version:
        return None
    first, second = (other, ours) if opset < OPSET else (ours, other)
    if not _extends(second, first, may_grow=opset > OPSET):
        return f"is another operator in opset {opset} than in {OPSET}"
    for formal, value in zip(other.inputs, node.inputs, strict=False):
        if value is not None and value.dtype is not None:
            given = f"tensor({value.dtype.name.lower()})"
            if given not in formal.types:
                return f"takes no {given} in opset {opset}"
    return None


def _extends(new: Any, old: Any, *, may_grow: bool) -> bool:
    """Whether a newer schema means the same to whoever calls it as the older one is called.

    Args:
        new: the newer schema.
        old: the older one.
        may_grow: it may have more inputs and attributes, if those may be left out.
    """
    before, after = _attributes(old), _attributes(new)
    ends = [(_ends(schema.inputs), _ends(schema.outputs)) for schema in (old, new)]
    if before == after and ends[0] == ends[1]:
        return True
    more = [new.attributes[name] for name in after.keys() - before.keys()]
    more_inputs = new.inputs[len(old.inputs) :]
    return (
        may_grow
        and {name: after.get(name) for name in before} == before
        and not any(attribute.required for attribute in more)
        and all(end.option == _OPTIONAL for end in more_inputs)
        and ends[1][0][: len(old.inputs)] == ends[0][0]
        and ends[1][1] == ends[0][1]
    )


def _attributes(schema: Any) -> dict[str, tuple[Any, ...]]:
    return {
        name: (attribute.type, attribute.required, attribute.default_value.SerializeToString())
        for name, attribute in schema.attributes.items()
    }


def _ends(values: Any) -> list[tuple[Any, ...]]:
    return [(end.name, end.option) for end in values]


# Names


class _Names:
    """Gives values their names, and takes a name from whoever has it."""

    def __init__(self, model: ir.Model) -> None:
        values = (*model.graph.inputs, *model.graph.initializers.values(), *_results(model))
        self._taken = {value.name: value for value in values}
        self._given: set[str] = set()

    def give(self, value: ir.Value, wanted: str) -> str:
        """Name a value, an inner one of that name anew; returns the name, numbered if it was given before."""
        name = self._free(wanted, self._given)
        other = self._taken.pop(name, None)
        if other is not None and other is not value:
            self._rename(other, self._free(name, {*self._taken, *self._given, name}))
        self._rename(value, name)
        self._given.add(name)
        return name

    def _rename(self, value: ir.Value, name: str) -> None:
        self._taken.pop(value.name, None)
        value.name = name
        self._taken[name] = value

    @staticmethod
    def _free(name: str, taken: Iterable[Any]) -> str:
        known, candidate, count = set(taken), name, 0
        while candidate in known:
            count += 1
            candidate = f"{name}_{count}"
        return candidate


def _name_inputs(model: ir.Model, graph: Graph, names: _Names) -> list[dict[str, Any]]:
    """Name the inputs as the user does; returns a row an argument, constants too."""
    values = dict(zip((node.name for node in graph.placeholders), model.graph.inputs, strict=True))
    rows = []
    for spec in graph.inputs:
        if spec.node is None:
            rows.append({"path": spec.path, "constant": repr(spec.constant)})
        else:
            wanted = spec.path if spec.path.isidentifier() else spec.node
            rows.append({"path": spec.path, "name": names.give(values[spec.node], wanted)})
    return rows


def _name_outputs(model: ir.Model, graph: Graph, names: _Names) -> Any:
    """Name the outputs as the model's output does; returns its structure, names for tensors."""
    values = iter(model.graph.outputs)
    results: Any = graph.output.args[0]
    leaves = iter(results)

    def structure(spec: pytree.TreeSpec, path: tuple[str, ...]) -> Any:
        if spec.is_leaf():
            result = next(leaves)
            if not isinstance(result, fx.Node):
                return {"constant": repr(result)}
            return names.give(next(values), _output_name(path))
        kind = getattr(spec.type, "__name__", str(spec.type))
        return {
            "type": kind,
            "items": {name: structure(child, (*path, name)) for name, child in children(spec)},
        }

    return structure(graph.out_spec, ())


def _output_name(path: tuple[str, ...]) -> str:
    """``logits``, ``past_key_values.0.1``, ``output`` for the only one, ``output_0`` for a tuple's first."""
    if not path:
        return "output"
    return ".".join(path) if path[0].isidentifier() else "output_" + ".".join(path)


def _name_dimensions(model: ir.Model, graph: Graph) -> None:
    """Name the dynamic dimensions, and say sizes that follow from them in these names."""
    known: dict[str, str] = {}
    for spec in graph.inputs:
        for dim, size in enumerate(spec.shape):
            if not isinstance(size, int) and str(size).isidentifier():
                label = re.sub(r"\W", "_", f"{spec.path}_{dim}")
                known.setdefault(str(size), spec.dims.get(dim, label))
    values = (*model.graph.inputs, *model.graph.outputs, *_results(model))
    for value in {id(value): value for value in values}.values():
        if value.shape is None or value.shape.is_static():
            continue
        sizes = [
            _SYMBOL.sub(lambda found: known.get(found[0], found[0]), str(size.value))
            if isinstance(size, ir.SymbolicDim) and size.value is not None
            else size
            for size in value.shape
        ]
        value.shape = ir.Shape(sizes)


# What it says about itself


def _describe(model: ir.Model, tuning: Tuning, inputs: list[dict[str, Any]], outputs: Any) -> None:
    own, opsets = version("graphopt"), {name or "ai.onnx": v for name, v in model.opset_imports.items()}
    model.producer_name, model.producer_version = "graphopt", own
    domains = ", ".join(f"{name} {number}" for name, number in opsets.items())
    model.doc_string = (
        f"Optimized by graphopt {own}, spelled for: {tuning}. Operator sets: {domains}. The metadata of a"
        " node tells where it comes from: graphopt.module and graphopt.source."
    )
    model.metadata_props.update(
        {
            "graphopt.version": own,
            "graphopt.spelled_for": tuning,
            "graphopt.opsets": json.dumps(opsets),
            "graphopt.inputs": json.dumps(inputs),
            "graphopt.outputs": json.dumps(outputs),
        }
    )
    for node in _nodes(model):
        for key in [key for key in node.metadata_props if not key.startswith("graphopt.")]:
            del node.metadata_props[key]  # the exporter's stack traces: 5 KB a node
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *_results(model)):
        value.metadata_props.clear()


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """All nodes, those of branches and loops too."""
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def _results(model: ir.Model) -> Iterator[ir.Value]:
    return (value for node in _nodes(model) for value in node.outputs if value.name)


def _label(node: ir.Node) -> str:
    ours = node.metadata_props.get("graphopt.node", "")
    return f"{ours} ({node.op_type})" if ours else node.op_type


def _place(node: ir.Node) -> str | None:
    found = (node.metadata_props.get(f"graphopt.{key}", "") for key in ("source", "module"))
    return ", ".join(filter(None, found)) or None
