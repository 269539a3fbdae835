"""``DeferredOptimizer``: what the Trainer's ``create_optimizer`` returns before the model is in place.

FSDP2 and DeepSpeed replace a model's parameters while they place it, and FSDP1 what they hold. So ``create_optimizer``
settles *what* to build, on which param groups; a subclass may change them, and add some; and the optimizer itself is
built once, when accelerate has placed the model and put the placed parameters into its groups.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from dist_optim.building.build import build_optimizer
from dist_optim.building.patterns import LR_SCALE
from dist_optim.errors import HyperparameterError, UnsupportedError, WrongModeError
from dist_optim.specs.registry import get_spec
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["DeferredOptimizer", "deferred_class"]


class DeferredOptimizer(Optimizer):
    """An optimizer that is chosen and not built yet: param groups, and what ``build_optimizer`` will be given.

    Args:
        params: Parameters or param groups, as any optimizer takes them.
        choice: A registered name or an optimizer class.
        **hyperparameters: ``lr``, ``target_modules``, and everything else that ``dist_optim.build_optimizer`` takes.
    """

    is_awaited = False
    """Whether the Trainer prepares it now."""

    def __init__(self, params: Iterable[Any], choice: str | type[Optimizer], **hyperparameters: Any) -> None:
        self.choice = choice
        self.hyperparameters = dict(hyperparameters)
        super().__init__(params, _group_defaults(choice, self.hyperparameters))

    @property
    def _is_accelerate_prepared(self) -> bool:
        """Asked by accelerate's ``prepare``, which anybody may call: only the Trainer then builds what it gets back.

        Raises:
            WrongModeError: Somebody else has called it. Nothing was prepared but what came before it.
        """
        if not self.is_awaited:
            raise WrongModeError(
                f"accelerator.prepare was given what create_optimizer() returned, and {self.choice} is not built yet: "
                "train() builds it when the model is in place. For a loop of your own, call "
                "dist_optim.integrations.accelerate.prepare(accelerator, model, name, lr=...) with the plain model, "
                "which places the model and builds the optimizer."
            )
        return False

    def step(self, closure: Callable[[], Any] | None = None) -> NoReturn:
        """Refused."""
        raise WrongModeError(
            f"{self.choice} is not built yet: create_optimizer() settles what to build, and train() builds it when the "
            "model is in place. Call trainer.train(), or build it yourself with dist_optim.build_optimizer(model, ...)."
        )

    def groups(self) -> list[dict[str, Any]]:
        """The param groups that have parameters; one with a relative rate is without the rate that all get."""
        rate = self.defaults.get("lr")
        return [
            {key: value for key, value in group.items() if not (key == "lr" and LR_SCALE in group and value == rate)}
            for group in self.param_groups
            if group["params"]
        ]

    def settled(self, num_training_steps: int) -> dict[str, Any]:
        """The hyperparameters, with a warm-up given as a share of all steps turned into steps."""
        settled = dict(self.hyperparameters)
        warmup = settled.get("warmup_steps")
        if isinstance(warmup, float):
            settled["warmup_steps"] = int(warmup) if warmup >= 1 else math.ceil(num_training_steps * warmup)
        return settled

    def build(self, model: nn.Module, num_training_steps: int, **more: Any) -> DistributedOptimizer:
        """The optimizer on the placed model, with ``more`` keywords of ``build_optimizer``. Collective.

        Raises:
            DistOptimError: Whatever ``build_optimizer`` refuses; on all ranks together.
            UnsupportedError: It evaluates the loss itself.
        """
        given = {**self.settled(num_training_steps), **more}
        built = build_optimizer(model, self.choice, params=self.groups(), **given)
        if built.spec.verdict is not None and built.spec.verdict.needs_closure:  # the same on all ranks
            raise UnsupportedError(
                f"{built.spec.name} evaluates the loss itself, by a closure, which the Trainer has none of. Train in a "
                "loop that calls optimizer.step(closure), or take an optimizer that needs none."
            )
        return built


def _group_defaults(choice: str | type[Optimizer], hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """What a group without a rate or weight decay of its own gets: what is set, else the class's own decay.

    A registered name's unset decay is the 0 that the Trainer puts into its groups; a group that somebody adds has none.
    """
    defaults: dict[str, Any] = {key: hyperparameters[key] for key in ("lr", "weight_decay") if key in hyperparameters}
    chosen = get_spec(choice).load_class() if isinstance(choice, str) else choice
    decay = inspect.signature(chosen).parameters.get("weight_decay")
    if decay is not None and isinstance(decay.default, (int, float)):
        defaults.setdefault("weight_decay", float(decay.default))
    return defaults


class _StandIn(type):
    """The type of classes that stand for one of upstream's: equal to it, as scripts compare them."""

    stands_for: type | None

    def __eq__(cls, other: object) -> bool:
        return cls is other or (other is not None and other is cls.stands_for)

    def __hash__(cls) -> int:
        return type.__hash__(cls) if cls.stands_for is None else hash(cls.stands_for)


def deferred_class(
    choice: str | type[Optimizer], stands_for: type | None = None, by_name: Mapping[str, Any] | None = None
) -> type[DeferredOptimizer]:
    """A class that takes ``(param_groups, **hyperparameters)`` like any optimizer, and defers ``choice``.

    Args:
        choice: A registered name or an optimizer class.
        stands_for: The class that transformers would have given: this one is equal to it.
        by_name: Keywords of that class that follow from the name, and are taken if they are as they were.
    """

    class Chosen(DeferredOptimizer, metaclass=_StandIn):
        def __init__(self, params: Iterable[Any], **hyperparameters: Any) -> None:
            for key, value in (by_name or {}).items():
                if hyperparameters.pop(key, value) != value:
                    raise HyperparameterError(
                        f"{choice} has {key}={value!r} by its name. Leave {key!r} as it is, or choose another name."
                    )
            super().__init__(params, choice, **hyperparameters)

    Chosen.stands_for = stands_for
    Chosen.__name__ = Chosen.__qualname__ = choice if isinstance(choice, str) else choice.__name__
    return Chosen
