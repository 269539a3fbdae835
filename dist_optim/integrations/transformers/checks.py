"""What the Trainer is given and cannot be trained as it stands: found before the first step, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.errors import ParameterError, UnsupportedError
from dist_optim.integrations.accelerate.placing import refuse_unserved_strategy
from dist_optim.integrations.accelerate.tensor_parallel import refuse_unserved
from dist_optim.integrations.transformers.deferred import DeferredOptimizer
from dist_optim.integrations.transformers.placing import is_sharded
from dist_optim.integrations.transformers.ties import refuse_parted_ties
from dist_optim.layouts.detect import detect
from dist_optim.ranks.agreement import num_ranks
from dist_optim.ranks.together import together
from dist_optim.specs.registry import Trait, spec_of_class
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["check_given_optimizer", "check_made_by_hand", "check_strategy", "check_verified_by_engine"]

INSTEAD = (
    "Name the optimizer instead, so that it is built when the model is in place: TrainingArguments(optim=..., "
    "optim_args=...), or Trainer(optimizer_cls_and_kwargs=(OptimizerClass, {...}))."
)

PLACED_BY_TRANSFORMERS = (
    "Leave parallelism_config out, and load the model placed: AutoModelForCausalLM.from_pretrained(folder, "
    "distributed_config=DistributedConfig(tp_size=...)), with fsdp_size= as well for FSDP 2 over it."
)


def check_strategy(accelerator: Any, model: nn.Module) -> None:
    """Refuse a strategy, or a setting of it, that is not served, or that parts what the model ties. Collective.

    Raises:
        UnsupportedError: On all ranks together.
    """

    def check() -> None:
        refuse_unserved_strategy(accelerator)
        refuse_unserved(accelerator, model, PLACED_BY_TRANSFORMERS)
        if accelerator.distributed_type.value == "FSDP" and not is_sharded(model):
            refuse_parted_ties(model, accelerator.state.fsdp_plugin)

    _check_together(check)


def _check_together(check: Callable[[], None]) -> None:
    together(check, doing="Checking the Trainer's arguments", remedy=INSTEAD)


def check_given_optimizer(trainer: Any, given: Any, schedule: Any) -> None:
    """Check ``optimizers=(optimizer, scheduler)`` before the model is placed.

    Raises:
        ParameterError: The optimizer holds parameters that are not the model's, or state on another device than its
            parameter; the schedule drives another optimizer; or DeepSpeed would drop the optimizer.
    """

    def check() -> None:
        for fault in _faults_of_given(trainer, given, schedule):
            raise ParameterError(fault)

    _check_together(check)


def check_verified_by_engine(arguments: Any, prepared: Sequence[Any]) -> None:
    """Refuse ``verify_steps`` where DeepSpeed gets an optimizer that is not dist_optim's. Collective.

    Raises:
        UnsupportedError: On all ranks together.
    """
    ours = any(isinstance(one, DeferredOptimizer) for one in prepared)
    has_model = any(isinstance(one, nn.Module) for one in prepared)

    def check() -> None:
        if has_model and not ours:
            _refuse_unverified(arguments)

    _check_together(check)


def _refuse_unverified(arguments: Any) -> None:
    """Refuse ``verify_steps`` for an optimizer that is stepped as transformers, or the user, has made it.

    Raises:
        UnsupportedError: With what to do.
    """
    if asked := getattr(arguments, "verify_steps", 0):
        raise UnsupportedError(
            f"verify_steps={asked}: this optimizer is stepped as it was made, and nothing of dist_optim's is there to "
            f"verify. Leave verify_steps out. {INSTEAD}"
        )


def _faults_of_given(trainer: Any, given: Any, schedule: Any) -> Iterator[str]:
    driven = getattr(schedule, "optimizer", None)
    if isinstance(driven, Optimizer) and driven is not given:
        yield (
            "optimizers: the schedule drives another optimizer than the one that is trained, so that its rates would "
            "reach nothing. Leave it None and set lr_scheduler_type, or override create_scheduler."
        )
    if given is None:
        return
    if trainer.is_deepspeed_enabled:
        yield f"optimizers: transformers drops a prebuilt {type(given).__name__} under DeepSpeed. {INSTEAD}"
    yield from _stale(given, trainer.model, "optimizers")
    for parameter, state in given.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            if isinstance(value, Tensor) and value.dim() > 0 and value.device != parameter.device:
                yield (
                    f"optimizers: state {key!r} of a parameter of shape {tuple(parameter.shape)} is on {value.device}, "
                    f"and the parameter on {parameter.device}: the optimizer took steps before the model was moved. "
                    f"{INSTEAD}"
                )


def _stale(optimizer: Optimizer, model: nn.Module, what: str) -> Iterator[str]:
    current = {id(parameter) for parameter in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for at, parameter in enumerate(group["params"]):
            if id(parameter) not in current:
                yield (
                    f"{what}: parameter {at} of group {number} of this {type(optimizer).__name__} (shape "
                    f"{tuple(parameter.shape)}) is not a parameter of the model: it was built on another copy, or the "
                    f"model was changed since, and what is stepped would not be what is trained. {INSTEAD}"
                )


def check_made_by_hand(optimizer: Optimizer, model: nn.Module, arguments: Any) -> None:
    """Check an optimizer that an overridden ``create_optimizer`` (or ``optimizers=``) made, on the placed model.

    Collective. dist_optim's own are always right here; any other must hold the placed parameters, and be of a kind that
    can step shards.

    Raises:
        ParameterError: Its parameters are not the model's.
        UnsupportedError: The model is sharded, and it needs more of a tensor than a shard; or ``verify_steps`` is set.
    """

    def check() -> None:
        for fault in _stale(optimizer, model, "create_optimizer"):
            raise ParameterError(fault)
        if isinstance(optimizer, DistributedOptimizer):
            return
        _refuse_unverified(arguments)
        if num_ranks() > 1:
            _refuse_other_trajectory(optimizer, model)

    _check_together(check)


def _refuse_other_trajectory(optimizer: Optimizer, model: nn.Module) -> None:
    spec = spec_of_class(type(optimizer))
    is_sharded = any(not placed.layout.is_replicated for placed in detect(model).values())
    if spec.refusal or Trait.FUSED_BACKWARD in spec.traits or (is_sharded and spec.traits != {Trait.ELEMENTWISE}):
        raise UnsupportedError(
            f"create_optimizer made a {type(optimizer).__name__} itself, which does not train alike on more than "
            f"one rank. {INSTEAD} Or call super().create_optimizer() and change its param groups."
        )


def refuse_smaller_batch(trainer: Any, error: Exception) -> None:
    """``auto_find_batch_size`` starts again where memory ended; FSDP is then in the middle of a pass, and stays there.

    It would add the next gradients to those of the pass that failed, or wait for ever. Local: of the rank that failed.

    Raises:
        UnsupportedError: Memory ended under FSDP, and would be answered with a smaller batch.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    is_answered = trainer.args.auto_find_batch_size and should_reduce_batch_size(error)
    if is_answered and trainer.accelerator.distributed_type.value == "FSDP":
        raise UnsupportedError(
            f"auto_find_batch_size: memory ended with {trainer._train_batch_size} rows a rank, in the middle of a pass "
            "of FSDP, which cannot begin anew in this process. Start again with a smaller per_device_train_batch_size, "
            "and more gradient_accumulation_steps for the same batch."
        ) from error
