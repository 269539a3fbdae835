"""What differs between two checkpoints: values, and every element of every tensor, whoever wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_optim.checkpoint.in_and_out.folder import Folder
from dist_optim.checkpoint.in_and_out.upstream_file import load_plain
from dist_optim.checkpoint.in_and_out.weights import LogicalWeights, Weights
from dist_optim.checkpoint.index import StoredTensor
from dist_optim.specs.same_bits import same

__all__ = ["Difference", "differences"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same."""

    what: str
    here: str = ""
    there: str = ""
    largest: float | None = None
    """Of tensors with equal shapes: the largest absolute difference of two elements; not a number where one is none."""


def differences(here: Folder, there: Folder) -> list[Difference]:
    """All of them; no more than a few tensors are held at a time.

    The number of ranks, and what each of them gave as its own, do not count: neither is of the trajectory.
    """
    tensors = [LogicalWeights(folder.optimizer / "tensors") for folder in (here, there)]
    return [
        *_of_values(_values_of(here), _values_of(there)),
        *_of_values(_schedule_of(here), _schedule_of(there)),
        *_of_tensors("", tensors[0], tensors[1]),
        *_of_weights(here.weights, there.weights),
    ]


def _values_of(folder: Folder) -> dict[str, Any]:
    """Everything of the record that says how it goes on, by a path."""
    record = folder.record
    values: dict[str, Any] = {key: record.get(key) for key in ("optimizer", "num_steps", "mode", "counters", "extras")}
    for at, group in enumerate(record["param_groups"]):
        values |= {f"param_groups[{at}].{key}": value for key, value in group.items()}
    for name, own in record["scalars"].items():
        values |= {f"state/{name}/{key}": value for key, value in own.items()}
    values |= {f"memory order of {name}": order for name, order in record["memory_orders"].items()}
    return values


def _schedule_of(folder: Folder) -> dict[str, Any]:
    found = next((one for one in (folder.path / "scheduler.pt", folder.path / "scheduler.bin") if one.is_file()), None)
    content = None if found is None else load_plain(found)
    items = content.items() if isinstance(content, dict) else []
    return {f"schedule.{key}": value for key, value in items}


def _of_values(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[Difference]:
    for key in list(dict.fromkeys([*here, *there])):
        if not same(here.get(key), there.get(key)):
            yield Difference(key, _text(here.get(key)), _text(there.get(key)))


def _of_weights(here: Weights | None, there: Weights | None) -> Iterator[Difference]:
    if here is not None and there is not None:
        yield from _of_tensors("model/", here, there)
    elif here is not there:
        yield Difference("model", "none" if here is None else "weights", "none" if there is None else "weights")


def _of_tensors(prefix: str, here: Weights, there: Weights) -> Iterator[Difference]:
    both = []
    for name in list(dict.fromkeys([*here.stored, *there.stored])):
        own, other = here.stored.get(name), there.stored.get(name)
        if own == other:
            both.append(name)
            continue
        yield Difference(prefix + name, _described(own), _described(other))
    for (name, mine), (_, theirs) in zip(here.read(both), there.read(both), strict=True):
        largest = _largest(mine, theirs)
        if largest is not None:
            yield Difference(prefix + name, largest=largest)


def _described(one: StoredTensor | None) -> str:
    return "none" if one is None else f"{one.dtype} {tuple(one.shape)}"


def _largest(here: Tensor, there: Tensor) -> float | None:
    """None where they are equal to the bit; 0 where signs of zeros are all that differs."""
    if same(here, there):
        return None
    apart = (here.double() - there.double()).abs()
    return math.nan if bool(apart.isnan().any()) else float(apart.max())


def _text(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
