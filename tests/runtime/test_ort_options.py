"""What a user says about sessions of ONNX Runtime reaches them, and nonsense does not."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest
import torch

import graphopt
from graphopt import OrtOptions, Target
from graphopt.errors import InputError, LoweringError, TargetError
from graphopt.runtime.executors.ort import OrtProgram
from graphopt.runtime.executors.ort.providers import CPU, Provider
from graphopt.runtime.executors.ort.session import session_options
from tests._models import MLP, randn, randomised

HOST = torch.device("cpu")
X = randn(4, 8)


def opened(options: OrtOptions) -> Any:
    """The options of the session that a model ends in, as ONNX Runtime has them."""
    opt = graphopt.optimize(
        randomised(MLP()), (X,), target=Target(HOST, ort=options), executors=("ort",), effort="fast"
    )
    (step,) = opt.plan.steps
    assert isinstance(step.program, OrtProgram)
    return step.program._session._session.get_session_options()


def test_options_reach_the_session_that_runs_the_model() -> None:
    found = opened(
        OrtOptions(
            intra_op_threads=3,
            inter_op_threads=2,
            graph_optimization="basic",
            arena=False,
            session_config={"session.intra_op.allow_spinning": False},
        )
    )
    assert (found.intra_op_num_threads, found.inter_op_num_threads) == (3, 2)
    assert found.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
    assert found.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert found.enable_cpu_mem_arena is False
    assert found.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_without_options_a_session_has_as_many_threads_as_pytorch() -> None:
    found = session_options(Provider(CPU), OrtOptions())
    assert found.intra_op_num_threads == torch.get_num_threads()
    assert found.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert found.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert found.get_session_config_entry("session.force_spinning_stop") == "1"


def test_an_entry_of_the_users_own_wins() -> None:
    found = session_options(Provider(CPU), OrtOptions(session_config={"session.force_spinning_stop": False}))
    assert found.get_session_config_entry("session.force_spinning_stop") == "0"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"intra_op_threads": 0}, r"intra_op_threads=0 is no number of threads\s+try: 1 or more"),
        ({"intra_op_threads": True}, "intra_op_threads=True is no number"),
        ({"intra_op_threads": 2.5}, "intra_op_threads=2.5 is no number"),
        ({"inter_op_threads": -1}, "inter_op_threads=-1 is no number"),
        ({"inter_op_threads": None}, "inter_op_threads=None is no number"),
        ({"graph_optimization": "most"}, r"'most' is unknown\s+try: one of: none, basic, extended, all"),
        ({"arena": "yes"}, "arena='yes' is neither True nor False"),
        ({"provider": ""}, "provider='' is no name"),
        ({"provider": 3}, "provider=3 is no name"),
        ({"provider_options": ["device_id"]}, "provider_options is list, not a mapping"),
        ({"provider_options": {"device_id": None}}, "provider_options holds 'device_id': None"),
        ({"session_config": {1: "1"}}, "session_config holds 1: '1'"),
    ],
)
def test_nonsense_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        OrtOptions(**given)


def test_values_become_what_onnx_runtime_takes() -> None:
    options = OrtOptions(provider_options={"a": True, "b": 7, "c": "text", "d": 0.5})
    assert options.provider_options == {"a": "1", "b": "7", "c": "text", "d": "0.5"}
    assert hash(options) == hash(OrtOptions())  # a Target may be a key


def test_an_entry_that_onnx_runtime_refuses_is_a_named_error() -> None:
    with pytest.raises(LoweringError, match=r"ONNX Runtime refuses k{2000}"):
        session_options(Provider(CPU), OrtOptions(session_config={"k" * 2000: "1"}))


def test_a_provider_that_the_build_does_not_have_is_a_named_error() -> None:
    target = Target(HOST, ort=OrtOptions(provider="abacus"))
    with pytest.raises(TargetError, match=r"has no provider 'abacus'.*one of: cpu"):
        graphopt.optimize(randomised(MLP()), (X,), target=target, executors=("ort",))
    opt = graphopt.optimize(randomised(MLP()), (X,), target=target, executors=("ort", "eager"), effort="fast")
    assert {row["executor"] for row in opt.report.plan} == {"eager"}
    (said,) = (row.reason for row in opt.report.remarks if row.pass_name == "candidates")
    assert said.startswith("ort is no candidate: ")
