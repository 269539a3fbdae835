"""Where an optimizer's name and arguments are written, and parts of examples."""

from __future__ import annotations

import inspect
from typing import Any

from dist_optim.doctor.finding import TAKE_OUT, Change
from dist_optim.doctor.subject import Subject

__all__ = ["FSDP1", "FSDP2", "ZERO2", "build_options", "flags", "named", "option"]

ZERO2 = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
FSDP = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_processes": 2}
FSDP1, FSDP2 = ({**FSDP, "fsdp_config": {"fsdp_version": version}} for version in (1, 2))


def flags(**arguments: Any) -> dict[str, Any]:
    """An example of a script's flags."""
    return {"arguments": {"output_dir": "out", **arguments}}


def named(subject: Subject, name: str) -> Change:
    """Another name of the optimizer, where the name is written."""
    if not subject.arguments.get("optim") and subject.json_optimizer:
        return Change("deepspeed", ("optimizer", "type"), name)
    return Change("arguments", ("optim",), name)


def option(subject: Subject, key: str, value: Any = TAKE_OUT) -> Change:
    """Another value of one of the optimizer's arguments, where it is written."""
    part, path = subject.optim_args_path(key)
    return Change(part, path, value)  # type: ignore[arg-type]


def build_options() -> set[str]:
    """Keywords of ``build_optimizer`` that are not upstream's."""
    from dist_optim.building.build import build_optimizer

    parameters = inspect.signature(build_optimizer).parameters
    return {*parameters} - {"model", "optimizer", "hyperparameters"}
