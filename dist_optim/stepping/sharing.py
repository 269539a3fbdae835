"""After one rank has stepped for all: what its upstream shows in its groups, and its generators, for the others."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_optim.errors import StateDictError
from dist_optim.generators import Generators, digest_of_generators, read_generators, write_generators
from dist_optim.ranks.agreement import gather_objects, host_group, num_ranks, own_rank
from dist_optim.ranks.fingerprints import fingerprint
from dist_optim.specs.driver import STRUCTURE
from dist_optim.specs.state_codec import has_content
from dist_optim.stepping.bystander import Bystander
from dist_optim.stepping.division import SOLE_OWNER
from dist_optim.stepping.holdings import Holdings

__all__ = ["OwnersWord", "shared_extras", "broadcast_from_owner", "from_owner"]

_PLAIN = (bool, int, float, str, Tensor, type(None))


class OwnersWord:
    """What the one rank that steps says after each step; nothing where every rank steps a part.

    A rank whose random generators stood as the owner's before a step takes them over after it: ranks that were seeded
    alike still draw alike, as where each of them runs upstream. Replicas of the shards (HSDP) have an owner each: all
    of them draw as the first does.
    """

    def __init__(self, held: Holdings) -> None:
        self._held = held
        self._is_needed = held.division.is_together and num_ranks(held.process_group) > 1
        self._before = ""
        self._own: Generators | None = None
        """This replica's generators, while it draws as the first one does."""

    def note_generators(self) -> None:
        """Before the owner's step. Collective where there are replicas."""
        if not self._is_needed:
            return
        if self._held.num_replicas > 1:
            first = gather_objects(
                _generators() if own_rank(self._held.all_ranks) == 0 else None, self._held.all_ranks
            )[0]
            own = _generators()
            self._own = None if digest_of_generators(own) == digest_of_generators(first) else own
            write_generators(first)
        self._before = digest_of_generators(_generators())

    def spread(self) -> None:
        """After it. Collective on the ranks that share the work."""
        if not self._is_needed:
            return
        (instance,) = self._held.instances
        said: Any = None
        if not isinstance(instance, Bystander):
            after = _generators() if self._before else None
            moved = after if after and digest_of_generators(after) != self._before else None
            upstream = instance.optimizer
            groups = [(list(group), _plain(group)) for group in upstream.param_groups]
            said = groups, _plain(upstream.defaults), _plain(vars(upstream)), self._before, moved
        groups, defaults, values, before, moved = broadcast_from_owner(said, self._held)
        if isinstance(instance, Bystander):
            instance.show_as(groups, defaults, values)
            if moved and before == self._before:
                write_generators(moved)
        if self._own is not None:
            write_generators(self._own)
        self._before, self._own = "", None


def broadcast_from_owner(value: Any, held: Holdings) -> Any:
    """The owner's value on every rank. Collective on the ranks that share the work."""
    group = host_group(held.process_group)
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=SOLE_OWNER)
    return box[0]


def from_owner(extras: dict[str, Any], held: Holdings) -> dict[str, Any]:
    """What upstream keeps that is no parameter's: from the rank that alone has it, or that of all, which is the same.

    Collective on the ranks that share the work.

    Raises:
        StateDictError: On all ranks: several ranks step the tensors, and it is not the same on all of them.
    """
    if num_ranks(held.process_group) == 1:
        return extras
    if held.division.is_together:
        found: dict[str, Any] = broadcast_from_owner({key: _copied(value) for key, value in extras.items()}, held)
        return found
    return shared_extras(extras, held)


def shared_extras(extras: dict[str, Any], held: Holdings, *of_other_parts: dict[str, Any]) -> dict[str, Any]:
    """Where several ranks step, what is kept outside the state of parameters is saved once: it must be the same.

    What only refers to the parameters of each rank is not saved: a constructor refers to them again. Collective on the
    ranks that share the work.

    Args:
        extras: What this rank keeps.
        held: Who steps what.
        of_other_parts: What it keeps where an engine steps the model in parts, in the other ones.

    Raises:
        StateDictError: On all ranks: it is not.
    """
    if not of_other_parts and (held.division.is_together or num_ranks(held.process_group) == 1):
        return extras
    marks = [
        mark
        for marks in gather_objects([_marks(one) for one in (extras, *of_other_parts)], held.process_group)
        for mark in marks
    ]
    if all(one == marks[0] for one in marks):
        return extras
    if any(has_content(json.loads(one[STRUCTURE])) for one in marks if one):
        raise StateDictError(
            f"{held.spec.name} keeps something for single tensors outside optimizer.state, and each rank has that of "
            "the tensors that it steps: it would be lost. Build it with independent=False, so that one rank has it all."
        )
    return {}


def _marks(extras: dict[str, Any]) -> dict[str, Any]:
    return {key: fingerprint(value) if isinstance(value, Tensor) else value for key, value in extras.items()}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What can be sent and means the same elsewhere: no parameters, no code."""
    kept = {key: value for key, value in values.items() if key not in ("params", "param_names", "state")}
    return {key: _copied(value) for key, value in kept.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    return isinstance(value, _PLAIN) and not isinstance(value, torch.nn.Parameter)


def _copied(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _generators() -> Generators:
    return read_generators(of_every_device=False)
