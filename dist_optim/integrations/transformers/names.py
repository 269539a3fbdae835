"""transformers' own names of optimizers: what each stands for here, and whom it is served by.

A name is one of three. Most are registered (``dist_optim.names()``), some by another name. What transformers alone
knows is served by its class, which is stepped on whole tensors like any class. And what rests on more than the class
(overrides by module, state in paged memory) is transformers' own in one process and under DDP, where every rank steps
all of it; where parameters are sharded it is refused, with the name to take instead.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer import Trainer as StockTrainer  # at once: dist_optim.run exchanges the name later

from dist_optim.errors import MissingPackageError, UnsupportedError
from dist_optim.specs.hyperparameters import parse_optim_args
from dist_optim.specs.registry import names

__all__ = [
    "INSTEAD",
    "Meaning",
    "class_known_to_transformers",
    "meaning_of",
    "name_of",
    "registered_name",
    "stock_class",
    "why_not_sharded",
]


@dataclass(frozen=True)
class Meaning:
    """A registered name, and the hyperparameters that transformers' name fixes."""

    name: str
    fixed: Mapping[str, Any] = field(default_factory=dict)


ALIASES = {"adamw_8bit": Meaning("adamw_bnb_8bit"), "lion_32bit": Meaning("lion_8bit", {"optim_bits": 32})}
"""transformers' other names for what is registered."""

INSTEAD = {
    "adamw_anyprecision": "adamw_torch, or flash_adamw for a state of fewer bits",
    "adamw_torch_npu_fused": "adamw_torch",
    "adamw_torch_xla": "adamw_torch",
    "ademamix_8bit": "ademamix",
    "paged_adamw_32bit": "adamw_bnb_8bit with optim_args='optim_bits=32'",
    "paged_adamw_8bit": "adamw_bnb_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
    "rmsprop_bnb_8bit": "rmsprop_bnb_32bit",
}
"""What to take for names that are not served on sharded parameters, or whose package cannot be had."""


class NotInstalledError(MissingPackageError, ValueError):
    """transformers' own complaint of a missing package, which is the one for some of its names, the other for some."""


def name_of(optim: Any) -> str:
    """The text of ``args.optim``, which is a member of transformers' enumeration where that has the name."""
    return str(getattr(optim, "value", optim))


def meaning_of(optim: Any) -> Meaning | None:
    """What ``args.optim`` stands for; None where transformers alone knows it."""
    name = name_of(optim)
    return ALIASES.get(name) or (Meaning(name) if name in names() else None)


def registered_name(optim: Any) -> str | None:
    """The registered name that ``args.optim`` stands for; None where transformers alone knows it."""
    meaning = meaning_of(optim)
    return None if meaning is None else meaning.name


def stock_class(arguments: Any) -> tuple[type | None, dict[str, Any]]:
    """The class and the keywords that transformers takes by default for a name that is registered.

    Returns:
        None and no keywords where transformers does not know the name, or makes it of a model.

    Raises:
        MissingPackageError: transformers finds the package missing.
    """
    plain = copy.copy(arguments)
    plain.optim_args = None
    try:
        found: tuple[type, dict[str, Any]] = StockTrainer.get_optimizer_cls_and_kwargs(plain)
    except ImportError as error:
        raise MissingPackageError(str(error)) from error
    except (ValueError, TypeError):
        return None, {}
    return found


def class_known_to_transformers(arguments: Any, model: Any) -> tuple[Any, dict[str, Any]]:
    """The class and the keywords of a name that transformers alone knows.

    Raises:
        MissingPackageError: Its package is not installed: with what to take instead.
    """
    given, name = copy.copy(arguments), name_of(arguments.optim)
    if isinstance(given.optim_args, Mapping):  # transformers reads no dict
        given.optim_args = ",".join(f"{key}={value}" for key, value in given.optim_args.items())
    try:
        found: tuple[Any, dict[str, Any]] = StockTrainer.get_optimizer_cls_and_kwargs(given, model)
    except (ImportError, ValueError) as error:
        advice = f" Or take {INSTEAD[name]}." if name in INSTEAD else ""
        raise NotInstalledError(f"optim={name!r}: {error}{advice}") from error
    chosen, keywords = found
    read = parse_optim_args(given.optim_args)  # of some names transformers passes the text on
    return chosen, {key: read.get(key, value) if isinstance(value, str) else value for key, value in keywords.items()}


def why_not_sharded(optim: Any) -> UnsupportedError | None:
    """Why a name that transformers alone knows is not served on sharded parameters, and what to take; None if it is."""
    name = name_of(optim)
    if "paged" in name:
        reason = "keeps its state in memory that is paged to the host, and a sharded state needs no such thing"
    elif name.endswith("_8bit"):
        reason = "goes by settings of whole modules (embeddings in 32 bits) that do not reach a class on its own"
    elif name in INSTEAD:
        reason = "is made for another device"
    else:
        return None
    return UnsupportedError(f"optim={name!r} {reason}. Where parameters are sharded take {INSTEAD[name]} instead.")
