"""DeepSpeed: our names in its JSON, and one optimizer over the slices that its engine gives out."""

from dist_optim.integrations.deepspeed.engine import (
    UnknownDeepSpeedOptimizerError,
    build_optimizer_for_engine,
    register,
)
from dist_optim.integrations.deepspeed.inside_backward import build_fused_optimizer

__all__ = ["UnknownDeepSpeedOptimizerError", "build_fused_optimizer", "build_optimizer_for_engine", "register"]
