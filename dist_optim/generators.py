"""The global random generators that code may draw from: Python's, numpy's where it is loaded, and torch's."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Generators",
    "digest_of_generators",
    "generators_kept",
    "read_generators",
    "seed_generators",
    "write_generators",
]

Generators = dict[str, Any]
"""What each generator goes on from: plain values that compare, and mean the same on another rank."""

_CURRENT = "the current one"


def read_generators(*, of_every_device: bool = True) -> Generators:
    """What the generators of this process go on from.

    Args:
        of_every_device: Each GPU's by its number; otherwise the current GPU's alone, to be written on another rank,
            whose GPU has another number.
    """
    numpy = sys.modules.get("numpy")
    states: Generators = {"python": random.getstate(), "torch": _bytes(torch.get_rng_state())}
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = (kind, keys.tobytes(), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        devices: Sequence[int | str] = range(torch.cuda.device_count()) if of_every_device else [_CURRENT]
        states["cuda"] = {one: _bytes(torch.cuda.get_rng_state(_number(one))) for one in devices}
    return states


def write_generators(states: Generators) -> None:
    """Let the generators of this process go on from what ``read_generators`` returned, here or on another rank."""
    random.setstate(states["python"])
    torch.set_rng_state(_tensor(states["torch"]))
    if "numpy" in states:
        import numpy

        kind, keys, *rest = states["numpy"]
        numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
    if "cuda" in states and torch.cuda.is_initialized():
        for one, state in states["cuda"].items():
            torch.cuda.set_rng_state(_tensor(state), _number(one))


def digest_of_generators(states: Generators) -> str:
    """The same for two that go on alike; short enough to be sent at every step."""
    return hashlib.blake2b(repr(sorted(states.items())).encode(), digest_size=16).hexdigest()


def seed_generators(number: int) -> None:
    """Let all of them go on from a number."""
    random.seed(number)
    torch.manual_seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn inside, the generators go on afterwards as if nothing had been."""
    before = read_generators()
    try:
        yield
    finally:
        write_generators(before)


def _number(device: int | str) -> int:
    return torch.cuda.current_device() if device == _CURRENT else int(device)


def _bytes(state: Tensor) -> bytes:
    return state.numpy().tobytes()


def _tensor(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
