"""What cannot be captured is refused with what, where and the way out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture.export import capture
from graphopt.errors import CaptureError, InputError
from tests._models import randn

X = randn(3, 4)


def refused(kind: type[Exception], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with pytest.raises(kind) as error:
        capture(model, args, kwargs)
    assert error.value.hint, error.value  # type: ignore[attr-defined]
    return error.value


class Counter(nn.Module):
    """Writes its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return x * self.steps


class Writer(nn.Module):
    """Writes its input."""

    def forward(self, x: torch.Tensor, *, more: dict[str, torch.Tensor]) -> torch.Tensor:
        more["y"].add_(1)
        return x * more["y"]


class Learner(nn.Module):
    """Writes its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.mul_(2)
        return x * self.weight


class Keeper(nn.Module):
    """Keeps an activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x * 2
        return self.last


class Brancher(nn.Module):
    """Branches on what a tensor holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x


class Teller(nn.Module):
    """Takes a number out of a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[: int(x.abs().max().item())]


class Raiser(nn.Module):
    """Fails on its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the kettle is empty")


def test_a_training_model_is_refused_by_the_first_training_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(), nn.ReLU())).eval()
    model[1][0].train()
    error = refused(CaptureError, model, X)
    assert "Sequential is in training mode (1 modules, first: 1.0)" in str(error)
    assert "model.eval()" in str(error)
    assert "first: (the model itself)" in str(refused(CaptureError, model.train(), X))


@pytest.mark.parametrize(
    ("model", "kwargs", "what"),
    [
        (Counter(), {}, "Counter writes its buffer 'steps'"),
        (Writer(), {"more": {"y": X.clone()}}, "Writer writes its input \"more['y']\""),
        (Learner(), {}, "Learner writes its parameter 'weight'"),
        (Keeper(), {}, "Keeper assigns a tensor to self.last in its forward"),
    ],
    ids=["buffer", "input", "parameter", "attribute"],
)
def test_a_model_that_writes_is_refused_by_name(model: nn.Module, kwargs: Any, what: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert what in str(refused(CaptureError, model.eval(), X, **kwargs))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "last")


def line_of(function: Callable[..., Any], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize(
    ("model", "text"),
    [(Brancher(), "if x.sum() > 0"), (Teller(), "int(x.abs()"), (Raiser(), "raise RuntimeError")],
    ids=["branch", "item", "raise"],
)
def test_what_stops_capture_is_named_by_the_users_own_line(model: nn.Module, text: str) -> None:
    error = refused(CaptureError, model.eval(), X)
    assert error.where == line_of(type(model).forward, text)
    assert type(model).__name__ in error.message


def test_the_message_of_the_model_is_passed_on() -> None:
    assert "the kettle is empty" in refused(CaptureError, Raiser().eval(), X).message


# Inputs


def test_a_call_without_inputs_is_refused() -> None:
    error = refused(InputError, Writer().eval())
    assert "no example inputs were given for Writer" in str(error)
    assert "Writer.forward(x, more)" in str(error)


def test_a_call_without_a_tensor_is_refused() -> None:
    assert "no tensor" in str(refused(InputError, nn.Identity().eval(), 3))


def test_a_call_that_forward_does_not_take_is_refused() -> None:
    with pytest.raises(InputError, match=r"do not fit Linear\.forward.*unexpected keyword argument 'y'"):
        capture(nn.Linear(4, 4).eval(), (X,), {"y": X})


def test_an_input_that_is_no_tensor_is_refused_by_its_place() -> None:
    error = refused(InputError, nn.Identity().eval(), {"rows": [X, X.numpy()]})
    assert error.where == "input['rows'][1]"
    assert "ndarray" in error.message


def test_an_input_on_another_device_is_refused_by_its_place() -> None:
    error = refused(InputError, nn.Linear(4, 4).eval(), X.to("meta"))
    assert "input input is on meta, and Linear is on cpu" in str(error)
    assert ".to('cpu')" in error.hint
    error = refused(InputError, nn.Bilinear(4, 4, 2).eval(), X, input2=X.to("meta"))
    assert error.where == "input2"


def test_a_model_on_two_devices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta")).eval()
    assert "spread over several devices: cpu, meta" in str(refused(InputError, model, X))
