"""What rows say together: no mean without its worst case, no loss unsaid."""

from __future__ import annotations

import pytest
from rich.console import Console

from graphopt.bench import summary, table
from graphopt.bench.setting import Case
from graphopt.bench.side import Side
from tests.bench._rows import failing, row

ONE, TWO, THREE = (Case("zoo:block", {"batch": batch}) for batch in (1, 8, 32))
ROWS = [
    row(ONE, 1.0, {"eager": 4.0, "inductor (default)": 3.0, "inductor (max-autotune)": 2.0}),
    row(TWO, 1.0, {"eager": 1.0, "inductor (default)": 0.5, "inductor (max-autotune)": 0.8}, cold=True),
    failing(THREE, "no kernel for it"),
]


def test_the_mean_is_geometric_and_the_worst_is_named() -> None:
    eager, inductor = summary.against(ROWS)
    assert (eager.peer, eager.cases) == ("eager", 2)
    assert eager.mean == pytest.approx(2.0, rel=0.02)
    assert eager.verdicts == {"faster": 1, "level": 1, "slower": 0}
    assert (inductor.worst_case, inductor.worst) == (TWO.name, pytest.approx(0.5, rel=0.02))
    assert inductor.mean == pytest.approx(1.0, rel=0.02)  # of 2 and 1/2: the best mode of each case
    assert inductor.verdicts == {"faster": 1, "level": 0, "slower": 1}


def test_the_best_mode_counts() -> None:
    assert [row["ratio"]["inductor"]["mode"] for row in ROWS[:2]] == ["max-autotune", "default"]
    counted = [(side["peer"], side["mode"]) for side in ROWS[0]["sides"] if side["counts"]]
    assert counted == [("graphopt", "ort"), ("eager", ""), ("inductor", "max-autotune")]


def test_every_loss_is_listed_with_its_command() -> None:
    warm, cold, failed = summary.losses(ROWS)
    assert (warm.case, warm.peer) == (TWO.name, "inductor")
    assert "takes 2.0" in warm.reason
    assert "--against inductor --batch 8" in warm.command
    assert "cold L2" in cold.reason
    assert failed.reason == "not measured: no kernel for it"


def test_graphopt_being_wrong_is_a_loss() -> None:
    wrong = row(ONE, 1.0, {})
    wrong["sides"][0] = {**wrong["sides"][0], "wrong": "error 3e-01", "counts": False}
    (loss,) = summary.losses([wrong])
    assert loss.reason == "graphopt is wrong: error 3e-01"


def test_what_is_wrong_or_fails_is_left_out_and_said() -> None:
    broken = (Side("openvino", "", wrong="error 1e-02"), Side("inductor", "default", failed="no compiler"))
    found = row(ONE, 1.0, {"eager": 2.0}, broken=broken)
    assert [peer.peer for peer in summary.against([found])] == ["eager"]
    assert summary.excluded([found]) == [
        (ONE.name, "openvino", "wrong: error 1e-02"),
        (ONE.name, "inductor, default", "failed: no compiler"),
    ]
    titles = dict(table.closing([found]))
    assert titles["Not counted"] == [
        f"{ONE.name}: openvino: wrong: error 1e-02",
        f"{ONE.name}: inductor, default: failed: no compiler",
    ]
    assert titles["Missing peers"] == ["tensorrt: needs a CUDA GPU; pip install torch-tensorrt"]
    assert "Lost" not in titles


def test_the_tables_say_all_of_it() -> None:
    console = Console(width=160)
    with console.capture() as capture:
        table.show(ROWS, console)
    said = capture.get()
    for words in (
        "geometric mean",
        "zoo:block batch=8",
        "faster",
        "slower",
        "level",
        "Lost",
        "cold L2",
        "2.00x",
    ):
        assert words in said
    assert "No case was lost" not in said
    with console.capture() as capture:
        table.show(ROWS[:1], console)
    assert "No case was lost." in capture.get()


def test_one_line_a_case() -> None:
    assert table.told(ROWS[2]) == "zoo:block batch=32: not measured: no kernel for it"
    assert table.told(ROWS[0]).startswith("zoo:block batch=1: 1.0")
    assert "inductor 2.0" in table.told(ROWS[0])


def test_a_noisy_case_claims_nothing() -> None:
    noisy = row(ONE, 1.0, {"eager": 1.15}, spread=0.9)
    assert noisy["ratio"]["eager"]["verdict"] == "level"
    assert noisy["noise"]["floor"] > 0.15
