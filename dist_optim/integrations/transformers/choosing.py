"""What the Trainer's arguments ask to build: a registered name or a class, and its keywords."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dist_optim.errors import HyperparameterError
from dist_optim.integrations.transformers.arguments import read_hyperparameters, values_for
from dist_optim.integrations.transformers.deferred import deferred_class
from dist_optim.integrations.transformers.names import (
    Meaning,
    class_known_to_transformers,
    meaning_of,
    name_of,
    stock_class,
    why_not_sharded,
)
from dist_optim.specs.registry import OptimizerSpec, get_spec

__all__ = ["choice_of", "class_and_keywords", "keywords_of"]


def choice_of(trainer: Any, model: nn.Module) -> tuple[str | type[Optimizer] | None, dict[str, Any] | None]:
    """A registered name or a class, and hyperparameters that go before the arguments, or None.

    No name and no class for what transformers alone can make: factories, and names that rest on more than a class.
    """
    if trainer.optimizer_cls_and_kwargs is not None:
        chosen, given = trainer.optimizer_cls_and_kwargs
    else:
        meaning = meaning_of(trainer.args.optim)
        if meaning is not None:
            return meaning.name, named_hyperparameters(trainer.args, meaning)
        refusal = why_not_sharded(trainer.args.optim)
        if refusal is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise refusal
        chosen, given = class_known_to_transformers(trainer.args, model)
        if refusal is not None:
            return None, None
    is_class = isinstance(chosen, type) and issubclass(chosen, Optimizer)
    return (chosen if is_class or isinstance(chosen, str) else None), dict(given)


def class_and_keywords(args: Any, model: nn.Module | None) -> tuple[Any, dict[str, Any]]:
    """A class and keywords, as transformers gives them: what is registered is built when the model is in place."""
    meaning = meaning_of(args.optim)
    if meaning is None:
        return class_known_to_transformers(args, model)
    stock, defaults = stock_class(args)
    spec = get_spec(meaning.name)
    known = {record.name for record in spec.records()}
    by_name = {key: value for key, value in defaults.items() if key not in known}
    own = keywords_of(spec, args, named_hyperparameters(args, meaning))
    return deferred_class(meaning.name, stock or spec.load_class(), by_name), {**defaults, **own}


def named_hyperparameters(arguments: Any, meaning: Meaning) -> dict[str, Any] | None:
    """What ``optim_args`` and the name itself say; None where the name says nothing."""
    if not meaning.fixed:
        return None
    given = read_hyperparameters(arguments)
    for key, value in meaning.fixed.items():
        if given.setdefault(key, value) != value:
            raise HyperparameterError(
                f"optim={name_of(arguments.optim)!r} has {key}={value!r} by its name, and optim_args sets "
                f"{key}={given[key]!r}. Leave it out, or set optim={meaning.name!r}."
            )
    return given


def keywords_of(spec: OptimizerSpec, arguments: Any, given: dict[str, Any] | None) -> dict[str, Any]:
    """All of ``build_optimizer``'s keywords, ``weight_decay`` and ``target_modules`` among them."""
    given = None if given is None else dict(given)
    own = {} if given is None else {"target_modules": given.pop("target_modules", None)}
    values = values_for(spec, arguments, given)
    if num_steps := getattr(arguments, "verify_steps", 0):
        values["verify_steps"] = num_steps
    targets = own.get("target_modules") or arguments.optim_target_modules
    return {**values, "target_modules": targets} if targets is not None else values
