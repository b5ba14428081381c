"""Plans on streams, of lanes and devices: what is queued where, what waits; without a GPU, and on one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.runtime import scheduler
from graphopt.runtime.plan import Plan, Step
from graphopt.runtime.scheduling.arrange import with_lanes
from graphopt.runtime.scheduling.streams import Streams
from graphopt.runtime.transfer import Transfer, transfer
from tests.runtime.scheduling._cuda import Cuda
from tests.runtime.scheduling._plans import diamond, plan, step

CPU, ONE, TWO = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
X = torch.ones(4)


def test_a_step_waits_for_the_steps_of_other_streams_that_it_reads_from() -> None:
    cuda = Cuda()

    def noted(name: str, factor: float) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            cuda.log.append(f"{name} on {cuda.on}")
            return factor * x

        return run

    made = diamond(noted("left", 2.0), noted("right", 3.0), ONE)
    made = dataclasses.replace(made, lanes=(0, 0, 1, 0))
    end, left = Streams(made, cuda).run([X])
    assert torch.equal(end, torch.full((4,), -2.0))
    assert torch.equal(left, torch.full((4,), 4.0))
    assert cuda.log == [
        "caller records e0",
        "s1 waits for e0",  # what the caller's stream holds
        "caller records e1",  # top
        "left on caller",
        "s1 waits for e1",
        "right on s1",
        "s1 records e2",
        "caller waits for e2",  # end
        "caller waits for s1",
    ]


def test_the_callers_stream_waits_for_what_was_queued_before_a_failure() -> None:
    cuda = Cuda()
    made = dataclasses.replace(diamond(lambda x: x, lambda x: x.view(3), ONE), lanes=(0, 0, 1, 0))
    with pytest.raises(RuntimeError, match="invalid for input"):
        Streams(made, cuda).run([X])
    assert cuda.log[-1] == "caller waits for s1"


@pytest.mark.gpu
def test_on_a_gpu_the_answer_is_the_same() -> None:
    made = diamond(lambda x: (x @ x).cos(), lambda x: (x @ x).sin(), ONE)
    x = torch.randn(512, 512, device=ONE)
    expected = scheduler.run(made, [x])
    beside = with_lanes(made, (0, 0, 1, 0), 2)
    for _ in range(20):
        for found, want in zip(scheduler.run(beside, [x]), expected, strict=True):
            assert torch.equal(found, want)


class Noted(Transfer):
    """A copy that stays where it is and says that it was made."""

    cuda: Cuda

    def run(self, inputs: Any) -> list[Any]:
        self.cuda.log.append(f"copy on {self.cuda.on}")
        return [inputs[0].clone()]


def copy(cuda: Cuda, name: str, source: torch.device, device: torch.device) -> Step:
    program = Noted(name, source, device)
    program.cuda = cuda
    made = step(f"{name}_on_{device.type}{device.index or 0}", [name], lambda x: x)
    return dataclasses.replace(made, program=program, device=device)


def work(cuda: Cuda, name: str, reads: list[str], device: torch.device) -> Step:
    def run(*values: torch.Tensor) -> torch.Tensor:
        cuda.log.append(f"{name} on {cuda.on}")
        return sum(values) + 1

    return dataclasses.replace(step(name, reads, run), device=device)


def towers(cuda: Cuda, home: torch.device, other: torch.device) -> Plan:
    """left and right of x on two devices, and their sum."""
    moved, back = f"x_on_{other.type}{other.index or 0}", f"right_on_{home.type}{home.index or 0}"
    return plan(
        copy(cuda, "x", home, other),
        work(cuda, "right", [moved], other),
        copy(cuda, "right", other, home),
        work(cuda, "left", ["x"], home),
        work(cuda, "end", ["left", back], home),
        outputs=["end"],
        device=home,
    )


def ran(home: torch.device, other: torch.device) -> list[str]:
    cuda = Cuda()
    made = towers(cuda, home, other)
    (end,) = Streams(made, cuda).run([X])
    assert torch.equal(end, torch.full((4,), 5.0))
    return cuda.log


def test_from_the_cpu_the_host_waits_for_what_it_reads_and_for_nothing_else() -> None:
    """s1 computes on the GPU, s2 copies to it, s3 copies from it."""
    assert ran(CPU, ONE) == [
        "copy on s2",
        "s2 records e0",
        "s1 waits for e0",
        "right on s1",
        "s1 records e1",
        "s3 waits for e1",
        "copy on s3",
        "s3 records e2",
        "left on caller",  # beside the GPU: nothing has been waited for
        "the host waits for e2",
        "end on caller",
        "the host waits for s1",
        "the host waits for s2",
        "the host waits for s3",
    ]


def test_between_two_gpus_the_host_waits_for_nothing() -> None:
    log = ran(ONE, TWO)
    assert not [line for line in log if line.startswith("the host")]
    # s1 and s2 copy to the caller's GPU and from it, s4 and s5 to and from the other, where s3 computes
    begun, ends = log[:6], log[-5:]
    assert begun == ["caller records e0", *(f"s{n} waits for e0" for n in range(1, 6))]
    assert ends == [f"caller waits for s{n}" for n in range(1, 6)]
    assert [line for line in log if " on " in line] == [
        "copy on s4",
        "right on s3",
        "copy on s1",
        "left on caller",
        "end on caller",
    ]


def test_what_was_queued_is_waited_for_after_a_failure() -> None:
    for home, last in ((CPU, "the host waits for s3"), (ONE, "caller waits for s5")):
        cuda = Cuda()
        made = towers(cuda, home, TWO if home == ONE else ONE)
        broken = dataclasses.replace(made.steps[3], program=step("bad", ["x"], lambda x: x.view(3)).program)
        made = dataclasses.replace(made, steps=(*made.steps[:3], broken, made.steps[4]))
        with pytest.raises(RuntimeError, match="invalid for input"):
            Streams(made, cuda).run([X])
        assert cuda.log[-1] == last


def test_rows_say_where_each_step_runs() -> None:
    rows = towers(Cuda(), CPU, ONE).rows()
    assert [row["device"] for row in rows] == ["cuda:0", "cuda:0", "cpu", "cpu", "cpu"]
    assert rows[0]["from"] == "cpu"


def test_a_copy_is_a_step_like_any_other() -> None:
    with FakeTensorMode() as mode:
        value = SimpleNamespace(meta={"val": mode.from_tensor(torch.empty(3, 4).t())})
    made = transfer("copy0", value, "x", "x_on_cuda_0", (CPU, ONE))  # type: ignore[arg-type]
    assert (made.region.reads, made.region.writes) == (("x",), ("x_on_cuda_0",))
    (there,) = made.region.results
    assert there.name == "x_on_cuda_0"
    assert there.meta["val"].device == ONE
    assert there.meta["val"].stride() == (1, 4)
    assert made.region.graph.op_counts() == {"aten._to_copy": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
def test_a_copy_to_a_gpu_and_back_is_exact_and_into_pinned_memory(pinned: bool) -> None:
    x = torch.randn(64, 48).t()
    x = x.pin_memory() if pinned else x
    (there,) = Transfer("x", CPU, ONE).run([x])
    (back,), (time,) = Transfer("x", ONE, CPU).profile([there])
    assert there.device == ONE
    assert back.is_pinned()
    assert torch.equal(back, x)
    assert time.ms > 0


@pytest.mark.gpu
def test_a_copy_runs_while_the_host_goes_on() -> None:
    """The GPU is busy for half a second; queueing the copy behind that work takes no such time."""
    x = torch.ones(2**20, device=ONE)
    done = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    (back,) = Transfer("x", ONE, CPU).run([x])
    done.record()
    assert not done.query()
    done.synchronize()
    assert torch.equal(back, torch.ones(2**20))
