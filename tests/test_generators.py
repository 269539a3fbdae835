"""The global random generators: read, written, seeded, and left alone by what is tried aside."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_classes import DrawsNoise
from every_name import SERVED, options_of
from placements import place
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import dist_optim
from dist_optim.generators import (
    digest_of_generators,
    generators_kept,
    read_generators,
    seed_generators,
    write_generators,
)
from dist_optim.testing import RankPool


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(()).item()


def test_what_was_read_goes_on_alike_on_another_rank() -> None:
    states = pickle.loads(pickle.dumps(read_generators(of_every_device=False)))
    drawn = draw()
    after = read_generators()
    assert after != states and digest_of_generators(after) != digest_of_generators(states)
    write_generators(states)
    assert draw() == drawn
    assert read_generators() == after and digest_of_generators(read_generators()) == digest_of_generators(after)


@pytest.mark.parametrize("moved", [random.random, np.random.random, lambda: torch.rand(())])
def test_each_generator_is_looked_at_and_put_back(moved: object) -> None:
    assert callable(moved)
    before = read_generators()
    with generators_kept():
        moved()
        assert read_generators() != before
    assert read_generators() == before


def test_a_seed_is_for_all_of_them() -> None:
    seed_generators(3)
    drawn = draw()
    seed_generators(3)
    assert draw() == drawn


def test_numpy_prints_its_state_shortened_and_the_digest_does_not() -> None:
    with np.printoptions(threshold=10), generators_kept():
        seed_generators(0)
        states = read_generators()
        kind, keys, *rest = states["numpy"]
        other = states | {"numpy": (kind, keys[:1000] + bytes([keys[1000] ^ 1]) + keys[1001:], *rest)}
        assert digest_of_generators(other) != digest_of_generators(states)


def generators_after_a_look(name: str) -> bool:
    model = nn.Linear(6, 5)
    choice = name if name in dist_optim.names() else DrawsNoise
    optimizer = dist_optim.build_optimizer(model, choice, lr=1e-2, print_audit=False)
    before = read_generators()
    get_optimizer_state_dict(model, optimizer)  # before the first step: a step is taken aside
    return read_generators() == before


@pytest.mark.parametrize("name", ["kron", "DrawsNoise"])
def test_state_before_the_first_step_draws_nothing(two_ranks: RankPool, name: str) -> None:
    assert two_ranks.run(generators_after_a_look, name) == [True, True]


DRAWING = {"kron": {"step"}}
"""Whose upstream class draws, and where."""


def who_draws(names: list[str], folder: Path) -> list[str]:
    """What of building, stepping, clipping, saving and loading moves a generator: a model's dropout would see it."""
    torch.compiler.set_stance("force_eager")
    found: dict[str, set[str]] = {}
    for name in names:
        model = place(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), "ddp")

        def watched(what: str, act: Callable[[], Any], name: str = name) -> Any:
            before = read_generators()
            result = act()
            if read_generators() != before:
                found.setdefault(name, set()).add(what)
            return result

        built = partial(dist_optim.build_optimizer, model, name, lr=1e-2, fused_backward=None, print_audit=False)
        optimizer = watched("build", partial(built, **options_of(name)))
        for _ in range(2):
            model(torch.ones(2, 6)).square().mean().backward()
            if optimizer.inside_backward is None:
                watched("clip", partial(optimizer.clip_grad_norm_, 1.0))
            watched("step", optimizer.step)
            optimizer.zero_grad()
        watched("save", partial(dist_optim.save_checkpoint, folder / name, model, optimizer))
        watched("load", partial(dist_optim.load_checkpoint, folder / name, model, optimizer))
        watched("load_state_dict", partial(optimizer.load_state_dict, watched("state_dict", optimizer.state_dict)))
    return [f"{name} in {sorted(calls)}" for name, calls in found.items() if calls != DRAWING.get(name)]


def test_nothing_draws_but_what_upstream_draws(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(who_draws, SERVED, tmp_path) == [[], []]
