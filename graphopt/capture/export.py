"""From an ``nn.Module`` to a Graph, through ``torch.export`` (non-strict)."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.proxy import TracerBase

from graphopt.capture.containers import flatten
from graphopt.capture.explain import explain
from graphopt.capture.guards import size_guards
from graphopt.capture.inputs import (
    Dynamic,
    DynamicDims,
    Leaf,
    checked_call,
    example_tensors,
    input_specs,
    leaves,
)
from graphopt.capture.normalize import is_functional, normalize
from graphopt.errors import CaptureError, InputError
from graphopt.ir.graph import Constant, Graph
from graphopt.ir.provenance import KEY, Provenance, from_export, of

_MUTATIONS = {
    OutputKind.BUFFER_MUTATION: "buffer",
    OutputKind.PARAMETER_MUTATION: "parameter",
    OutputKind.USER_INPUT_MUTATION: "input",
}
_LITERALS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)
_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
_WRAPPER, _WRAPPED_NAME = "_captured.", "__captured_"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # how export marks a node of its own


def capture(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Dynamic = None,
) -> Graph:
    """Capture a model as one functional graph of composite ATen ops.

    Args:
        model: any ``nn.Module`` in evaluation mode; its hooks are captured with it.
        args: example positional inputs: tensors, plain values, nested containers of both.
        kwargs: example keyword inputs.
        dynamic: True to infer dynamic dimensions, or their names by input:
            ``{"input_ids": {0: "batch", 1: "seq"}}``. Dimensions of one name are equal.

    Returns:
        The graph. Its constants share memory with the model.

    Raises:
        InputError: inputs are missing, on another device, or ``dynamic`` does not fit them.
        CaptureError: the model is in training mode, writes its own state, or cannot be exported.
    """
    name = type(model).__name__
    call = checked_call(model, args, kwargs or {})
    _require_eval(model)
    given = leaves(model.forward, call)
    tensors = [leaf for leaf in given if isinstance(leaf.value, torch.Tensor)]
    exported = [replace(leaf, source=f"L['tensors'][{i}]") for i, leaf in enumerate(tensors)]
    dims = DynamicDims(dynamic, given)
    flat = _Flat(model, call, dims)
    try:
        with torch.no_grad(), warnings.catch_warnings(), _attributes_kept(model), _frames_kept():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("error", message="The tensor attribute")
            widened = dims.widened()
            program = torch.export.export(flat, widened, dynamic_shapes=dims.export_spec(), strict=False)
            functional = program if is_functional(program.graph) else program.run_decompositions({})
    except CaptureError:
        raise
    except UserWarning as warned:
        kept = ", ".join(re.findall(r"self\.[^\s,]+", str(warned))).replace(_WRAPPER, "")
        raise CaptureError(
            f"{name} assigns a tensor to {kept} in its forward",
            where=kept,
            hint="return the value instead: what a model keeps from call to call is not captured",
        ) from warned
    except Exception as error:
        raise explain(name, error, exported) from error
    _refuse_mutations(name, functional, tensors)
    in_spec, output = pytree.tree_structure(call), flat.output
    found = _Captured(functional, given, dims, in_spec, output.spec, output.leaves)
    return found.graph(size_guards(_guards_of(program), exported))


def capture_any(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Dynamic = None,
) -> tuple[Graph, list[torch.Tensor]]:
    """The Graph of a module or of an exported program, and its example inputs: flat, in placeholder order.

    Raises:
        InputError: inputs are missing or do not fit, or are given beside a program, which brings its own.
        CaptureError: the model cannot be captured.
    """
    if isinstance(model, torch.nn.Module):
        graph, example = capture(model, args, kwargs, dynamic=dynamic), (args, dict(kwargs or {}))
        return graph, example_tensors(graph.inputs, example)
    if not isinstance(model, ExportedProgram):
        raise InputError(
            f"model is a {type(model).__name__}: neither an nn.Module nor an ExportedProgram",
            hint="build the model first; torch.export.load(path) reads a .pt2 file",
        )
    if args or kwargs or dynamic:
        raise InputError(
            "an exported program brings its own example inputs and dynamic dimensions",
            where="optimize(program, ...)",
            hint="pass the program alone, or the module that it was exported from",
        )
    graph = from_program(model)
    return graph, example_tensors(graph.inputs, model.example_inputs)


def from_program(program: ExportedProgram) -> Graph:
    """The Graph of a program that was exported elsewhere (a ``.pt2`` file); it must carry example inputs.

    Raises:
        CaptureError: the program has no example inputs, or writes its own state.
    """
    if program.example_inputs is None:
        raise CaptureError(
            "the exported program carries no example inputs", hint="export it again with torch.export.export"
        )
    module = program.module()
    args, kwargs = program.example_inputs
    given = leaves(module.forward, (args, dict(kwargs)))
    tensors = [leaf for leaf in given if isinstance(leaf.value, torch.Tensor)]
    if not tensors:
        raise CaptureError("the exported program takes no tensor", hint="export it with a tensor input")
    functional = _functional(program)
    _refuse_mutations("the exported program", functional, tensors)
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None and out_spec is not None
    found = _Captured(functional, given, DynamicDims(None, given), in_spec, out_spec)
    return found.graph(size_guards(_guards_of(program), tensors))


@dataclass
class _Output:
    """What the model returned when it was traced; an object, since export undoes what ``forward`` assigns."""

    leaves: Sequence[Any]
    spec: pytree.TreeSpec


class _Flat(torch.nn.Module):
    """A model as a function of flat tensors: ``torch.export`` sees neither containers nor plain values.

    Export may trace twice, and through containers: a KV cache would make constants then that the first
    program does not know. Nor does it take every signature, and every hook, together with dynamic sizes.
    """

    def __init__(self, model: torch.nn.Module, call: Any, dims: DynamicDims) -> None:
        super().__init__()
        self._captured = model
        self.training = False
        self._dims = dims
        given, self._in_spec = flatten(call)
        self._given = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in given]
        self.output = _Output((), self._in_spec)

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Call the model; returns the leaves of its output that are tensors or symbolic sizes."""
        self._dims.declare_equal(tensors)
        rest = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(rest) if leaf is _TENSOR else leaf for leaf in self._given], self._in_spec
        )
        found, spec = flatten(self._captured(*args, **kwargs))
        for leaf in found:
            if not isinstance(leaf, (torch.Tensor, *_SIZES, *_LITERALS)):
                name, kind = type(self._captured).__name__, type(leaf).__name__
                raise CaptureError(
                    f"{name} returns a {kind}, which is no container that PyTorch knows",
                    hint=f"register {kind} with torch.utils._pytree.register_pytree_node, or return a dict",
                )
        computed = [isinstance(leaf, (torch.Tensor, *_SIZES)) for leaf in found]
        outputs = [_TENSOR if is_new else leaf for leaf, is_new in zip(found, computed, strict=True)]
        self.output.leaves, self.output.spec = outputs, spec
        return tuple(leaf for leaf, is_new in zip(found, computed, strict=True) if is_new)


