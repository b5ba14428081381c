"""The cuda executor on a GPU: right, captured, and never a tensor of another call."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.compiler.compare import compare
from graphopt.compiler.tolerance import MODEL_FLOOR_ULPS
from graphopt.errors import LoweringError, TargetError
from graphopt.runtime import cuda_graph
from graphopt.runtime.executors.cuda import CudaProgram
from tests._models import FAMILIES, MLP, Example, bert, randn, randomised


def on_gpu(example: Example, dtype: torch.dtype = torch.float32) -> Example:
    """The model and its inputs on the GPU, floating ones in a dtype."""

    def moved(x: Any) -> Any:
        return x.cuda().to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x.cuda()

    args = tuple(moved(x) for x in example.args)
    kwargs = {name: moved(x) for name, x in example.kwargs.items()}
    return Example(example.model.cuda().to(dtype), args, kwargs, example.dynamic)


def leaves(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def agrees(example: Example, opt: nn.Module, *args: Any, **kwargs: Any) -> None:
    """A call's outputs are as exact as the original's."""
    wide = example.model.double
    with torch.no_grad():
        before = leaves(example.model(*args, **kwargs))
        after = leaves(opt(*args, **kwargs))
        dtype = next(example.model.parameters()).dtype
        double = [x.double() if x.is_floating_point() else x for x in args]
        reference = leaves(wide()(*double, **{k: _double(v) for k, v in kwargs.items()}))
        example.model.to(dtype)
    verdict = compare(before, after, reference, MODEL_FLOOR_ULPS)
    assert verdict.ok, verdict.reason


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def mlp() -> Example:
    return Example(randomised(MLP()), (randn(4, 8),), {}, {"x": {0: "batch"}})


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "dtype"),
    [*itertools.product(FAMILIES, (torch.float32, torch.float16)), ("bert", torch.bfloat16)],
)
def test_a_model_is_one_cuda_graph_and_as_exact_as_before(family: str, dtype: torch.dtype) -> None:
    example = on_gpu(FAMILIES[family](), dtype)
    opt = graphopt.optimize(
        example.model, example.args, example.kwargs, executors=("cuda",), require_cuda_graph=True
    )
    graphs = opt.report.cuda_graphs
    assert graphs is not None
    assert graphs["coverage"] == 1.0
    assert graphs["count"] >= 1
    undone = [row.reason for row in opt.report.remarks if row.reason.startswith("undone")]
    assert not undone
    agrees(example, opt, *example.args, **example.kwargs)


@pytest.mark.gpu
def test_later_calls_do_not_change_what_older_ones_returned() -> None:
    example = on_gpu(mlp())
    opt = graphopt.optimize(example.model, example.args, executors=("cuda",))
    inputs = [randn(4, 8, seed=seed).cuda() for seed in range(5)]
    results = [opt(x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert torch.equal(opt(x), result)
        agrees(example, opt, x)


@pytest.mark.gpu
def test_a_returned_input_or_constant_is_a_copy() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return x.view(-1), self.table[None] * 1, x + 1

    x = torch.ones(3, device="cuda")
    opt = graphopt.optimize(Same().cuda().eval(), (x,), executors=("cuda", "eager"))
    first = opt(x)
    kept = [value.clone() for value in first]
    opt(torch.zeros(3, device="cuda"))
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.gpu
def test_strided_inputs_give_the_same() -> None:
    example = on_gpu(mlp())
    opt = graphopt.optimize(example.model, example.args, executors=("cuda",))
    wide = randn(8, 8, seed=3).cuda()
    for x in (wide[::2], wide.t()[:4], wide[:1].expand(4, 8)):
        assert torch.equal(opt(x), opt(x.contiguous()))


@pytest.mark.gpu
def test_dynamic_shapes_are_captured_when_they_come_again() -> None:
    example = on_gpu(mlp())
    opt = graphopt.optimize(example.model, example.args, dynamic=example.dynamic, executors=("cuda",))
    (step,) = opt.plan.steps
    assert isinstance(step.program, CudaProgram)
    for batch in (4, 7, 7, 7, 1, 1, 0, 0, 33, 4):
        agrees(example, opt, randn(batch, 8, seed=batch).cuda())
    assert step.program.describe()["cuda_graphs"] == 4  # 4, 7, 1, 0
    for batch in range(2, 24):
        for _ in range(2):
            agrees(example, opt, randn(batch, 8, seed=batch).cuda())
    row = step.program.describe()
    assert row["cuda_graphs"] == 8
    assert row["cuda_graphs_dropped"] > 0
    assert row["cuda_graph_bytes"] > 0


@pytest.mark.gpu
def test_a_weight_that_the_graph_computes_is_not_read_early() -> None:
    """The kernel that makes it runs long, right ahead of the norm, whose programs are there by then."""

    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, much: torch.Tensor) -> torch.Tensor:
            weight = much.sum(0)
            return torch.layer_norm(x, [x.shape[1]], weight, weight)

    x, much = randn(64, 768).cuda(), randn(65536, 768).cuda()
    opt = graphopt.optimize(Scaled().cuda().eval(), (x, much), executors=("cuda",))
    for turn in range(20):
        expected = torch.layer_norm(x, [768], *(2 * [(turn * much).sum(0)]))
        torch.testing.assert_close(opt(x, turn * much), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_graph_writes_to_no_memory_but_its_own_when_workspaces_are_cleared() -> None:
    """As Inductor clears them ahead of its own captures: what is allocated next may get their place."""
    model = nn.Linear(16384, 64, bias=False).half().cuda().eval()  # so deep that cuBLAS cuts it into parts
    x = randn(64, 16384).half().cuda()
    with torch.no_grad():
        opt = graphopt.optimize(model, (x,), executors=("cuda",), effort="fast")
        first = opt(x)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        held = [torch.zeros(2**20, dtype=torch.int8, device="cuda") for _ in range(256)]
        for _ in range(10):
            assert torch.equal(opt(x), first)
        assert not any(x.any().item() for x in held)


@pytest.mark.gpu
def test_streams_and_threads_do_not_mix_their_calls() -> None:
    example = on_gpu(mlp())
    opt = graphopt.optimize(example.model, example.args, executors=("cuda",))
    inputs = [randn(4, 8, seed=seed).cuda() for seed in range(4)]
    wanted = [opt(x) for x in inputs]
    torch.cuda.synchronize()
    right: list[bool] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            right.extend(torch.equal(opt(inputs[index]), wanted[index]) for _ in range(50))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(right) == 200
    assert all(right)


@pytest.mark.gpu
def test_memory_that_is_short_at_the_capture_leaves_the_kernels_without_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def short(*_: Any, **__: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    monkeypatch.setattr(cuda_graph.torch.cuda, "CUDAGraph", short)
    example = on_gpu(mlp())
    opt = graphopt.optimize(example.model, example.args, executors=("cuda",), effort="fast")
    assert opt.report.cuda_graphs is not None
    assert opt.report.cuda_graphs["coverage"] == 0.0
    assert any("without a CUDA graph" in row.reason and "80 GiB" in row.reason for row in opt.report.remarks)
    agrees(example, opt, *example.args)
    with pytest.raises(LoweringError, match=r"outside CUDA graphs are .*linear.*80 GiB"):
        graphopt.optimize(example.model, example.args, effort="fast", require_cuda_graph=True)


class Inverse(nn.Module):
    """Waits for the GPU in its middle, to see whether there is an inverse."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(torch.linalg.inv(torch.tanh(x) + 3 * torch.eye(4, device=x.device)))


