"""The Trainer's optimizer under DeepSpeed: what was deferred becomes the client optimizer of the engine.

DeepSpeed needs the optimizer while it places the model. So it is built on the plain model, and finds its slices when
the engine is there (``integrations.deepspeed.optimizer``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_optim.errors import HyperparameterError, UnsupportedError
from dist_optim.integrations.deepspeed.engine import PREFIX, build_optimizer_for_engine, is_ours, register
from dist_optim.integrations.transformers.deferred import DeferredOptimizer
from dist_optim.integrations.transformers.names import name_of, registered_name
from dist_optim.ranks.together import together

__all__ = ["build_deferred", "refuse_two_optimizers", "settings_from_json"]


def settings_from_json(trainer: Any) -> tuple[str, dict[str, Any]] | None:
    """Before the Trainer reads DeepSpeed's configuration: set in it what the arguments say, and take out what is ours.

    Returns:
        The optimizer that the JSON names, and its hyperparameters; None where it names none of ours.

    Raises:
        UnsupportedError: The model is in an engine already.
        HyperparameterError: JSON and arguments name different optimizers, or both have hyperparameters.
    """
    if trainer.model_wrapped is not trainer.model:
        raise UnsupportedError(
            "A second train() of one Trainer under DeepSpeed would build its optimizer on parameters that the engine "
            "has cut up. Make a new Trainer, and resume: train(resume_from_checkpoint=True)."
        )
    register()
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config
    # deepspeed 0.19 clips to 1.0 where nothing is said.
    config.setdefault("gradient_clipping", trainer.args.max_grad_norm)
    config["zero_force_ds_cpu_optimizer"] = False  # or accelerate exchanges the optimizer for DeepSpeed's own Adam
    section = config.get("optimizer")
    if section is None:
        return None
    named = str(section.get("type", ""))
    refuse_two_optimizers(trainer.args.optim, trainer.args.optim_args, named, type(trainer.args).default_optim)
    if not is_ours(named):
        return None
    del config["optimizer"]
    return named.removeprefix(PREFIX), dict(section.get("params") or {})


def refuse_two_optimizers(optim: Any, optim_args: Any, named: str, default: Any) -> None:
    """Refuse arguments that ask for another optimizer than the JSON, or for hyperparameters beside those of the JSON.

    Args:
        optim: Of the arguments.
        optim_args: Of the arguments.
        named: The type of the JSON's section.
        default: What ``optim`` is where nobody has set it.

    Raises:
        HyperparameterError: With what to do.
    """
    if optim_args or (optim != default and named.removeprefix(PREFIX) != registered_name(optim)):
        raise HyperparameterError(
            f"optim={name_of(optim)!r} (optim_args={optim_args!r}) is set, and DeepSpeed's configuration has an "
            f'"optimizer" section of type {named!r}. Keep one of the two.'
        )


def build_deferred(objects: Sequence[Any], num_training_steps: int) -> tuple[Any, ...]:
    """What ``accelerator.prepare`` is to be given: deferred optimizers built on the plain model beside them.

    Collective.

    Raises:
        DistOptimError: On all ranks together.
    """

    def built(part: Any) -> Any:
        if not isinstance(part, DeferredOptimizer):
            return part
        settled = part.settled(num_training_steps)
        return build_optimizer_for_engine(objects[0], part.choice, params=part.groups(), **settled)

    return together(
        lambda: tuple(built(part) for part in objects),
        doing="Building the optimizer",
        remedy="Check optim, optim_args and DeepSpeed's configuration.",
    )