_TENSOR: Any = object()  # the place among leaves of what is given or computed at every call


@contextmanager
def _attributes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Take away the attributes that tracing leaves on modules: their tensors are not real."""
    before = [(module, set(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, names in before:
            for name in module.__dict__.keys() - names:
                delattr(module, name)


@contextmanager
def _frames_kept() -> Iterator[None]:
    """Let export record the user's innermost line; by itself it keeps those of ``forward`` methods only."""

    def inside_the_model(_tracer: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
        ours = [i for i, f in enumerate(frames) if (f.filename, f.name) == (__file__, "forward")]
        return traceback.StackSummary.from_list(frames[ours[-1] + 1 :] if ours else [])

    filter_frames = TracerBase._filter_traceback_frames
    TracerBase._filter_traceback_frames = inside_the_model  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = filter_frames  # type: ignore[method-assign]


def _require_eval(model: torch.nn.Module) -> None:
    training = [name or "(the model itself)" for name, module in model.named_modules() if module.training]
    if training:
        raise CaptureError(
            f"{type(model).__name__} is in training mode ({len(training)} modules, first: {training[0]})",
            where=training[0],
            hint="call model.eval() first: graphopt optimizes inference",
        )


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The program functionalized, every composite op kept whole, its containers taken off."""
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    signature = program.module_call_graph[0].signature
    assert signature is not None and in_spec is not None and out_spec is not None
    signature.in_spec = pytree.tree_structure(((0,) * in_spec.num_leaves, {}))
    signature.out_spec = pytree.tree_structure((0,) * out_spec.num_leaves)
    try:
        functional: ExportedProgram = program.run_decompositions({})
    finally:
        signature.in_spec, signature.out_spec = in_spec, out_spec
    return functional


def _guards_of(program: ExportedProgram) -> Sequence[str]:
    return tuple(getattr(program, "_guards_code", None) or ())


def _refuse_mutations(name: str, program: ExportedProgram, tensors: Sequence[Leaf]) -> None:
    signature = program.graph_signature
    inputs = dict(zip(signature.user_inputs, (leaf.path for leaf in tensors), strict=False))
    for output in signature.output_specs:
        if output.kind in _MUTATIONS:
            target = str(output.target)
            target = inputs.get(target, target.removeprefix(_WRAPPER))
            raise CaptureError(
                f"{name} writes its {_MUTATIONS[output.kind]} {target!r} in its forward",
                where=target,
                hint="return the new value instead: graphopt's graphs are functional",
            )


@dataclass(frozen=True)
class _Captured:
    """A functional program with its weights lifted to inputs, and the calling convention of the original.

    Args:
        program: flat tensors in, flat values out.
        given: the leaves of the example inputs.
        dims: which of their dimensions are dynamic.
        in_spec: pytree of ``(args, kwargs)``.
        out_spec: pytree of the output.
        outputs: the output's leaves: a marker for what the program computes, else the value; None when
            the program gives all of them.
    """

    program: ExportedProgram
    given: Sequence[Leaf]
    dims: DynamicDims
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    outputs: Sequence[Any] | None = None

    def graph(self, guards: Any) -> Graph:
        """The Graph in its normal form: weights are constants, its inputs and outputs the user's."""
        graph = self.program.graph
        _place(graph)
        inputs, constants = self._constants(graph)
        inputs = self._tensors(inputs)
        specs = input_specs(self.given, inputs, self.dims)
        self._keep_user_outputs(graph)
        fake_mode = inputs[0].meta["val"].fake_mode
        module = fx.GraphModule({name: c.tensor for name, c in constants.items()}, graph)
        made = Graph(module, constants, specs, self.in_spec, self.out_spec, fake_mode, guards)
        normalize(made)
        return made

    def _constants(self, graph: fx.Graph) -> tuple[list[fx.Node], dict[str, Constant]]:
        """Turn lifted weights back into constants, tied ones into one; returns the other inputs, too."""
        kinds = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        constants: dict[str, Constant] = {}
        shared: dict[tuple[Any, ...], fx.Node] = {}
        inputs = []
        for node in graph.find_nodes(op="placeholder"):
            spec = kinds[node.name]
            if spec.kind is InputKind.USER_INPUT:
                inputs.append(node)
                continue
            target = str(spec.target)
            tensor = self._tensor(target)
            same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if tensor.numel() == 0 or same not in shared:
                name = node.name.replace(_WRAPPED_NAME, "_", 1)
                with graph.inserting_before(node):
                    shared[same] = graph.create_node("get_attr", name, name=name)
                shared[same].meta["val"] = node.meta["val"]
                constants[name] = Constant(tensor.detach(), (target.removeprefix(_WRAPPER),))
            node.replace_all_uses_with(shared[same])
            graph.erase_node(node)
        return inputs, constants

    def _tensor(self, target: str) -> torch.Tensor:
        found = self.program.state_dict.get(target)
        tensor: torch.Tensor = self.program.constants[target] if found is None else found
        return tensor

    def _tensors(self, inputs: Sequence[fx.Node]) -> list[fx.Node]:
        """The placeholders of tensors, named like them; a program from elsewhere has some of values."""
        paths = [leaf.path for leaf in self.given if isinstance(leaf.value, torch.Tensor)]
        if len(inputs) == len(self.given):
            for node, leaf in zip(inputs, self.given, strict=True):
                if not isinstance(leaf.value, torch.Tensor):
                    node.graph.erase_node(node)
        kept = [node for node in inputs if not node._erased]
        for node, path in zip(kept, paths, strict=True):
            node._rename(re.sub(r"\W+", "_", path).strip("_"))
            node.target = node.name
        return kept

    def _keep_user_outputs(self, graph: fx.Graph) -> None:
        output = graph.output_node()
        results: Iterable[Any] = output.args[0]  # type: ignore[assignment]
        specs = self.program.graph_signature.output_specs
        kept = [a for a, spec in zip(results, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
        if self.outputs is not None:
            computed = iter(kept)
            kept = [next(computed) if leaf is _TENSOR else leaf for leaf in self.outputs]
        output.args = (tuple(kept),)


def _place(graph: fx.Graph) -> None:
    """Give every call its provenance; what export adds of its own (sizes) has that of its first reader."""
    for node in reversed(graph.nodes):
        if node.op != "call_function":
            continue
        place = from_export(node)
        if place.module == _WRAPPER[:-1] or place.module.startswith(_WRAPPER):
            place = replace(place, module=place.module[len(_WRAPPER) :])
        elif place.module == _NO_MODULE:
            reader = next((of(user) for user in node.users if of(user).file), Provenance())
            place = replace(reader, origins=place.origins)
        node.meta[KEY] = place
