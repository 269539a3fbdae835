"""Equal to the bit: one way to say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_optim.specs.same_bits import same

NAN = float("nan")
OTHER_NAN = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
ALIKE: list[tuple[Any, Any]] = [
    (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN])),
    (torch.tensor([NAN]), OTHER_NAN),
    (torch.ones(2, 3).T, torch.ones(3, 2)),
    (torch.empty(0), torch.empty(0)),
    (torch.tensor(True), torch.tensor(True)),
    ([1, {"a": NAN}], [1, {"a": NAN}]),
    ((1, None), (1, None)),
    (-0.0, -0.0),
]
APART: list[tuple[Any, Any]] = [
    (torch.tensor([0.0, NAN]), torch.tensor([-0.0, NAN])),
    (torch.tensor([1.0, NAN]), torch.tensor([NAN, 1.0])),
    (torch.ones(2), torch.ones(2, dtype=torch.float64)),
    (torch.ones(2), torch.ones(1, 2)),
    (torch.tensor([1], dtype=torch.int8), torch.tensor([2], dtype=torch.int8)),
    (torch.ones(1, dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)),
    (torch.ones(1), 1.0),
    (0.0, -0.0),
    (1, 1.0),
    (True, 1),
    ([1], (1,)),
    ({"a": 1}, {"a": 1, "b": 1}),
]


@pytest.mark.parametrize("pair", ALIKE, ids=str)
def test_alike(pair: tuple[Any, Any]) -> None:
    assert same(*pair)


@pytest.mark.parametrize("pair", APART, ids=str)
def test_apart(pair: tuple[Any, Any]) -> None:
    assert not same(*pair) and not same(*reversed(pair))
