"""A stream to capture CUDA graphs on, that nobody else has."""

from __future__ import annotations

import ctypes
import sys
import warnings

import torch

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the default stream, nor that one for it


def own_stream(device: torch.device) -> torch.cuda.Stream:
    """A new stream on a GPU, for captures alone.

    PyTorch keeps cuBLAS's workspace by stream, and hands out the same 32 streams in turn. A product that is
    captured on one of those has the address of a workspace in it that others can free: a run ahead of the
    capture has put it into memory that belongs to no graph, and whoever clears PyTorch's workspaces
    (Inductor, before it records) or drops a graph captured on the same stream gives that memory away, while
    the graph goes on writing there. See https://github.com/pytorch/pytorch/issues/193402. On a stream of its
    own, on which nothing runs but captures into one pool of memory, the workspace lies in that pool, which
    lives as long as its graphs.

    It is never destroyed: PyTorch remembers workspaces by the number that the driver gave it.

    Args:
        device: a GPU, the current one.
    """
    stream = ctypes.c_void_p()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        failed = driver.cuStreamCreate(ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
    except (OSError, AttributeError) as error:
        failed = error
    if failed or stream.value is None:
        warnings.warn(
            f"the driver gives no stream ({failed}): a CUDA graph shares one of PyTorch's, and its cuBLAS"
            " workspace with every other graph of that stream",
            RuntimeWarning,
            stacklevel=2,
        )
        return torch.cuda.Stream(device)
    return torch.cuda.ExternalStream(stream.value, device)
