"""The embedding's kernel in every way the tuner may choose: samples have too few rows for that."""

from __future__ import annotations

import pytest
import torch

from graphopt.kernels import _triton
from graphopt.kernels import embedding_layer_norm as module
from graphopt.kernels._tuning import Config

pytestmark = pytest.mark.skipif(
    _triton.triton is None or not _triton.INTERPRETED, reason="in Triton's interpreter"
)


@pytest.mark.parametrize("turns", [1, 2, 4])
@pytest.mark.parametrize("together", [1, 2])
def test_rows_of_several_turns_are_right(turns: int, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """13 rows: the last turn is past the end for some programs."""
    ids, words = torch.randint(50, (1, 13)), torch.randn(50, 24)
    positions, types = torch.randn(16, 24), torch.randn(3, 24)
    rest = torch.arange(13)[None], positions, torch.randint(3, (1, 13)), types
    args = ids, words, *rest, torch.randn(24), torch.randn(24), 1e-12
    config = Config({"BLOCK_R": together, "BLOCK_D": 32, "TURNS": turns}, 1)
    monkeypatch.setattr(module, "choose", lambda *asked: config)
    exact = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    found = module.TRITON.launch(*args)
    torch.testing.assert_close(found.double(), module.OP.reference(*exact), atol=2e-6, rtol=2e-6)


def test_turns_are_offered_where_every_processor_has_programs_left() -> None:
    device = torch.device("cpu")
    few, many = (module._configs(rows, 768, device) for rows in (128, 32 * 128))
    assert {config.tiles["TURNS"] for config in few} == {1}
    assert {config.tiles["TURNS"] for config in many} == {1, 2, 4}
    assert many[0].tiles["TURNS"] == 1
    for config in many:
        programs = -(-32 * 128 // (config.tiles["BLOCK_R"] * config.tiles["TURNS"]))
        assert config.tiles["TURNS"] == 1 or programs >= 4 * _triton.processors(device)
