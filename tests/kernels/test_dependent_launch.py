"""Dependent launches: what makes a kernel read weights early, and that a broken rule is found in its code.

That every kernel keeps the rules is in ``test_compiled.py``, which compiles them all.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graphopt.kernels
from graphopt.kernels import _linear_gluon, _triton
from graphopt.kernels._compile import Compiled, Usage
from graphopt.kernels._triton import dependence, launch, prefetched_weights, recorded_launches
from tests.kernels._dependence import hazards

GPU = torch.device("cuda", 0)

# What launches


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched as on an H100, compiled."""
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "capability", lambda device: (9, 0))


@pytest.mark.usefixtures("hopper")
def test_weights_are_read_early_only_where_an_executor_vouches_for_them() -> None:
    weight, bias = torch.randn(2, 8), torch.randn(8)
    assert dependence(GPU, [weight]) == 1
    with prefetched_weights([weight, bias]):
        assert dependence(GPU, [weight, bias]) == 2
        assert dependence(GPU, [weight[1], bias[2:]]) == 2  # views of them
        assert dependence(GPU, []) == 2
    assert dependence(GPU, [weight]) == 1


@pytest.mark.usefixtures("hopper")
def test_what_a_node_or_a_launcher_has_made_is_not_read_early() -> None:
    weight, bias = torch.randn(2, 8), torch.randn(8)
    with prefetched_weights([weight, bias]):
        assert dependence(GPU, [weight[0] + 1, bias]) == 1
        assert dependence(GPU, [weight[:, 0].contiguous()]) == 1  # a copy that may be on its way


def test_older_gpus_and_the_interpreter_have_no_dependent_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    with prefetched_weights([]):
        monkeypatch.setattr(_triton, "INTERPRETED", False)
        monkeypatch.setattr(_triton, "capability", lambda device: (8, 9))
        assert dependence(GPU, []) == 0
        monkeypatch.setattr(_triton, "capability", lambda device: (9, 0))
        monkeypatch.setattr(_triton, "INTERPRETED", True)
        assert dependence(GPU, []) == 0


def test_a_recorded_launch_knows_what_is_read_early() -> None:
    x, weight = torch.randn(8), torch.randn(8)
    with recorded_launches() as launches:
        launch(None, (1,), x, weight, None, early=(weight, None))
    assert len(launches[0].early) == 1
    assert launches[0].early[0] is weight


# What kernels are written like


def kernels() -> Iterator[Any]:
    """The functions, as syntax, that take PDL and are started by a launcher."""
    for found in pkgutil.iter_modules(graphopt.kernels.__path__):
        path = importlib.import_module(f"graphopt.kernels.{found.name}").__file__
        for node in ast.parse(Path(str(path)).read_text()).body:
            roles = "warp_specialize" in ast.unparse(node)
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and not roles:
                yield pytest.param(node, id=node.name)


@pytest.mark.parametrize("kernel", list(kernels()))
def test_a_kernel_waits_first_and_on_every_path(kernel: ast.FunctionDef) -> None:
    """``wait_for_all`` is its first statement; ``wait_for_inputs`` stands once, in no branch and no loop."""
    assert kernel.args.args[-1].arg == "PDL"
    statements = statements_of(kernel)
    assert statements[0] == "wait_for_all(PDL)"
    assert statements.count("wait_for_inputs(PDL)") == 1
    assert ast.unparse(kernel).count("wait_for_") == 2
    assert not any(isinstance(node, ast.Return) for node in ast.walk(kernel))


def statements_of(function: ast.FunctionDef) -> list[str]:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return [ast.unparse(statement) for statement in body]


