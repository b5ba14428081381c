from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.fold_conv_batch_norm import PASS
from tests._models import randn
from tests.passes._harness import program, run

X = randn(2, 4, 7, 7)


def conv_then_norm(m, x):
    return m.norm(m.conv(x))


def test_a_convolution_and_its_norm() -> None:
    ran = run(PASS, program(conv_then_norm, conv=nn.Conv2d(4, 6, 3, bias=False), norm=nn.BatchNorm2d(6)), X)
    of = "conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var"
    ran.becomes(
        f"""
        %0 = conv2d(x, <batch norm folded: {of}>, <batch norm folded: {of}>)
        return %0
        """
    )


CONVOLUTIONS = {
    "bias": nn.Conv2d(4, 6, 3),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "padded to the same size": nn.Conv2d(4, 6, 3, padding="same", bias=False),
}


def each(pairs):
    """A program that computes second(first(x)) for each: several in one, since capturing takes the time."""

    def forward(m, x):
        return [second(first(x)) for first, second in zip(m.first, m.second, strict=True)]

    first, second = zip(*pairs, strict=True)
    return program(forward, first=nn.ModuleList(first), second=nn.ModuleList(second))


def test_every_convolution() -> None:
    pairs = [(conv, nn.BatchNorm2d(conv.out_channels)) for conv in CONVOLUTIONS.values()]
    run(PASS, each(pairs), X).counts(batch_norm=0, conv2d=6)


def test_one_dimension_and_three() -> None:
    def forward(m, x, y):
        return m.norm1(m.conv1(x)), m.norm3(m.conv3(y))

    layers = {"conv1": nn.Conv1d(4, 6, 3, padding=1), "norm1": nn.BatchNorm1d(6)}
    layers |= {"conv3": nn.Conv3d(4, 6, 2), "norm3": nn.BatchNorm3d(6)}
    ran = run(PASS, program(forward, **layers), randn(2, 4, 9), randn(2, 4, 3, 3, 3))
    ran.counts(batch_norm=0, conv1d=1, conv3d=1)


TRANSPOSED = {
    "plain": nn.ConvTranspose2d(4, 6, 3),
    "strided": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
    "grouped": nn.ConvTranspose2d(4, 6, 3, groups=2),
    "dilated": nn.ConvTranspose2d(4, 6, 2, dilation=2),
}


def test_every_transposed_convolution() -> None:
    pairs = [(conv, nn.BatchNorm2d(6)) for conv in TRANSPOSED.values()]
    run(PASS, each(pairs), X).counts(batch_norm=0, conv_transpose2d=4)


def test_transposed_in_one_dimension_and_three() -> None:
    def forward(m, x, y):
        return m.norm1(m.conv1(x)), m.norm3(m.conv3(y))

    layers = {"conv1": nn.ConvTranspose1d(4, 6, 3, groups=2), "norm1": nn.BatchNorm1d(6)}
    layers |= {"conv3": nn.ConvTranspose3d(4, 6, 2), "norm3": nn.BatchNorm3d(6)}
    ran = run(PASS, program(forward, **layers), randn(2, 4, 9), randn(2, 4, 3, 3, 3))
    ran.counts(batch_norm=0, conv_transpose1d=1, conv_transpose3d=1)


FIRST = {
    "plain": nn.Conv2d(4, 6, 3),
    "without bias": nn.Conv2d(4, 6, 3, bias=False),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, stride=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, dilation=2),
    "of one pixel": nn.Conv2d(4, 6, 1, padding="same"),
    "padded by name with nothing": nn.Conv2d(4, 6, 3, padding="valid"),
}


def test_a_norm_in_front() -> None:
    pairs = [(nn.BatchNorm2d(4), conv) for conv in FIRST.values()]
    run(PASS, each(pairs), X).counts(batch_norm=0, conv2d=6)


def test_one_norm_in_front_of_two_convolutions() -> None:
    def forward(m, x):
        y = m.norm(x)
        return m.one(y), m.two(y)

    layers = {"norm": nn.BatchNorm2d(4), "one": nn.Conv2d(4, 6, 3), "two": nn.Conv2d(4, 5, 1)}
    run(PASS, program(forward, **layers), X).counts(batch_norm=0, conv2d=2)


PADDED = {
    "by one": nn.Conv2d(4, 6, 3, padding=1),
    "to the same size": nn.Conv2d(4, 6, 3, padding="same"),
    "transposed": nn.ConvTranspose2d(4, 6, 3),
}


@pytest.mark.parametrize("conv", PADDED.values(), ids=PADDED)
def test_a_norm_in_front_of_padding_is_refused(conv: nn.Module) -> None:
    ran = run(PASS, each([(nn.BatchNorm2d(4), conv)]), X)
    ran.refuses("the convolution pads with zeros, which do not become the constant that is added")


def test_a_norm_in_front_that_something_else_reads_stays() -> None:
    def forward(m, x):
        y = m.norm(x)
        return m.conv(y), y

    run(PASS, program(forward, norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 6, 3)), X).stays()


def test_filters_that_would_overflow_are_refused() -> None:
    norm = nn.BatchNorm2d(6)
    model = program(conv_then_norm, conv=nn.Conv2d(4, 6, 3), norm=norm).half()
    norm.running_var.fill_(0.0)
    norm.eps, norm.weight.data[:] = 1e-10, 6e4
    run(PASS, model, 1e-3 * X.half(), redraw=False).refuses("the new weights would overflow torch.float16")


