"""This machine, as the rules on the environment see it. Nothing is imported but torch."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_optim.doctor.subject import Environment
from dist_optim.overrides import VERSIONS

__all__ = ["machine"]

GPUS = ("/proc/driver/nvidia/version", "/dev/nvidia0", "/dev/kfd")
"""Files that are there where a GPU is, whatever torch was built for."""
MOUNTS = Path("/proc/mounts")


def machine(output_dir: Any = None) -> Environment:
    """What is installed here, and where the output folder lies.

    Args:
        output_dir: Of the job; None where it is not known.
    """
    return Environment(
        versions=_versions(),
        has_gpu=any(Path(name).exists() for name in GPUS),
        torch_cuda=torch.version.cuda or torch.version.hip,
        sees_gpu=torch.cuda.is_available(),
        has_nccl=dist.is_available() and dist.is_nccl_available(),
        output_disk="" if output_dir is None else _kind_of_disk(Path(output_dir)),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _kind_of_disk(folder: Path) -> str:
    """The file system's kind, as Linux lists it; empty where it does not."""
    try:
        mounts = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
        place = folder.resolve()
    except OSError:
        return ""
    holding = [(point, kind) for point, kind in mounts if place == Path(point) or Path(point) in place.parents]
    return max(holding, key=lambda one: len(one[0]))[1] if holding else ""
