"""Fixtures of several files here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def one_kernel_alone() -> Iterator[None]:
    """What Inductor compiles to be faster later, headers and probes of the processor, is left out."""
    import torch._inductor.config

    with torch._inductor.config.patch({"cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": True}):
        yield
