"""Every optimizer on one rank and this device, as tests/parity.py compares it: the same bits as upstream's there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from fused import fused_gaps
from fused_cases import FUSED_CASES
from parity import Case, run_gaps

from measuring.on_gpu.rows import Items, Settings, Skipped
from measuring.on_gpu.sides import cases_on, join_alone, kernel_cases, one_case_a_name

__all__ = ["compared", "items"]

PLACEMENTS = ("none", "fsdp2")
BUCKET_BYTES = 6000
QUICK = ("adamw_torch", "galore_adamw", "lomo", "adamw_bnb_8bit")


def items(settings: Settings) -> Items:
    """One case of each optimizer, FlashOptim's kernels, and cases inside backward; then all others."""
    first = one_case_a_name(settings)
    most = 1 if settings.is_quick else None
    cases = [case for name, case in first.items() if name in QUICK or not settings.is_quick]
    found: dict[str, Any] = {str(case): partial(compared, case, settings) for case in cases}
    try:
        found |= {str(case): partial(with_kernels, case, settings) for case in kernel_cases(settings)[:most]}
    except ImportError as error:
        found["FlashOptim's kernels"] = partial(skipped, str(error))
    found |= {str(case): partial(compared, case, settings, inside_backward=True) for case in FUSED_CASES[:most]}
    rest = [] if settings.is_quick else cases_on(settings)
    return found | {str(case): partial(compared, case, settings) for case in rest if str(case) not in found}


def skipped(reason: str) -> dict[str, Any]:
    raise Skipped(reason)


def with_kernels(case: Case, settings: Settings) -> dict[str, Any]:
    if settings.device != "cuda":
        raise Skipped("FlashOptim's kernels need a GPU")
    return compared(case, settings)


def compared(case: Case, settings: Settings, inside_backward: bool = False) -> dict[str, Any]:
    """The largest difference of any weight after any step, relative to the largest weight.

    Raises:
        AssertionError: It is more than the case allows.
    """
    join_alone(settings)
    case = replace(case, device=settings.device)
    largest = 0.0
    for placement in PLACEMENTS[: 1 if settings.is_quick else None]:
        run = fused_gaps if inside_backward else run_gaps
        for gap in run(case, placement, bucket_bytes=BUCKET_BYTES):
            if not gap.relative <= case.tolerance:
                raise AssertionError(f"{placement}: {gap}")
            largest = max(largest, gap.relative)
    return {"largest": largest}
