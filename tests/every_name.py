"""Every name that is served, and what it needs to run on a small model without CUDA."""

from __future__ import annotations

from typing import Any

import dist_optim

__all__ = ["SERVED", "options_of"]

SERVED = [name for name in dist_optim.names() if not dist_optim.get_spec(name).refusal]


def options_of(name: str) -> dict[str, Any]:
    if name.startswith("flash_"):
        return {"quantize": False, "fused": False, "master_weight_bits": None}
    is_low_rank = dist_optim.Trait.LOW_RANK in dist_optim.get_spec(name).traits
    return {"target_modules": "all-linear", "rank": 2} if is_low_rank else {}
