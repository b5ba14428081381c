"""From an ``nn.Module`` to a Graph, through ``torch.export`` (non-strict)."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from graphopt.capture.inputs import Dynamic, DynamicDims, input_specs, require_inputs, separate
from graphopt.capture.normalize import normalize
from graphopt.errors import CaptureError
from graphopt.ir.graph import Constant, Graph, InputSpec
from graphopt.ir.provenance import KEY, from_export

_MUTATIONS = {
    OutputKind.BUFFER_MUTATION: "writes its buffer",
    OutputKind.USER_INPUT_MUTATION: "writes its input",
}
if hasattr(OutputKind, "PARAMETER_MUTATION"):
    _MUTATIONS[OutputKind.PARAMETER_MUTATION] = "writes its parameter"


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
        args: example positional inputs: tensors, scalars, nested containers of both.
        kwargs: example keyword inputs.
        dynamic: True to infer dynamic dimensions, or their names by input:
            ``{"input_ids": {0: "batch", 1: "seq"}}``. Dimensions of one name are equal.

    Returns:
        The graph. Its constants share memory with the model.

    Raises:
        InputError: inputs are missing, on another device, or ``dynamic`` does not fit them.
        CaptureError: the model is in training mode, writes its own state, or cannot be exported.
    """
    keywords = dict(kwargs or {})
    require_inputs(model, args, keywords)
    _require_eval(model)
    args, keywords = separate((args, keywords))
    dims = DynamicDims(dynamic, model, args, keywords)
    exported = _export(model, args, keywords, dims)
    _refuse_mutations(model, exported)
    graph = _to_graph(exported, args, keywords, dims)
    normalize(graph)
    return graph


def from_program(program: ExportedProgram) -> Graph:
    """The Graph of a program that was exported elsewhere (a ``.pt2`` file); it must carry example inputs.

    Raises:
        CaptureError: the program has no example inputs, or writes its own state.
    """
    if program.example_inputs is None:
        raise CaptureError(
            "the exported program carries no example inputs", hint="export it again with torch.export.export"
        )
    args, keywords = program.example_inputs
    module = program.module()
    exported = Exported.of(program)
    _refuse_mutations(module, exported)
    graph = _to_graph(exported, args, dict(keywords), DynamicDims(None, module, args, dict(keywords)))
    normalize(graph)
    return graph


@dataclass(frozen=True)
class Exported:
    """A functional program with its weights lifted to inputs, and the calling convention of the original."""

    program: ExportedProgram
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    guards: tuple[str, ...]

    @staticmethod
    def of(program: ExportedProgram) -> Exported:
        """Functionalize a program, every composite op kept whole.

        Functionalizing traces the program again, through its containers: a KV cache then makes new constants that
        the program does not know. So the containers are taken off first, and kept here.
        """
        in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
        guards = tuple(getattr(program, "_guards_code", None) or ())
        signature = program.module_call_graph[0].signature
        assert signature is not None
        signature.in_spec = pytree.tree_structure(((0,) * in_spec.num_leaves, {}))
        signature.out_spec = pytree.tree_structure((0,) * out_spec.num_leaves)
        try:
            functional = program.run_decompositions({})
        finally:
            signature.in_spec, signature.out_spec = in_spec, out_spec
        return Exported(functional, in_spec, out_spec, guards)


def _require_eval(model: torch.nn.Module) -> None:
    training = [name or "(the model itself)" for name, module in model.named_modules() if module.training]
    if training:
        raise CaptureError(
            f"{type(model).__name__} is in training mode ({len(training)} modules, first: {training[0]})",
            hint="call model.eval() first: graphopt optimizes inference",
        )


def _export(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: DynamicDims
) -> Exported:
    _register_known_containers()
    if dims:
        args, kwargs = dims.widened(args, kwargs)

    def declare_equal(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for left, right in dims.equalities(args, kwargs):
            torch._check(left == right)

    hook = model.register_forward_pre_hook(declare_equal, with_kwargs=True) if dims.named else None
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            spec = dims.export_spec(args, kwargs)
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=spec, strict=False)
            return Exported.of(exported)
    except Exception as error:
        raise _explain(model, error) from error
    finally:
        if hook is not None:
            hook.remove()


def _register_known_containers() -> None:
    """Make Hugging Face's KV cache a known container, where transformers is installed."""
    try:
        from transformers.integrations.executorch import register_dynamic_cache_export_support
    except ImportError:
        return
    register_dynamic_cache_export_support()


