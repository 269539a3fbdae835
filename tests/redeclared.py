"""Bodies for negative controls: an optimizer declared wrongly must fail its parity case."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

from parity import Case, run_case

from dist_optim.specs import registry
from dist_optim.specs.driver import UpstreamDriver
from dist_optim.specs.registry import Trait


def run_with_spec(case: Case, placement: str, changes: dict[str, Any], **options: Any) -> list[str]:
    """The case's problems when its optimizer's spec has these fields instead of its own."""
    spec = dataclasses.replace(registry.get_spec(case.name), **changes)
    with mock.patch.dict(registry._specs, {case.name: spec}):
        return run_case(case, placement, **options)


def run_on_local_slices(case: Case, placement: str) -> list[str]:
    """The case's problems when every rank steps its own slices: statistics are then those of slices."""
    return run_with_spec(case, placement, {"traits": frozenset({Trait.ELEMENTWISE})})


def run_with_empty_steps_left_out(case: Case, placement: str, **options: Any) -> list[str]:
    """The case's problems when an instance without a tensor to step does not step: its group counters lag."""

    def step(self: UpstreamDriver, optimizer: Any, parameters: list[Any]) -> None:
        if parameters:
            optimizer.step()

    with mock.patch.object(UpstreamDriver, "step", step):
        return run_case(case, placement, **options)
