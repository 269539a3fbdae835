"""What was measured, kept as docs/performance.json: where, with what, and the figures by cell."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

__all__ = ["PAGE", "RESULTS", "Results", "about", "load", "nothing", "save"]

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "performance.md"
RESULTS = {"cpu": DOCS / "performance.json", "cuda": DOCS / "performance_cuda.json"}
PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "galore-torch",
    "apollo-torch",
    "torch-optimi",
    "schedulefree",
    "grokadamw",
)
Results = dict[str, Any]
"""``about``; ``cells`` and ``shares`` by what was asked; ``scale``, a list."""


def about(command: str, device: str) -> dict[str, Any]:
    """The machine, the versions and the command."""
    return {
        "command": command,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else "none",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    """As the kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def nothing() -> Results:
    """Results before anything was measured."""
    return {"about": {}, "cells": {}, "shares": {}, "scale": []}


def load(device: str = "cpu") -> Results:
    """The committed results; empty ones where there are none."""
    if not RESULTS[device].exists():
        return nothing()
    loaded: Results = json.loads(RESULTS[device].read_text())
    return loaded


def save(results: Results, device: str = "cpu") -> None:
    RESULTS[device].write_text(json.dumps(results, indent=1) + "\n")
