"""What every test stands on: no downloads, reproducible draws, and markers that say why a test is skipped."""

from __future__ import annotations

import os

# Set before transformers is imported: a test's model comes from a package or is made there, never from a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: kernels are then made for its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA GPU"
    if not config.getoption("--slow"):
        reasons["slow"] = "slow: run with --slow"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same random tensors, alone or among others, in any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _without_openvino(request: pytest.FixtureRequest) -> Iterator[None]:
    """OpenVINO is no candidate by itself but in tests marked so: a second a model, a thousand times over."""
    with pytest.MonkeyPatch.context() as patch:
        if "openvino" not in request.keywords:
            patch.setattr("graphopt.runtime.executors.openvino_is_installed", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _unsettled() -> Iterator[None]:
    """What is timed in tests does not wait for others' threads to come to rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphopt.runtime.rounds._SETTLING_MS", 0.0)
        yield


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """What a test sets for its process, the next does not find: a benchmark's threads, for one."""
    own = torch.get_num_threads()
    yield
    torch.set_num_threads(own)
