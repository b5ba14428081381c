"""The Graph: a functional ``torch.fx`` graph of composite ATen ops, with its calling convention."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.ir.provenance import KEY, Provenance

aten = torch.ops.aten

# What keeps a node alive although nobody reads its value.
_EFFECTS = frozenset(
    {
        *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default),
        *(aten._assert_scalar.default, aten._assert_async.default, aten._assert_async.msg),
    }
)


@dataclass(frozen=True)
class InputSpec:
    """One leaf of the user's inputs.

    Args:
        path: where the leaf sits in the call: ``input_ids``, ``args[0]['x']``.
        node: name of the placeholder, or None for a leaf that is not a tensor.
        shape: sizes; a ``torch.SymInt`` where the dimension is dynamic.
        dtype: of the tensor.
        device: of the tensor.
        dims: the user's names of dynamic dimensions, by position.
        constant: the value of a leaf that is not a tensor: it was captured as it was.
    """

    path: str
    node: str | None
    shape: tuple[Any, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    dims: dict[int, str] = field(default_factory=dict)
    constant: Any = None


@dataclass(frozen=True)
class Constant:
    """A tensor that the graph owns or shares with the model.

    Args:
        tensor: the value.
        sources: the model's own names ("encoder.layer.0.output.dense.weight") that it is made from.
        how: how it is made from them; "" for a tensor that is the model's own, unchanged.
    """

    tensor: torch.Tensor
    sources: tuple[str, ...]
    how: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A graph's nodes and constants as they were at one moment."""

    nodes: fx.Graph
    constants: dict[str, Constant]


class Graph:
    """A captured model.

    Args:
        module: flat graph: tensors in, a tuple out; constants are ``get_attr`` nodes of flat names.
        constants: every constant by the name of its ``get_attr`` target.
        inputs: a spec per leaf of the user's inputs, in flattening order.
        in_spec: pytree of ``(args, kwargs)``.
        out_spec: pytree of the model's output.
        guards: called with the flat tensor inputs; raises ``AssertionError`` when a relation between dynamic
            dimensions that capture relied on does not hold.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        constants: dict[str, Constant],
        inputs: tuple[InputSpec, ...],
        in_spec: pytree.TreeSpec,
        out_spec: pytree.TreeSpec,
        fake_mode: FakeTensorMode,
        guards: Callable[..., None] | None = None,
    ) -> None:
        self.module = module
        self.constants = constants
        self.inputs = inputs
        self.in_spec = in_spec
        self.out_spec = out_spec
        self.fake_mode = fake_mode
        self.guards = guards

    @property
    def fx(self) -> fx.Graph:
        """The underlying ``torch.fx.Graph``."""
        return self.module.graph

    @property
    def nodes(self) -> list[Node]:
        """All nodes in topological order (a snapshot: rewriting while looping is safe)."""
        return list(self.fx.nodes)

    @property
    def calls(self) -> list[Node]:
        """The nodes that compute something."""
        return [node for node in self.fx.nodes if node.op == "call_function"]

    @property
    def placeholders(self) -> list[Node]:
        """The input nodes, in calling order."""
        return [node for node in self.fx.nodes if node.op == "placeholder"]

    @property
    def output(self) -> Node:
        """The output node; its only argument is a tuple of nodes."""
        return self.fx.output_node()

    def op_counts(self) -> dict[str, int]:
        """How often each op is called, by name, most frequent first."""
        return dict(Counter(op_name(node) for node in self.calls).most_common())

    def add_constant(self, tensor: torch.Tensor, sources: Iterable[str], how: str) -> str:
        """Store a tensor that was computed at compile time; returns its ``get_attr`` target.

        Args:
            tensor: the value.
            sources: names of the model's tensors that it was made from.
            how: how, in words.
        """
        name = f"_folded_{len(self.constants)}"
        while name in self.constants:
            name += "_"
        self.set_constant(name, Constant(tensor, tuple(dict.fromkeys(sources)), how))
        return name

    def set_constant(self, name: str, constant: Constant) -> None:
        """Bind a constant to a ``get_attr`` target."""
        self.constants[name] = constant
        self.module.register_buffer(name, constant.tensor.detach(), persistent=False)

    def constant(self, node: Any) -> torch.Tensor | None:
        """The value of a ``get_attr`` node, or None when the node is anything else."""
        if isinstance(node, Node) and node.op == "get_attr":
            return self.constants[str(node.target)].tensor
        return None

    def infer(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fake value that calling ``target`` on nodes and literals gives.

        A size that depends on values is a symbol of its own. PyTorch otherwise keeps it for the next trace
        under the same mode to bind, which knows nothing of it and fails (PendingUnbackedSymbolNotFound).
        """
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
        sizes = self.fake_mode.shape_env
        unbound = contextlib.nullcontext() if sizes is None else sizes.ignore_fresh_unbacked_symbols()
        with unbound, self.fake_mode, enable_python_dispatcher(), torch.no_grad():
            return target(*fake_args, **fake_kwargs)

    def call(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], made_from: Provenance
    ) -> Node:
        """Insert a call at the graph's insertion point, with its fake value and provenance."""
        value = self.infer(target, args, kwargs)
        node = self.fx.call_function(target, args, kwargs)
        node.meta["val"] = value
        node.meta[KEY] = made_from
        return node

    def get_constant(self, name: str, made_from: Provenance) -> Node:
        """Insert a ``get_attr`` node that reads a constant, at the graph's insertion point."""
        node = self.fx.get_attr(name)
        with self.fake_mode:
            node.meta["val"] = self.fake_mode.from_tensor(self.constants[name].tensor, static_shapes=True)
        node.meta[KEY] = made_from
        return node

    def erase_dead(self, candidates: Iterable[Node], proved: Collection[Node] = ()) -> list[str]:
        """Erase those of the candidates that nobody uses, and what dies with them; returns their names.

        Args:
            candidates: nodes; one that has an effect stays.
            proved: assertions that cannot fail: these go although they have an effect.
        """
        erased, work = [], list(candidates)
        while work:
            node = work.pop()
            if node._erased or node.users or node.op in ("placeholder", "output"):
                continue
            if has_effect(node) and node not in proved:
                continue
            producers = node.all_input_nodes
            erased.append(node.name)
            self.fx.erase_node(node)
            work.extend(producers)
        return erased

    def sort(self) -> None:
        """Restore topological order, moving as few nodes as possible (stable)."""
        done: set[Node] = set()
        waiting: dict[Node, list[Node]] = {}

        def place(node: Node) -> None:
            stack = [node]
            while stack:
                current = stack.pop()
                missing = next((i for i in current.all_input_nodes if i not in done), None)
                if missing is not None:
                    waiting.setdefault(missing, []).append(current)
                    continue
                if order and order[-1].next is not current:
                    order[-1].append(current)
                order.append(current)
                done.add(current)
                stack.extend(reversed(waiting.pop(current, [])))

        order: list[Node] = []
        for node in self.nodes:
            if node not in done and node.op != "output":
                place(node)

    def drop_unused_constants(self) -> None:
        """Forget constants that no node reads, so that their memory can go."""
        used = {str(node.target) for node in self.fx.nodes if node.op == "get_attr"}
        for name in set(self.constants) - used:
            del self.constants[name]
            delattr(self.module, name)

    def check(self) -> None:
        """Raise ``RuntimeError`` unless the graph is well formed: order, users, values, no in-place op."""
        self.fx.lint()
        for node in self.calls:
            if "val" not in node.meta:
                raise RuntimeError(f"node {node.name} has no value")
            if writes_in_place(node):
                raise RuntimeError(f"node {node.name} calls {node.target}, which writes to its input")

    def snapshot(self) -> Snapshot:
        """The nodes as they are now, to come back to; costs a copy of the nodes and no code generation."""
        values: dict[Node, Node] = {}
        copied = fx.Graph()
        copied.output(copied.graph_copy(self.fx, values))
        for old, new in values.items():
            new.meta = dict(old.meta)
        return Snapshot(copied, dict(self.constants))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, which is used up; nodes known before are no longer this graph's."""
        for name in self.constants.keys() - snapshot.constants.keys():
            delattr(self.module, name)
        for name in snapshot.constants.keys() - self.constants.keys():
            self.module.register_buffer(name, snapshot.constants[name].tensor.detach(), persistent=False)
        self.constants = dict(snapshot.constants)
        self.module.graph = snapshot.nodes

    def clone(self) -> Graph:
        """A copy whose nodes can be rewritten while this graph stays as it is; constants are shared."""
        copied = self.snapshot().nodes
        module = fx.GraphModule({name: c.tensor for name, c in self.constants.items()}, copied)
        return Graph(
            module,
            dict(self.constants),
            self.inputs,
            self.in_spec,
            self.out_spec,
            self.fake_mode,
            self.guards,
        )


