"""The parity body on the ranks and devices of this run: equal to upstream on the same device, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import galore, schedulefree, torch_native
from parity import Case, run_case

from dist_optim.testing import assert_no_problems_on_any_rank

CHOSEN = {"galore_adamw std float32", "adamw_torch float32", "schedule_free_adamw float32"}
CASES = [case for family in (galore, schedulefree, torch_native) for case in family.CASES if str(case) in CHOSEN]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("placement", ["none", "ddp", "fsdp2", "fsdp1"])
def test_equals_upstream_on_this_device(case: Case, placement: str, device: torch.device) -> None:
    if placement == "none" and torch.distributed.get_world_size() > 1:
        pytest.skip("a model without an engine belongs to one rank")
    problems = run_case(replace(case, device=device.type), placement, bucket_bytes=6000)
    assert_no_problems_on_any_rank(problems)


def test_the_chosen_cases_exist() -> None:
    assert {str(case) for case in CASES} == CHOSEN
