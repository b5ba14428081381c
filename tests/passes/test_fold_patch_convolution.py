from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from graphopt.capture.export import capture
from graphopt.passes import fold_patch_convolution
from graphopt.passes.default import pipeline
from graphopt.passes.fold_patch_convolution import PASS
from tests._models import randn, randomised, vit
from tests.passes._harness import program, rerun, run

X, W, B = randn(2, 3, 8, 12), randn(6, 3, 4, 2), randn(6)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where it pays."""
    monkeypatch.setattr(fold_patch_convolution, "_PAYS_ON", ("cpu",))


def patches(**options):
    """Patches of 4 x 2 pixels as tokens."""

    def forward(m, x):
        return F.conv2d(x, m.w, m.b, **options).flatten(2).transpose(1, 2).relu()

    return program(forward, w=W, b=B)


def test_patches_are_rows_of_a_product() -> None:
    run(PASS, patches(stride=(4, 2)), X).becomes(
        """
        %0 = reshape(x, [2, 3, 2, 4, 6, 2])
        %1 = permute(%0, [0, 2, 4, 1, 3, 5])
        %2 = reshape(%1, [2, 2, 6, 24])
        %3 = linear(%2, <laid out: w>, b)
        %4 = permute(%3, [0, 3, 1, 2])
        %5 = reshape(%4, [2, 6, 12])
        %6 = transpose(%5, 1, 2)
        %7 = relu(%6)
        return %7
        """,
        before="""
            %0 = conv2d(x, w, b, [4, 2])
            %1 = reshape(%0, [2, 6, 12])
            %2 = transpose(%1, 1, 2)
            %3 = relu(%2)
            return %3
        """,
    )


def test_the_weights_are_not_kept_twice() -> None:
    ran = run(PASS, patches(stride=(4, 2)), X)
    (made,) = (constant for constant in ran.graph.constants.values() if constant.how)
    assert made.tensor.data_ptr() == ran.model.w.data_ptr()


def test_tokens_come_out_as_they_are_read() -> None:
    ran = run(pipeline(), patches(stride=(4, 2)), X)
    ran.counts(conv2d=0, permute=1, transpose=0, reshape=3, linear_activation=1)


@pytest.mark.parametrize("options", [{"padding": "valid"}, {"padding": 0, "dilation": 1}])
def test_other_spellings(options) -> None:
    run(PASS, patches(stride=(4, 2), **options), X).counts(conv2d=0, linear=1)


def test_square_patches_without_a_bias() -> None:
    def forward(m, x):
        return F.conv2d(x, m.w, stride=2).permute(0, 2, 3, 1).relu()

    run(PASS, program(forward, w=randn(6, 3, 2, 2)), X).counts(conv2d=0, linear=1)


def test_a_dynamic_batch() -> None:
    ran = run(PASS, patches(stride=(4, 2)), X, dynamic={"x": {0: "batch"}}).counts(conv2d=0)
    ran.agrees(randn(5, 3, 8, 12)).agrees(randn(1, 3, 8, 12))


def test_a_vision_transformer() -> None:
    example = vit()
    run(pipeline(), example.model, *example.args).counts(conv2d=0)


def test_patches_that_overlap_or_leave_gaps_stay() -> None:
    run(PASS, patches(stride=2), X).stays()
    run(PASS, patches(stride=4), X).stays()


def test_single_pixels_stay() -> None:
    def forward(m, x):
        return F.conv2d(x, m.w).flatten(2).transpose(1, 2).relu()

    run(PASS, program(forward, w=randn(6, 3, 1, 1)), X).stays()


def test_groups_stay() -> None:
    def forward(m, x):
        return F.conv2d(x, m.w, stride=2, groups=3).flatten(2).transpose(1, 2).relu()

    run(PASS, program(forward, w=randn(6, 1, 2, 2)), X).stays()


def test_a_border_is_refused() -> None:
    run(PASS, patches(stride=(4, 2), padding=(2, 0)), X).refuses("it pads its input")


def test_gaps_inside_of_patches_are_refused() -> None:
    run(PASS, patches(stride=(4, 2), dilation=(1, 2)), X).refuses("leaves out pixels inside of a patch")


def test_an_image_that_patches_do_not_fill_is_refused() -> None:
    run(PASS, patches(stride=(4, 2)), randn(2, 3, 9, 12)).refuses("9 x 12 pixels are not made of patches")


def test_images_of_any_size_are_refused() -> None:
    ran = run(PASS, patches(stride=(4, 2)), X, dynamic={"x": {2: "height"}})
    ran.refuses("x 12 pixels are not made of patches")


def test_an_image_without_a_batch_is_refused() -> None:
    def forward(m, x):
        return F.conv2d(x, m.w, stride=2).permute(1, 2, 0).relu()

    run(PASS, program(forward, w=randn(6, 3, 2, 2)), X[0]).refuses("no batch dimension")


def test_an_image_that_stays_an_image_is_refused() -> None:
    def forward(m, x):
        return F.conv2d(F.conv2d(x, m.w, stride=2).relu(), m.v)

    weights = {"w": randn(6, 3, 2, 2), "v": randn(4, 6, 3, 3)}
    run(PASS, program(forward, **weights), X).refuses("not read with its features last")


def test_filters_that_are_computed_are_refused() -> None:
    def forward(m, x, w):
        return F.conv2d(x, w, stride=2).permute(0, 2, 3, 1).relu()

    run(PASS, program(forward), X, randn(6, 3, 2, 2)).refuses("w is not a constant")


def test_a_batch_norm_goes_first() -> None:
    def forward(m, x):
        return m.norm(m.conv(x)).flatten(2).transpose(1, 2).relu()

    model = program(forward, conv=nn.Conv2d(3, 6, 2, 2), norm=nn.BatchNorm2d(6))
    ran = rerun(pipeline(), randomised(model), capture(model, (X,)), [X])
    ran.counts(batch_norm=0, conv2d=0, linear_activation=1)


def test_on_the_cpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_patch_convolution, "_PAYS_ON", ("cuda",))
    run(PASS, patches(stride=(4, 2)), X).refuses("on cpu a convolution is as fast")
