from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.ir.graph import op_name
from graphopt.passes.prune_zero_channels import PASS
from tests._models import randn, randomised
from tests.passes._harness import Ran, program, run

X = randn(2, 5, 8)
IMAGE = randn(2, 3, 8, 8)


def zeroed(model: nn.Module, **rows: Iterable[int]) -> nn.Module:
    """The model with random weights, but zeros in some rows of a layer, or columns where named so."""
    randomised(model)
    with torch.no_grad():
        for name, channels in rows.items():
            layer, _, columns = name.partition("__")
            module = getattr(model, layer)
            if columns:
                module.weight[:, list(channels)] = 0
            else:
                module.weight[list(channels)] = 0
                if columns == "" and module.bias is not None:
                    module.bias[list(channels)] = 0
    return model


def weights(ran: Ran) -> list[tuple[int, ...]]:
    """The shapes of the weights of every layer, in order."""
    names = ("aten.linear", "aten.conv", "aten.matmul")
    layers = [node for node in ran.graph.calls if op_name(node).startswith(names)]
    return [tuple(node.args[1].meta["val"].shape) for node in layers]


def mlp(activation=F.relu, bias: bool = True, **zeros: Iterable[int]) -> nn.Module:
    def forward(m, x):
        return m.down(activation(m.up(x)))

    return zeroed(program(forward, up=nn.Linear(8, 12, bias), down=nn.Linear(12, 6, bias)), **zeros)


def test_zero_rows() -> None:
    ran = run(PASS, mlp(up=[1, 4, 5]), X, redraw=False)
    ran.becomes(
        """
            %0 = linear(x, <9 of 12 units: up.weight>, <9 of 12 units: up.bias>)
            %1 = relu(%0)
            %2 = linear(%1, <9 of 12 units: down.weight>, down.bias)
            return %2
        """,
        before="""
            %0 = linear(x, up.weight, up.bias)
            %1 = relu(%0)
            %2 = linear(%1, down.weight, down.bias)
            return %2
        """,
    )


@pytest.mark.parametrize("activation", [F.relu, F.gelu, F.silu, torch.tanh, F.hardswish, lambda x: x * 3])
def test_activations_that_are_zero_at_zero(activation) -> None:
    assert weights(run(PASS, mlp(activation, up=[0, 11]), X, redraw=False)) == [(10, 8), (6, 10)]
    assert weights(run(PASS, mlp(activation, False, up=[0]), X, redraw=False)) == [(11, 8), (6, 11)]