def op_name(node: Node) -> str:
    """The op that a node calls, without its overload: ``aten.linear``, ``graphopt.attention``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[-1]}"
    return getattr(target, "__name__", str(target))


def has_effect(node: Node) -> bool:
    """True when a node must stay although nobody reads its value."""
    return node.target in _EFFECTS


def writes_in_place(node: Node) -> bool:
    """True when a call changes one of its inputs, which a functional graph has no place for."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_symbolic(node: Node) -> bool:
    """True when a node's value is a size (an int or a symbolic int), not a tensor."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt, float, torch.SymFloat, bool, torch.SymBool))


def users_outside(node: Node, inside: Iterable[Node]) -> Iterator[Node]:
    """The users of a node that are not among the given ones."""
    known = set(inside)
    return (user for user in node.users if user not in known)


def value(node: Any) -> Any:
    """The fake value of a node; anything else is its own value."""
    return node.meta["val"] if isinstance(node, Node) else node


def tensor_bytes(val: Any) -> float:
    """Bytes of a fake value (tensors and tuples of tensors), a symbolic size counted at its example."""
    if isinstance(val, torch.Tensor):
        numel = 1
        for size in val.shape:
            numel *= size_hint(size)
        return float(numel * val.element_size())
    if isinstance(val, (tuple, list)):
        return sum(tensor_bytes(item) for item in val)
    return 0.0


def size_hint(size: Any) -> int:
    """A size as a number: the example's value where the size is symbolic."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return int(hint) if hint is not None else 1
    return int(size)


def size_bounds(size: torch.SymInt) -> tuple[int, int | None]:
    """The smallest and the largest value that a dynamic size may have, the latter where capture found one."""
    shape_env = size.node.shape_env
    if shape_env is None:
        return 0, None
    found: Any = shape_env.bound_sympy(size.node.expr)
    least = int(found.lower) if getattr(found.lower, "is_Integer", False) else 0
    is_bound = getattr(found.upper, "is_Integer", False) and found.upper < _UNBOUNDED
    return least, int(found.upper) if is_bound else None


_UNBOUNDED = 2**31  # what is larger stands for "no bound"


def same_size(left: Any, right: Any) -> bool:
    """True when two sizes are equal for every input; asking adds no guard on dynamic dimensions."""
    return bool(statically_known_true(left == right))


def same_shape(left: Any, right: Any) -> bool:
    """True when two shapes are equal for every input."""
    return len(left) == len(right) and all(map(same_size, left, right))


def is_getitem(node: Node) -> bool:
    """True for the node that takes one output of a call with several."""
    return node.op == "call_function" and node.target is operator.getitem
