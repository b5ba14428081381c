"""What is to be measured, how, and the command that does it; nothing here imports PyTorch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LIMIT = 900.0  # seconds; Inductor's max-autotune takes minutes for a large model on a GPU

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        spec: the model's SPEC.
        sizes: what its factory is asked for: ``batch``, ``seq``, and others that it takes.
        dtype: that model and inputs are cast to; None leaves them.
        lengths: ``"real"`` or ``"uniform"`` for a ragged batch; None for a full one.
        device: "cpu", "cuda", "cuda:1"; "auto" for where the model is.
        seed: of PyTorch while the model is made, and of the lengths.
        label: what a suite calls it; "" for a name made of the others.
        precision: narrower numbers that graphopt may use, and every peer that can; "exact" for none.
    """

    spec: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    dtype: str | None = None
    lengths: str | None = None
    device: str = "auto"
    seed: int = 0
    label: str = ""
    precision: str = "exact"

    @property
    def name(self) -> str:
        """One line that no other case of a run has."""
        if self.label:
            return self.label
        sizes = [f"{name}={value}" for name, value in self.sizes.items()]
        lengths = [f"{self.lengths} lengths"] if self.lengths else []
        device = [self.device] if self.device != "auto" else []
        precision = [self.precision] if self.precision != "exact" else []
        return " ".join([self.spec, *sizes, *filter(None, [self.dtype]), *precision, *lengths, *device])


@dataclass(frozen=True)
class Setting:
    """How long and how often to measure, and against whom.

    Args:
        against: peers, by name.
        rounds: rounds a case at most; each runs every side once forwards and once backwards.
        seconds: begin no round after so many; None for all rounds.
        threads: of every side on a CPU; None for PyTorch's default.
        limit: seconds that a side may take until it is built, to run once, and for a round; who measures a
            case in a process of its own ends it then. None for as long as it takes.
    """

    against: tuple[str, ...] = ("eager", "inductor", "onnxruntime")
    rounds: int = 30
    seconds: float | None = None
    threads: int | None = None
    limit: float | None = LIMIT


def command_of(case: Case, setting: Setting) -> str:
    """The command that measures one case, to be typed by anybody."""
    words = ["graphopt", "bench", case.spec, "--against", ",".join(setting.against)]
    for name, value in case.sizes.items():
        words += [f"--{name}", str(value)] if name in ("batch", "seq") else ["--set", f"{name}={value}"]
    for name, given in (("dtype", case.dtype), ("lengths", case.lengths)):
        words += [f"--{name}", given] if given else []
    words += ["--precision", case.precision] if case.precision != "exact" else []
    words += ["--device", case.device, "--seed", str(case.seed), "--rounds", str(setting.rounds)]
    words += ["--seconds", f"{setting.seconds:g}"] if setting.seconds is not None else []
    words += ["--threads", str(setting.threads)] if setting.threads is not None else []
    words += ["--limit", f"{setting.limit or 0:g}"] if setting.limit != LIMIT else []
    return shlex.join(words)
