"""A plug-in that fails, or takes a name that is there, takes no other name with it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import dist_optim
from dist_optim.errors import UnknownOptimizerError
from dist_optim.specs import registry


class Offer:
    """An entry point whose loading gives, or raises, this."""

    value = "somebody.elses:SPECS"

    def __init__(self, name: str, offered: Any) -> None:
        self.name, self.offered = name, offered

    def load(self) -> Any:
        if isinstance(self.offered, Exception):
            raise self.offered
        return self.offered


def spec_named(name: str) -> dist_optim.OptimizerSpec:
    return dist_optim.OptimizerSpec(
        name=name,
        load=dist_optim.UpstreamClass("torch.optim", "SGD"),
        package="torch",
        traits=frozenset({dist_optim.Trait.ELEMENTWISE}),
    )


@pytest.fixture
def unread() -> Iterator[None]:
    """The registry as before its first look at the plug-ins."""
    with (
        mock.patch.dict(registry._specs),
        mock.patch.object(registry, "_entry_points_read", False),
        mock.patch.object(registry, "_broken_plugins", []),
    ):
        yield


@pytest.mark.parametrize(
    "broken",
    [ImportError("no such module"), [spec_named("adamw_torch")], 3],
    ids=["fails", "clashes", "offers a number"],
)
def test_a_broken_plug_in_leaves_all_other_names(unread: None, broken: Any) -> None:
    offers = [Offer("broken", broken), Offer("sound", spec_named("sound_one"))]
    warned = pytest.warns(UserWarning, match="'broken' .somebody.elses:SPECS.: .*Error")
    with mock.patch.object(importlib.metadata, "entry_points", lambda **_: offers), warned:
        assert {"adamw_torch", "sound_one"} <= set(dist_optim.names())
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    dist_optim.build_optimizer(model, "adamw_torch", lr=1e-3, print_audit=False).step()
    with pytest.raises(UnknownOptimizerError, match="Plug-ins that cannot be used: 'broken'"):
        dist_optim.get_spec("broken_one")
