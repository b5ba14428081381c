"""Where something was measured: the processor, and the commit of the work tree."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor as Linux names it; elsewhere as Python does."""
    known = Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.is_file() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def commit(folder: Path) -> str:
    """The commit that a folder is at, with a mark when the tree differs from it; "unknown" outside git.

    ``GRAPHOPT_COMMIT`` names it where the tree was sent without its history, as to a GPU machine.
    """
    if said := os.environ.get("GRAPHOPT_COMMIT"):
        return said
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changed.strip() else "")


def device_name(device: torch.device) -> str:
    """The processor or the GPU, as its maker names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def driver() -> str:
    """The version of NVIDIA's kernel driver; "" where there is none."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word.replace(".", "").isdecimal() and "." in word), "")