@pytest.mark.gpu
def test_what_waits_for_the_gpu_stays_outside_with_a_remark() -> None:
    x = randn(4, 4).cuda()
    opt = graphopt.optimize(Inverse().eval(), (x,), executors=("cuda", "eager"))
    assert [row["executor"] for row in opt.report.plan] == ["cuda", "eager", "cuda"]
    assert any("waits for the GPU" in row.reason for row in opt.report.remarks)
    graphs = opt.report.cuda_graphs
    assert graphs is not None
    assert 0 < graphs["coverage"] < 1
    with pytest.raises(LoweringError, match=r"linalg_inv.*waits for the GPU"):
        graphopt.optimize(
            Inverse().eval(), (x,), executors=("cuda", "eager"), effort="fast", require_cuda_graph=True
        )


@pytest.mark.gpu
def test_the_plan_and_the_report_record_every_choice() -> None:
    example = on_gpu(bert(), torch.float16)
    opt = graphopt.optimize(example.model, (), example.kwargs, executors=("cuda",))
    (row,) = opt.report.plan
    attention = next(kernel for kernel in row["kernels"] if kernel["op"] == "graphopt.attention")
    assert attention["chosen"] in attention["us"] or attention["chosen"] == "aten"
    assert set(attention["us"]) | set(attention["refused"]) >= {"flash", "cudnn", "efficient"}
    assert all(time.ms >= 0 for time in opt.report.node_times)
    assert "CUDA graphs" in str(opt.report)
    assert opt.report.to_dict()["cuda_graphs"]["coverage"] == 1.0


@pytest.mark.gpu
def test_weights_are_shared_with_the_original() -> None:
    example = on_gpu(mlp())
    opt = graphopt.optimize(example.model, example.args, executors=("cuda",), level=0)
    example.model.last.bias.data.add_(1.0)
    agrees(example, opt, *example.args)


@pytest.mark.gpu
@pytest.mark.slow
def test_inductor_runs_in_our_graphs() -> None:
    example = on_gpu(bert(), torch.float16)
    opt = graphopt.optimize(
        example.model, (), example.kwargs, executors=("inductor",), require_cuda_graph=True, effort="fast"
    )
    agrees(example, opt, **example.kwargs)


def test_a_cuda_graph_is_not_required_of_a_cpu() -> None:
    with pytest.raises(TargetError, match="require_cuda_graph=True, but the target is cpu"):
        graphopt.optimize(randomised(MLP()), (randn(4, 8),), require_cuda_graph=True)


def test_the_executor_refuses_the_cpu() -> None:
    with pytest.raises(LoweringError, match="the cuda executor runs on a GPU, the target is cpu"):
        graphopt.optimize(randomised(MLP()), (randn(4, 8),), executors=("cuda",))
