"""What ranks run and what they were asked for, compared once: before it can part them."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dist_optim.ranks.agreement import assert_ranks_equal, num_ranks

__all__ = ["COMPARED_PACKAGES", "assert_alike", "described", "version_of"]

COMPARED_PACKAGES = ("dist-optim", "torch", "transformers", "accelerate", "deepspeed")


def assert_alike(
    arguments: Mapping[str, Any],
    process_group: dist.ProcessGroup | None,
    packages: Sequence[str] = (),
) -> None:
    """Compare what ranks run and what they asked for, before anything is planned by it. Collective; once a build.

    Args:
        arguments: By name; what is no plain value is compared by its text, without addresses.
        process_group: The ranks.
        packages: The upstream packages, besides those that are always compared.

    Raises:
        RanksDisagreeError: On all ranks, with the first difference.
    """
    if num_ranks(process_group) == 1:
        return
    versions = [(f"the version of {name}", version_of(name)) for name in dict.fromkeys((*COMPARED_PACKAGES, *packages))]
    assert_ranks_equal(
        "What ranks run, or were asked for, differs",
        [*versions, *((name, described(value)) for name, value in arguments.items())],
        "Start every rank in the same environment, with the same arguments.",
        process_group,
    )


@functools.cache
def version_of(package: str) -> str:
    """Of an installed package; the same word where it is not installed. Read once: its metadata are a long text."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def described(value: Any) -> Any:
    """A value as other ranks would write it: sets in order, tensors by shape, and no addresses."""
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (list, tuple)):
        return [described(one) for one in value]
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}" if value.numel() > 1 or value.is_meta else value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
