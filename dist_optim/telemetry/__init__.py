"""What the optimizer does in a step, measured where it is asked for: for whoever logs it."""

from dist_optim.telemetry.observer import Observer

__all__ = ["Observer"]
