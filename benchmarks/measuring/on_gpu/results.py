"""What was measured on a GPU, kept as docs/gpu.json."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from measuring import results

__all__ = ["PAGE", "RESULTS", "GpuResults", "PartResults", "about", "load", "save"]

PAGE = results.DOCS / "gpu.md"
RESULTS = results.DOCS / "gpu.json"
PACKAGES = ("bitsandbytes", "flashoptim", "triton", "torchao", "lomo-optim", "pytorch-optimizer", "prodigyopt")
GpuResults = dict[str, Any]
"""``about``; ``parts``: of each its ``PartResults``."""
PartResults = dict[str, Any]
"""``seconds``; ``rows`` (``rows.Row``)."""


def about(command: str, device: str) -> dict[str, Any]:
    """The machine, its driver, the versions and the command; a GPU that is lost by now has no name."""
    try:
        found = results.about(command, device)
    except RuntimeError:
        found, device = {**results.about(command, "cpu"), "accelerator": "unknown"}, "cpu"
    found["packages"] |= {name: results.version(name) for name in PACKAGES}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["driver"] = driver()
        found["cuda"] = torch.version.cuda
    return found


def driver() -> str:
    """As the driver's own tool says it, else its file."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        if said:
            return said[0]
    with suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return "unknown"


def load() -> GpuResults | None:
    """None where nobody has measured yet."""
    if not RESULTS.exists():
        return None
    loaded: GpuResults = json.loads(RESULTS.read_text())
    return loaded


def save(found: GpuResults, path: Path) -> None:
    """All of it, or nothing."""
    half = path.with_suffix(".part")
    half.write_text(json.dumps(found, indent=1) + "\n")
    half.replace(path)