def test_a_norm_without_weights() -> None:
    norm = nn.BatchNorm2d(6, affine=False)
    run(PASS, program(conv_then_norm, conv=nn.Conv2d(4, 6, 3), norm=norm), X).counts(batch_norm=0)


def test_a_chain() -> None:
    layers = [*(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), *(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5))]

    def forward(m, x):
        return m.layers(x).relu()

    run(PASS, program(forward, layers=nn.Sequential(*layers)), X).counts(conv2d=2, batch_norm=0, relu=2)


def test_a_tiny_variance() -> None:
    norm = nn.BatchNorm2d(6)
    model = program(conv_then_norm, conv=nn.Conv2d(4, 6, 3), norm=norm)
    norm.running_var.fill_(1e-12)
    run(PASS, model, X, redraw=False).counts(batch_norm=0)


def test_one_convolution_for_two_norms_is_refused() -> None:
    def forward(m, x):
        y = m.conv(x)
        return m.one(y), m.two(y)

    ran = run(
        PASS, program(forward, conv=nn.Conv2d(4, 6, 3), one=nn.BatchNorm2d(6), two=nn.BatchNorm2d(6)), X
    )
    ran.refuses("the convolution's result is also read by batch_norm")


def test_one_layer_called_twice() -> None:
    def forward(m, x):
        return m.norm(m.conv(x)), m.norm(m.conv(x.sin()))

    ran = run(PASS, program(forward, conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)), X)
    ran.counts(conv2d=2, batch_norm=0)


def test_shared_filters_keep_their_value_elsewhere() -> None:
    def forward(m, x):
        return m.norm(m.conv(x)), m.conv(x.sin())

    ran = run(PASS, program(forward, conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)), X)
    ran.counts(conv2d=2, batch_norm=0)


def test_weights_that_are_inputs_are_refused() -> None:
    def forward(m, x, w, b, gamma, beta, mean, var):
        given = {"w": w, "b": b, "gamma": gamma, "beta": beta, "mean": mean, "var": var}
        results = []
        for name, value in given.items():
            use = {**{own: getattr(m, own) for own in given}, name: value}
            y = F.conv2d(x, use["w"], use["b"])
            results.append(F.batch_norm(y, use["mean"], use["var"], use["gamma"], use["beta"]))
        return results

    weights = {"w": randn(6, 4, 3, 3)}
    weights |= {name: randn(6, seed=i) for i, name in enumerate(("b", "gamma", "beta", "mean"))}
    weights["var"] = torch.rand(6) + 0.5
    ran = run(PASS, program(forward, **weights), X, *(w.abs() + 0.1 for w in weights.values()), redraw=False)
    for name in weights:
        ran.refuses(f"^{name} is not a constant")


OTHERS = {
    "statistics of the batch": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
    "another norm": (nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)),
    "an activation between": (nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()), nn.BatchNorm2d(6)),
    "pooling": (nn.AvgPool2d(2), nn.BatchNorm2d(4)),
}


def test_what_only_looks_like_it_stays() -> None:
    run(PASS, each(OTHERS.values()), X).stays()


def test_half_precision() -> None:
    model = program(conv_then_norm, conv=nn.Conv2d(4, 6, 3).bfloat16(), norm=nn.BatchNorm2d(6).bfloat16())
    run(PASS, model, X.bfloat16()).counts(batch_norm=0)


def test_a_few_small_weights_in_half_precision() -> None:
    """Some of 4608 weights leave the normal numbers: next to their neighbours what that costs is nothing."""
    norm = nn.BatchNorm2d(8)
    model = program(conv_then_norm, conv=nn.Conv2d(64, 8, 3), norm=norm).half()
    with torch.no_grad():
        model.conv.weight.copy_(randn(8, 64, 3, 3) / 24)
        norm.weight.fill_(0.25)
    tiny = torch.finfo(torch.half).tiny
    before, after = ((scale * model.conv.weight).abs().lt(tiny).sum() for scale in (1, 0.25))
    assert before < after
    run(PASS, model, randn(1, 64, 6, 6).half(), redraw=False).counts(batch_norm=0)


def test_a_channel_of_small_weights_in_half_precision_is_refused() -> None:
    norm = nn.BatchNorm2d(6)
    model = program(conv_then_norm, conv=nn.Conv2d(4, 6, 3), norm=norm).half()
    norm.weight.data[2] = 1e-4
    run(PASS, model, X.half(), redraw=False).refuses("the new weights would underflow torch.float16")


def test_filters_stay_channels_last() -> None:
    norm = nn.BatchNorm2d(6)
    model = program(conv_then_norm, conv=nn.Conv2d(4, 6, 3), norm=norm).to(memory_format=torch.channels_last)
    ran = run(PASS, model, X.contiguous(memory_format=torch.channels_last))
    (conv,) = ran.graph.fx.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    weight = ran.graph.constant(conv.args[1])
    assert weight is not None
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_dynamic_sizes() -> None:
    model = program(conv_then_norm, conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6))
    ran = run(PASS, model, X, dynamic={"x": {0: "batch", 2: "height"}}).counts(batch_norm=0)
    ran.agrees(randn(3, 4, 5, 7)).agrees(randn(1, 4, 9, 7))