def test_every_role_waits_by_itself() -> None:
    """What Gluon's kernel calls for all warps waits for nothing but all; each role for its inputs, once."""
    functions = {
        node.name: node
        for node in ast.parse(Path(str(_linear_gluon.__file__)).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    kernel = functions["_linear_gluon_kernel"]
    assert statements_of(kernel)[0] == "wait_for_all(PDL)"
    assert ast.unparse(kernel).count("wait_for_") == 1
    for role in ("_ask", "_multiply"):
        assert f"({role}, " in ast.unparse(kernel)
        assert statements_of(functions[role]).count("wait_for_inputs(PDL)") == 1
        assert ast.unparse(functions[role]).count("wait_for_") == 1


# What is found in code

HEAD = """
.visible .entry _kernel(
	.param .u64 .ptr .global .align 1 _kernel_param_0,
	.param .u64 .ptr .global .align 1 _kernel_param_1,
	.param .u32 _kernel_param_2
)
{
	ld.param.b64 	%rd1, [_kernel_param_0];
	ld.param.b64 	%rd2, [_kernel_param_1];
	ld.param.b32 	%r9, [_kernel_param_2];
	mul.wide.s32 	%rd3, %r9, 2;
	add.s64 	%rd4, %rd2, %rd3;
"""
WEIGHT = "	@%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd4 + 0 ];\n"
WAIT = "	griddepcontrol.wait ;\n"
REST = "	ld.global.b32 	%r3, [%rd1];\n	st.global.b32 	[%rd1], %r3;\n	ret;\n}\n"
SASS = """
        /*0010*/    LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0020*/    ACQBULK ;
        /*0030*/    STG.E desc[UR4][R2.64], R5 ;
        /*0040*/    EXIT ;
"""


def found(ptx: str, monkeypatch: pytest.MonkeyPatch, sass: str = SASS) -> list[str]:
    monkeypatch.setattr(Compiled, "sass", lambda self: sass)
    return hazards(Compiled(Usage(0, 32, 8, 0, 0), HEAD + ptx, b"", early=(1,)))


def test_code_that_keeps_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(WEIGHT + WAIT + REST, monkeypatch) == []


@pytest.mark.parametrize(
    ("ptx", "said"),
    [
        (WEIGHT + REST, "the kernel never waits"),
        (WEIGHT + "	ld.global.b32 %r4, [%rd1];\n" + WAIT + REST, "reads parameters [0] before"),
        ("	cp.async.cg.shared.global [%r4], [%rd1], 16;\n" + WAIT + REST, "reads parameters [0] before"),
        (WEIGHT + "	st.global.b32 [%rd4], %r1;\n" + WAIT + REST, "before the wait: st.global"),
        (WEIGHT + "	atom.global.add.u32 %r4, [%rd1], 1;\n" + WAIT + REST, "before the wait: atom"),
        (
            "	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd4];\n"
            + WAIT
            + REST,
            "before the wait: cp.async.bulk",
        ),
        (WEIGHT + "	@%p1 bra $L1;\n" + WAIT + "$L1:\n" + REST, "a way round the wait"),
        (WEIGHT + "	@%p1 ret;\n" + WAIT + REST, "an end before the wait"),
        (WEIGHT + "$L1:\n" + WAIT + "	@%p1 bra $L1;\n" + REST, "a loop around the wait"),
        (WEIGHT + "	@%p1 griddepcontrol.wait ;\n" + REST, "not every thread waits"),
        (
            WEIGHT + WAIT + "	cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1], [%r3];\n"
            + REST,
            "no wait for cp.async.bulk",
        ),
    ],
)  # fmt: skip
def test_a_broken_rule_is_found(ptx: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hazard, *_ = found(ptx, monkeypatch, SASS.replace("LDG", "MOV"))
    assert hazard.startswith(said)


# Warps with roles: these go on, the others are sent to one that asks for weights, waits, and asks for rows
PARTING = "	@%p1 bra $L1;\n	setmaxnreg.inc.sync.aligned.u32 240;\n"
GO_ON = WAIT + "	st.global.b32 [%rd1], %r3;\n	bra.uni $L4;\n"
SENT = "$L1:\n	$L_brx_0: .branchtargets\n		$L2,\n		$L4;\n	brx.idx %r3, $L_brx_0;\n$L2:\n"
MOVE = "	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1], [{}, {{%r2}}], [%r4];\n"
WEIGHTS, ROWS = MOVE.format("%rd2"), MOVE.format("%rd1")
HOME = "	bra.uni $L1;\n$L4:\n	ret;\n}\n"
TWO_WAITS = SASS + "        /*0050*/    ACQBULK ;\n"


def test_roles_that_keep_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    ptx = PARTING + GO_ON + SENT + WEIGHTS + WAIT + ROWS + HOME
    assert found(ptx, monkeypatch, TWO_WAITS) == []


@pytest.mark.parametrize(
    ("ptx", "said"),
    [
        (PARTING + GO_ON + SENT + WEIGHTS + ROWS + WAIT + HOME, "before the wait: cp.async.bulk"),
        (
            PARTING + GO_ON + SENT + "	@%p2 bra $L5;\n" + WAIT + "$L5:\n" + ROWS + HOME,
            "before the wait: cp",
        ),
        (PARTING + REST[:-7] + GO_ON + SENT + WAIT + ROWS + HOME, "before the wait: ld.global"),
        (PARTING + "	@%p2 ret;\n" + GO_ON + SENT + WAIT + ROWS + HOME, "an end before the wait"),
        (PARTING + GO_ON + SENT + "	@%p3" + WAIT + ROWS + HOME, "not every thread waits"),
    ],
)
def test_a_rule_that_a_role_breaks_is_found(ptx: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hazard, *_ = found(ptx, monkeypatch, TWO_WAITS)
    assert hazard.startswith(said)


def test_a_wait_that_ptxas_leaves_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (hazard,) = found(PARTING + GO_ON + SENT + WEIGHTS + WAIT + ROWS + HOME, monkeypatch, SASS)
    assert hazard == "the machine code waits 1 times, PTX 2 times"


@pytest.mark.parametrize(
    ("sass", "said"),
    [
        (SASS.replace("ACQBULK", "NOP"), "the machine code never waits"),
        (SASS.replace("/*0020*/", "/*0018*/    LDG.E R6 ;\n        /*0020*/"), "machine code reads 2 times"),
        (SASS.replace("LDG.E.64", "LDGSTS.E"), "machine code before the wait: "),
        (SASS.replace("/*0020*/", "/*0018*/    @P0 EXIT ;\n        /*0020*/"), "machine code ends early"),
    ],
)
def test_what_ptxas_moves_is_found(sass: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (hazard,) = found(WEIGHT + WAIT + REST, monkeypatch, sass)
    assert hazard.startswith(said)
