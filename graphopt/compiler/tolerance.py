"""The one table of tolerances: how much rounding a rewrite may add.

An error is the largest deviation from the float64 reference within a row (the last dimension), relative to
the largest reference value of that row. A rewrite is kept when its error is at most FACTOR times the error
that the original made in its own dtype, and always when it is below the floor, which is counted in units in
the last place (the dtype's machine epsilon): two correct kernels that add in another order differ by that.
Where rounding decides a result, the original's error is that of its runs with values rounded at random: see
``compiler/reference.py``.
"""

from __future__ import annotations

import torch

FACTOR = 2.0
REGION_FLOOR_ULPS = 8.0  # one rewritten region
MODEL_FLOOR_ULPS = 64.0  # a whole model, where the regions' roundings add up


def limit(error_before: float, dtype: torch.dtype, floor_ulps: float) -> float:
    """The largest error that is still accepted, in the same relative units as ``error_before``."""
    eps = torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0
    return max(FACTOR * error_before, floor_ulps * eps)