@pytest.mark.parametrize("activation", [torch.sigmoid, torch.exp, lambda x: F.softplus(x) + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_goes_into_the_bias(activation, bias) -> None:
    ran = run(PASS, mlp(activation, bias, up=[0, 11]), X, redraw=False)
    assert weights(ran) == [(10, 8), (6, 10)]
    (_, down) = (node for node in ran.graph.calls if op_name(node) == "aten.linear")
    assert ran.graph.constants[down.args[2].target].how == "10 of 12 units"


def test_a_bias_alone_is_a_constant_too() -> None:
    model = mlp(F.gelu)
    with torch.no_grad():
        model.up.weight[3:7] = 0
    assert weights(run(PASS, model, X, redraw=False)) == [(8, 8), (6, 8)]


def test_zero_columns() -> None:
    ran = run(PASS, mlp(F.gelu, down__columns=[2, 3]), X, redraw=False)
    assert weights(ran) == [(10, 8), (6, 10)]


def test_rows_and_columns() -> None:
    ran = run(PASS, mlp(F.gelu, up=[0, 1], down__columns=[1, 2]), X, redraw=False)
    assert weights(ran) == [(9, 8), (6, 9)]


def test_all_but_one_channel_may_go() -> None:
    assert weights(run(PASS, mlp(up=range(12)), X, redraw=False)) == [(1, 8), (6, 1)]


def test_a_gated_block() -> None:
    def forward(m, x):
        return m.down(F.silu(m.gate(x)) * m.up(x))

    layers = {"gate": nn.Linear(8, 12), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
    model = zeroed(program(forward, **layers), gate=[0, 1], up=[1, 2], down__columns=[11])
    assert weights(run(PASS, model, X, redraw=False)) == [(8, 8), (8, 8), (8, 8)]


def test_a_gated_block_in_one_projection() -> None:
    def forward(m, x):
        gate, up = m.both(x).chunk(2, dim=-1)
        return m.down(F.gelu(gate) * up)

    layers = {"both": nn.Linear(8, 24), "down": nn.Linear(12, 8)}
    model = zeroed(program(forward, **layers), both=[0, 1, 13, 23], down__columns=[5])
    assert weights(run(PASS, model, X, redraw=False)) == [(16, 8), (8, 8)]


def test_three_layers_in_a_row() -> None:
    def forward(m, x):
        return m.three(F.relu(m.two(F.relu(m.one(x)))))

    layers = {"one": nn.Linear(8, 12), "two": nn.Linear(12, 10), "three": nn.Linear(10, 4)}
    model = zeroed(program(forward, **layers), one=[0, 1], two=[2, 9])
    assert weights(run(PASS, model, X, redraw=False)) == [(10, 8), (8, 10), (4, 8)]


def test_products_with_a_matrix() -> None:
    def forward(m, x):
        return F.relu(x @ m.up) @ m.down

    up, down = randn(8, 12), randn(12, 6)
    up[:, 3] = 0
    down[5] = 0
    assert weights(run(PASS, program(forward, up=up, down=down), X, redraw=False)) == [(8, 10), (10, 6)]


def test_convolutions_with_batch_norm_pooling_and_depthwise_filters() -> None:
    def forward(m, x):
        x = F.max_pool2d(F.relu(m.norm(m.one(x))), 2)
        x = F.avg_pool2d(F.relu6(m.deep(x)), 2)
        return m.head(F.adaptive_avg_pool2d(m.two(x), 1).flatten(1))

    layers = {
        "one": nn.Conv2d(3, 8, 3, padding=1),
        "norm": nn.BatchNorm2d(8),
        "deep": nn.Conv2d(8, 8, 3, padding=1, groups=8),
        "two": nn.Conv2d(8, 10, 1),
        "head": nn.Linear(10, 4),
    }
    model = zeroed(program(forward, **layers), one=[0, 1], deep=[2], two=[3, 4])
    with torch.no_grad():
        model.norm.bias[:2] = -abs(model.norm.bias[:2]) - 3  # the rectified constant is zero
    ran = run(PASS, model, IMAGE, redraw=False)
    assert weights(ran) == [(5, 3, 3, 3), (5, 1, 3, 3), (8, 5, 1, 1), (4, 8)]


def test_filters_in_front_of_flattened_pixels() -> None:
    def forward(m, x):
        return m.head(torch.flatten(F.relu(m.one(x)), 1))

    layers = {"one": nn.Conv2d(3, 8, 3, stride=2), "head": nn.Linear(72, 4)}
    model = zeroed(program(forward, **layers), one=[7], head__columns=range(9, 18))
    assert weights(run(PASS, model, IMAGE, redraw=False)) == [(6, 3, 3, 3), (4, 54)]


def test_a_constant_channel_at_a_padded_border_stays() -> None:
    """What it adds differs at the border, where zeros are padded in."""

    def forward(m, x):
        return m.two(F.elu(m.one(x)) + 1), m.three(F.elu(m.four(x)) + 1)

    layers = {"one": nn.Conv2d(3, 8, 1), "two": nn.Conv2d(8, 4, 3, padding=1)}
    layers |= {"four": nn.Conv2d(3, 8, 1), "three": nn.Conv2d(8, 4, 3)}
    model = zeroed(program(forward, **layers), one=[0], four=[0])
    shapes = weights(run(PASS, model, IMAGE, redraw=False))
    assert sorted(shapes) == [(4, 7, 3, 3), (4, 8, 3, 3), (7, 3, 1, 1), (8, 3, 1, 1)]


def test_transposed_convolutions() -> None:
    def forward(m, x):
        return m.two(F.relu(m.one(x)))

    layers = {"one": nn.ConvTranspose2d(3, 8, 2, stride=2), "two": nn.ConvTranspose2d(8, 4, 3)}
    model = randomised(program(forward, **layers))
    with torch.no_grad():
        model.one.weight[:, 2] = model.one.bias[2] = 0
        model.two.weight[5] = 0
    assert weights(run(PASS, model, IMAGE, redraw=False)) == [(3, 6, 2, 2), (6, 4, 3, 3)]


def test_a_residual_connection_couples_layers() -> None:
    """A channel of the stream goes when every layer that writes it is zero, or no layer reads it."""

    def forward(m, x):
        y = F.relu(m.stem(x))
        return m.head(y + m.out(F.relu(m.into(y))))

    layers = {"stem": nn.Linear(8, 12), "into": nn.Linear(12, 6)}
    layers |= {"out": nn.Linear(6, 12), "head": nn.Linear(12, 4)}
    zeros = {"stem": [0, 1, 2], "out": [1, 2, 3], "into__columns": [7], "head__columns": [7, 8]}
    model = zeroed(program(forward, **layers), **zeros)
    shapes = weights(run(PASS, model, X, redraw=False))
    assert shapes == [(9, 8), (6, 9), (9, 6), (4, 9)]


def test_several_readers() -> None:
    def forward(m, x):
        y = m.up(x).relu()
        return m.one(y), m.two(y)

    layers = {"up": nn.Linear(8, 12), "one": nn.Linear(12, 4), "two": nn.Linear(12, 3)}
    model = zeroed(program(forward, **layers), up=[0], one__columns=[1, 2], two__columns=[2, 3])
    assert sorted(weights(run(PASS, model, X, redraw=False))) == [(3, 10), (4, 10), (10, 8)]


REFUSED = {
    "layer_norm mixes the channels": lambda m, x: m.down(F.layer_norm(m.up(x), (12,))),
    "linear is returned": lambda m, x: (m.down(F.relu(y := m.up(x))), y),
    "softmax mixes the channels": lambda m, x: m.down(m.up(x).softmax(-1)),
    "mean mixes the channels": lambda m, x: m.down(y := m.up(x)) + y.mean(-1, keepdim=True),
    "slice_1 mixes the channels": lambda m, x: m.down(y := m.up(x)) + y[..., :6],
    "cumsum needs all channels": lambda m, x: m.down(m.up(x).cumsum(-1)),
    "y is an input": lambda m, x, y: m.down(m.up(x) + y),
    "splits or merges the channels": lambda m, x: m.down(m.up(x).reshape(2, 5, 2, 6).mT.reshape(2, 5, 12)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_channels_that_are_needed_are_refused(reason: str) -> None:
    function = REFUSED[reason]

    def forward(m, x):
        return function(m, x)

    def forward_two(m, x, y):
        return function(m, x, y)

    takes_two = function.__code__.co_argcount == 3
    layers = {"up": nn.Linear(8, 12), "down": nn.Linear(12, 6)}
    model = zeroed(program(forward_two if takes_two else forward, **layers), up=[0, 1])
    ran = run(PASS, model, X, *([randn(2, 5, 12)] * takes_two), redraw=False).stays()
    (missed,) = ran.remarks.of_kind("missed")
    assert missed.reason.startswith("2 of 12 channels are zero, but ")
    assert reason in missed.reason


def test_a_refusal_names_the_users_line() -> None:
    def forward(m, x):
        return m.down(m.up(x).softmax(-1))

    model = zeroed(program(forward, up=nn.Linear(8, 12), down=nn.Linear(12, 6)), up=[0, 1])
    run(PASS, model, X, redraw=False).refuses("2 of 12 channels are zero, but softmax mixes the channels")


def test_a_model_without_zeros_says_nothing() -> None:
    ran = run(PASS, mlp(), X).stays()
    assert not ran.remarks.rows


def test_half_precision() -> None:
    model = mlp(torch.sigmoid, up=[1, 2]).to(torch.bfloat16)
    assert weights(run(PASS, model, X.to(torch.bfloat16), redraw=False)) == [(10, 8), (6, 10)]


def test_dynamic_sizes() -> None:
    def forward(m, x):
        batch, seq, _ = x.shape
        y = F.gelu(m.up(x.reshape(-1, 8)))
        return m.down(y.reshape(batch, seq, 12).transpose(0, 1))

    layers = {"up": nn.Linear(8, 12), "down": nn.Linear(12, 6)}
    model = zeroed(program(forward, **layers), up=[1, 4], down__columns=[0])
    ran = run(PASS, model, X, redraw=False, dynamic={"x": {0: "batch", 1: "seq"}})
    assert weights(ran) == [(9, 8), (6, 9)]
    ran.agrees(randn(3, 4, 8)).agrees(randn(1, 9, 8))