def _explain(model: torch.nn.Module, error: Exception) -> CaptureError:
    """One clear error: what torch.export said first, and the user's own line that it stopped at."""
    torch_home = str(Path(torch.__file__).parent)
    own = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_home, own, "<"))
    ]
    text = str(error).strip() or type(error).__name__
    named = re.findall(r'File "([^"]+)", line (\d+)', text)
    named = [(file, line) for file, line in named if not file.startswith(torch_home)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
    if named:
        where = ":".join(named[-1])
    paragraph = text.split("\n\n")[0]
    hint = "make this line traceable (no branching on tensor values), or optimize the part around it"
    if "onflict" in text or "onstraint" in text:
        hint = "declare as dynamic only what the model lets vary"
    return CaptureError(
        f"{type(model).__name__} cannot be exported: {type(error).__name__}: {paragraph}",
        where=where,
        hint=hint,
    )


def _refuse_mutations(model: torch.nn.Module, exported: Exported) -> None:
    for output in exported.program.graph_signature.output_specs:
        if output.kind in _MUTATIONS:
            raise CaptureError(
                f"{type(model).__name__} {_MUTATIONS[output.kind]} {output.target!r} in its forward",
                hint="return the new value instead: graphopt's graphs are functional",
            )


def _to_graph(exported: Exported, args: tuple[Any, ...], kwargs: dict[str, Any], dims: DynamicDims) -> Graph:
    """Turn lifted weights back into constants, and keep user inputs and outputs only."""
    program = exported.program
    graph = program.graph
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    constants: dict[str, Constant] = {}
    shared: dict[tuple[Any, ...], fx.Node] = {}
    inputs: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.op != "placeholder":
            if node.op == "call_function":
                node.meta[KEY] = from_export(node)
            continue
        spec = kinds[node.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
            continue
        tensor = _tensor_of(program, str(spec.target))
        same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.numel() or node)
        if same in shared:  # tied weights: one constant, one node
            node.replace_all_uses_with(shared[same])
        else:
            with graph.inserting_before(node):
                weight = graph.get_attr(node.name)
            weight.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(weight)
            shared[same] = weight
            constants[node.name] = Constant(tensor.detach(), (str(spec.target),))
        graph.erase_node(node)
    specs = input_specs((args, kwargs), inputs, dims)
    for node, input_spec in zip(inputs, specs, strict=True):
        if input_spec.node is None:
            graph.erase_node(node)
    _keep_user_outputs(program, graph)
    fake_mode = _fake_mode(graph)
    module = fx.GraphModule({name: c.tensor for name, c in constants.items()}, graph)
    return Graph(
        module,
        constants,
        specs,
        exported.in_spec,
        exported.out_spec,
        fake_mode,
        _guards(exported.guards, specs),
    )


def _tensor_of(program: ExportedProgram, target: str) -> torch.Tensor:
    found = program.state_dict.get(target)
    return program.constants[target] if found is None else found


def _keep_user_outputs(program: ExportedProgram, graph: fx.Graph) -> None:
    output = graph.output_node()
    specs = program.graph_signature.output_specs
    kept = [a for a, spec in zip(output.args[0], specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
    output.args = (tuple(kept),)


def _fake_mode(graph: fx.Graph) -> Any:
    values = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    return values[0].fake_mode


def _guards(lines: tuple[str, ...], specs: tuple[InputSpec, ...]) -> Callable[..., None] | None:
    """The relations between dynamic sizes that capture relied on, as a function of the flat tensors."""
    compiled = [(line, compile(line, "<guard>", "eval")) for line in lines if ".size()" in line]
    if not compiled:
        return None

    def check(*tensors: torch.Tensor) -> None:
        names = [spec.node for spec in specs if spec.node]
        scope = {"L": _nested(specs, dict(zip(names, tensors, strict=True))), "torch": torch}
        for line, guard in compiled:
            if not eval(guard, {"__builtins__": {}}, scope):  # the code is torch.export's own
                raise AssertionError(re.sub(r"L\['(\w+)'\]", r"\1", line).replace(".size()", ".shape"))

    return check


def _nested(specs: tuple[InputSpec, ...], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The tensors as guards name them: ``L['input_ids']``, ``L['args'][0]``, ``L['x']['y'][1]``."""
    scope: dict[str, Any] = {}
    for spec in specs:
        if spec.node is None:
            continue
        keys = re.findall(r"[\w.]+", spec.path)
        level = scope
        for key in keys[:-1]:
            level = level.setdefault(int(key) if key.isdigit() else key, {})
        last = keys[-1]
        level[int(last) if last.isdigit() else last] = tensors[spec.node]
        scope[spec.node] = tensors[spec.node]
    return scope
