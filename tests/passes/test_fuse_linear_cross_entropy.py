from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes.default import pipeline
from graphopt.passes.fuse_linear_cross_entropy import PASS
from tests._models import gpt2, randn, tokens
from tests.passes._harness import program, run

X = randn(2, 5, 8)
LABELS = torch.tensor([[3, 0, -100, 10, 4], [1, -100, 2, 2, 9]])


def head(bias: bool = False) -> nn.Linear:
    return nn.Linear(8, 11, bias=bias)


def test_the_loss_of_a_language_model() -> None:
    def forward(m, x, labels):
        logits = m.head(x)
        return F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))

    run(PASS, program(forward, head=head()), X, LABELS).becomes("""
        %0 = slice(x, 1, 0, -1)
        %1 = reshape(%0, [-1, 8])
        %2 = slice(labels, 1, 1, end)
        %3 = reshape(%2, [8])
        %4 = graphopt.linear_cross_entropy(%1, head.weight, None, %3, -100, mean, False)
        return %4
    """)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_rows_and_classes(reduction: str) -> None:
    def forward(m, x, labels):
        return F.cross_entropy(m.head(x), labels, reduction=reduction, ignore_index=2)

    labels = LABELS.clamp(min=0).flatten()
    ran = run(PASS, program(forward, head=head(True)), X.flatten(0, 1), labels)
    ran.counts(linear_cross_entropy=1, linear=0)


def test_the_two_steps_of_it() -> None:
    def forward(m, x, labels):
        return F.nll_loss(F.log_softmax(m.head(x).view(-1, 11), dim=1), labels.view(-1))

    run(PASS, program(forward, head=head()), X, LABELS).counts(
        linear_cross_entropy=1, log_softmax=0, linear=0
    )


def test_logits_cast_to_float32() -> None:
    def forward(m, x, labels):
        return F.cross_entropy(m.head(x).float().view(-1, 11), labels.view(-1))

    model = program(forward, head=head().bfloat16())
    run(PASS, model, X.bfloat16(), LABELS).counts(linear_cross_entropy=1, linear=0, to=0)


def test_logits_that_are_returned_are_refused() -> None:
    def forward(m, x, labels):
        logits = m.head(x)
        return F.cross_entropy(logits.view(-1, 11), labels.view(-1)), logits

    model = program(forward, head=head())
    run(PASS, model, X, LABELS).refuses(r"the logits \(linear\) are also read by output")


def test_weighted_classes_are_refused() -> None:
    def forward(m, x, labels):
        return F.cross_entropy(m.head(x).view(-1, 11), labels.view(-1), weight=m.w)

    run(PASS, program(forward, head=head(), w=torch.rand(11)), X, LABELS).refuses("the classes have weights")


def test_smoothed_labels_are_refused() -> None:
    def forward(m, x, labels):
        return F.cross_entropy(m.head(x).view(-1, 11), labels.view(-1), label_smoothing=0.1)

    run(PASS, program(forward, head=head()), X, LABELS).refuses("the labels are smoothed by 0.1")


def test_probabilities_for_labels_are_refused() -> None:
    def forward(m, x, labels):
        return F.cross_entropy(m.head(x), labels)

    model = program(forward, head=head())
    run(PASS, model, X[0], randn(5, 11).softmax(-1)).refuses("not 2 and 1")


def test_classes_in_the_middle_are_refused() -> None:
    def forward(m, x, labels):
        return F.cross_entropy(m.head(x), labels)

    model = program(forward, head=nn.Linear(8, 8))
    run(PASS, model, X, LABELS[:, :1].expand(2, 8).contiguous()).refuses("3 dimensions and the labels 2")


def test_a_loss_of_something_else_stays() -> None:
    def forward(m, x, labels):
        return F.cross_entropy(m.head(x).tanh().view(-1, 11), labels.view(-1))

    run(PASS, program(forward, head=head()), X, LABELS).stays()


class Trained(nn.Module):
    """A language model that returns its loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2().model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, labels=input_ids).loss


def test_a_language_model() -> None:
    run(pipeline(), Trained().eval(), tokens(2, 6), redraw=False).counts(
        linear_cross_entropy=1, cross_entropy_loss=0
    )


def test_dynamic_sizes() -> None:
    def forward(m, x, labels):
        return F.cross_entropy(m.head(x).view(-1, 11), labels.view(-1))

    dynamic = {name: {0: "batch", 1: "seq"} for name in ("x", "labels")}
    ran = run(PASS, program(forward, head=head()), X, LABELS, dynamic=dynamic)
    ran.counts(linear_cross_entropy=1, linear=0).agrees(randn(3, 2, 8), LABELS[:, :3].reshape(3, 2))
