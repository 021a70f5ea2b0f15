"""What the figures of a run depend on beside the code: the machine, Python and the packages."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import psutil


def cpu_model() -> str:
    """As the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """On what, and when."""
    return {
        "Date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "Machine": f"{cpu_model()}, {psutil.cpu_count()} cores",
        "System": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def packages(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
