"""Rows stay a matrix from one product to the next, and a tensor is reshaped once, not step by step.

    Gemm -> Reshape(B, S, N) -> Gelu -> Reshape(-1, N) -> Gemm    becomes    Gemm -> Gelu -> Gemm

Gemm takes matrices, and what stands between two of them is mostly done row by row: an activation, a sum, a
norm. A Reshape moves nothing, but ONNX Runtime runs it: of a layer of BERT's 16 stay 2.
"""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir.passes import common

from graphopt.runtime.onnx_packing import initializer

# What is done element by element; of its inputs some have rows, the others one element or a vector of them.
_ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Sum", "Max", "Min", "Relu", "Gelu", "Sigmoid", "Tanh", "Erf", "Neg", "Abs")
) | {"Sqrt", "Exp", "Softplus", "Elu", "Selu", "LeakyRelu", "HardSigmoid", "HardSwish", "Mish", "Cast"}
_ELEMENTWISE |= {"BiasGelu", "FastGelu", "QuickGelu"}
# Norms of what lies in the last dimension; the inputs behind those with rows are vectors.
_NORMS = frozenset(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"))
_SKIP_NORMS = frozenset(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"))
_DEEPEST = 64  # nodes between two products


def keep_rows(model: ir.Model) -> None:
    """Do row by row what can be, on matrices between products, and leave one Reshape of several.

    Args:
        model: changed in place; what it computes is the same to the bit.
    """
    for node in model.graph:
        _say_shape(node)
    rows = _Rows(model.graph)
    for node in list(model.graph):
        if _flattens(node):
            rows.take(node)
    rows.give_back()
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _join(model.graph, node)
    common.RemoveUnusedNodesPass()(model)
    model.graph.sort()


def _say_shape(node: ir.Node) -> None:
    """What the exporter leaves unsaid between the nodes of one call: of a product, and of a Reshape."""
    made, like = node.outputs[0], None
    if made.shape is not None:
        return
    if node.op_type == "Reshape":
        made.shape, like = _resulting(node), node.inputs[0]
    elif node.op_type == "Gemm":
        like, transposed = node.inputs[1], node.attributes.get_int("transB", 0)
        if like is not None and like.shape is not None:
            made.shape = ir.Shape([None, like.shape[0 if transposed else 1]])
    if made.type is None and like is not None:
        made.type = like.type


class _Rows:
    """Values of rank three and more, and what is the same as a matrix.

    Args:
        graph: nodes are put into.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._matrices: dict[ir.Value, ir.Value] = {}
        self._moved: list[ir.Value] = []  # those that a node on matrices makes now
        self._nothing: set[ir.Value] = set()  # what no matrix was found for

    def take(self, flatten: ir.Node) -> None:
        """Let who reads a flattened value read the matrix."""
        value, made = flatten.inputs[0], flatten.outputs[0]
        assert value is not None
        if made.is_graph_output():
            return
        matrix = self._matrix(value)
        if matrix is None:
            self._matrices[value] = made
        else:
            ir.convenience.replace_all_uses_with(made, matrix)
        self._nothing.clear()  # there may be, now

    def _matrix(self, value: ir.Value, depth: int = 0) -> ir.Value | None:
        """A value as a matrix, where one is there or can be made of one; None where there is none."""
        if value in self._matrices or value in self._nothing:
            return self._matrices.get(value)
        found = self._made(value, depth) if depth < _DEEPEST else None
        if found is None:
            self._nothing.add(value)
        else:
            self._matrices[value] = found
        return found

    def _made(self, value: ir.Value, depth: int) -> ir.Value | None:
        """A matrix that a value was reshaped from, or that its node makes over matrices."""
        node = value.producer()
        if node is None or value.shape is None:
            return None
        if node.op_type == "Reshape":
            source = node.inputs[0]
            assert source is not None
            flat = source.shape is not None and len(source.shape) == 2 and _same_last(source, value)
            return source if flat else None
        given = _row_inputs(node)
        if value is not node.outputs[0] or not given or any(out.is_graph_output() for out in node.outputs):
            return None
        if any(len(out.uses()) > 0 and not _alike(out, value) for out in node.outputs):
            return None
        sources: dict[int, ir.Value] = {place: node.inputs[place] for place in given}  # type: ignore[misc]
        matrices = {place: self._matrix(source, depth + 1) for place, source in sources.items()}
        if all(matrix is None for matrix in matrices.values()):
            return None
        for place, matrix in matrices.items():
            if matrix is None:
                source = sources[place]
                matrices[place] = self._matrices[source] = self._flat(source, node)
        self._move(node, matrices)
        return self._matrices[value]

    def _flat(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """A matrix of a value's rows."""
        assert value.shape is not None
        return _reshaped(self._graph, value, [-1, int(value.shape[-1])], before)  # type: ignore[arg-type]

    def _move(self, node: ir.Node, matrices: dict[int, ir.Value | None]) -> None:
        """The same node over matrices, ahead of the old one."""
        inputs = [matrices.get(place, value) for place, value in enumerate(node.inputs)]
        attributes = [
            ir.AttrInt64("axis", -1) if name == "axis" else attribute
            for name, attribute in node.attributes.items()
        ]
        moved = ir.Node(
            *(node.domain, node.op_type, inputs, attributes),
            num_outputs=len(node.outputs),
            version=node.version,
            metadata_props=dict(node.metadata_props),
        )
        self._graph.insert_before(node, moved)
        for old, new in zip(node.outputs, moved.outputs, strict=True):
            new.name = f"{old.name}_rows" if old.name else ""
            new.type = old.type
            if old.shape is not None:
                new.shape = _matrix_shape(old.shape)
            self._matrices[old] = new
            self._moved.append(old)

    def give_back(self) -> None:
        """Reshape matrices for who still reads the values that they are instead of."""
        for value in self._moved:
            node = value.producer()
            assert node is not None
            readers = [(user, place) for user, place in value.uses() if user is not node]
            if not readers:
                continue
            assert value.shape is not None
            target = _target(value.shape)
            assert target is not None
            back = _reshaped(self._graph, self._matrices[value], target, node)
            back.shape = value.shape
            for user, place in readers:
                user.replace_input_with(place, back)


def _flattens(node: ir.Node) -> bool:
    """Whether a node makes a matrix of the rows of a value."""
    if node.op_type != "Reshape" or node.inputs[0] is None or node.inputs[0].shape is None:
        return False
    shape, given = node.inputs[0].shape, _constant(node.inputs[1])
    return len(shape) > 2 and given is not None and given == [-1, shape[-1]]


def _row_inputs(node: ir.Node) -> list[int]:
    """Which inputs of a node have rows, if it works on each alone and the others are the same for all."""
    out = node.outputs[0]
    if out.shape is None or len(out.shape) < 3 or _target(out.shape) is None:
        return []
    rank = len(out.shape)
    if node.op_type in _NORMS:
        axis = node.attributes.get_int("axis", -1)
        first = 1 if axis in (-1, rank - 1) else 0
    elif node.op_type in _SKIP_NORMS:
        first = 2
    elif node.op_type in _ELEMENTWISE:
        first = len(node.inputs)
    else:
        return []
    given = [(place, value) for place, value in enumerate(node.inputs) if value is not None]
    if any(value.shape is None for _, value in given):
        return []
    wide = [(place, value) for place, value in given if len(value.shape or ()) > 1]
    # One alone is as large as the result; of several, one may be repeated.
    alone = len(wide) == 1 and len(wide[0][1].shape or ()) == rank and _same_last(wide[0][1], out)
    if any(place >= first for place, _ in wide) or not (
        alone or all(_alike(value, out) for _, value in wide)
    ):
        return []
    return [place for place, _ in wide]


def _alike(one: ir.Value, other: ir.Value) -> bool:
    return one.shape is not None and other.shape is not None and _same(one.shape, other.shape)


def _same(one: ir.Shape, other: ir.Shape) -> bool:
    """Whether two shapes are equal for certain: sizes without a name are any."""
    named = all(isinstance(size, int) or size.value is not None for size in one)
    return named and list(one) == list(other)


def _same_last(one: ir.Value, other: ir.Value) -> bool:
    assert one.shape is not None and other.shape is not None
    return isinstance(one.shape[-1], int) and one.shape[-1] == other.shape[-1]


def _matrix_shape(shape: ir.Shape) -> ir.Shape:
    rows = list(shape)[:-1]
    known = all(isinstance(size, int) for size in rows)
    return ir.Shape([math.prod(rows) if known else None, shape[-1]])


def _target(shape: ir.Shape) -> list[int] | None:
    """The sizes that a Reshape is told to make a shape, one unknown among them at most; else None."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return sizes if sizes.count(-1) <= 1 and isinstance(shape[-1], int) and 0 not in sizes else None


def _join(graph: ir.Graph, node: ir.Node) -> None:
    """Reshape what a chain of them began with, or read it where it has the shape already."""
    value, made = node.inputs[0], node.outputs[0]
    shape, source = _resulting(node), _origin(value)
    if shape is None or source is None or (source is value and source.shape is None):
        return
    if source.shape is not None and _same(source.shape, shape) and not made.is_graph_output():
        ir.convenience.replace_all_uses_with(made, source)
        return
    target = _target(shape)
    if source is value or target is None:
        return
    node.replace_input_with(0, source)
    node.replace_input_with(1, _sizes(graph, target))
    node.attributes.pop("allowzero", None)


def _origin(value: ir.Value | None) -> ir.Value | None:
    """What a value was reshaped from at first; itself where it was not."""
    while value is not None:
        node = value.producer()
        if node is None or node.op_type != "Reshape" or node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value


def _resulting(node: ir.Node) -> ir.Shape | None:
    """The shape that a Reshape makes, as far as it is known."""
    made, value = node.outputs[0], node.inputs[0]
    if made.shape is not None:
        return made.shape
    given = _constant(node.inputs[1])
    if given is None or value is None or node.attributes.get_int("allowzero", False):
        return None
    if value.shape is None:
        return None if 0 in given else ir.Shape([None if size == -1 else size for size in given])
    sizes = [value.shape[place] if size == 0 else size for place, size in enumerate(given)]
    if -1 in given:
        kept = [size for size, told in zip(sizes, given, strict=True) if told != -1]
        left = [size for size in value.shape if not isinstance(size, int)]
        symbols = [size for size in kept if not isinstance(size, int)]
        if left != symbols:
            return None
        whole, rest = (math.prod(s for s in part if isinstance(s, int)) for part in (value.shape, kept))
        if rest == 0 or whole % rest:
            return None
        sizes[given.index(-1)] = whole // rest
    return ir.Shape(sizes)


def _constant(value: ir.Value | None) -> list[int] | None:
    """The sizes that a Reshape is told; None where they are computed."""
    if value is None or value.const_value is None:
        return None
    return [int(size) for size in value.const_value.numpy().tolist()]


def _reshaped(graph: ir.Graph, value: ir.Value, sizes: list[int], before: ir.Node) -> ir.Value:
    node = ir.node("Reshape", [value, _sizes(graph, sizes)], metadata_props=dict(before.metadata_props))
    made = node.outputs[0]
    made.name, made.type = f"{value.name}_as_{'x'.join(map(str, sizes))}", value.type
    made.shape = ir.Shape([None if size == -1 else size for size in sizes])
    graph.insert_before(before, node)
    return made


def _sizes(graph: ir.Graph, sizes: list[int]) -> ir.Value:
    """An initializer of these sizes."""
    return initializer(graph, f"sizes_{'x'.join(map(str, sizes))}", ir.tensor(sizes, dtype=ir.DataType.INT64))
