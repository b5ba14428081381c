"""Where something was measured: the processor, and the commit of the work tree."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def cpu_name() -> str:
    """The processor as Linux names it; elsewhere as Python does."""
    known = Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.is_file() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def commit(folder: Path) -> str:
    """The commit that a folder is at, with a mark when the tree differs from it; "unknown" outside git."""
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
        changed = subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changed.strip() else "")
