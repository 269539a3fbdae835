"""Whether the content of a record can be installed: found out while nothing has been changed.

``schema`` holds a record to its form. Here its parts are held to each other, and to the optimizer that is to load it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_optim.checkpoint.build_values import RATE, START
from dist_optim.checkpoint.index import StoredTensor
from dist_optim.checkpoint.schema import census
from dist_optim.errors import CheckpointError, StateDictError
from dist_optim.specs.driver import STRUCTURE
from dist_optim.specs.hyperparameters import WRITE_ANOTHER
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.stepping import rank_state
from dist_optim.stepping.holdings import Holdings

__all__ = ["check_content", "check_decoded"]

KINDS = ("state", "weights", "groups", "extras")


def check_content(
    directory: Path, spec: OptimizerSpec, record: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> None:
    """Refuse a record whose parts do not belong together. Not a collective.

    Raises:
        CheckpointError: With what is wrong.
    """
    if problem := next(_problems(spec, record, stored), ""):
        raise CheckpointError(f"{str(directory)!r} is damaged: {problem}. Resume from another checkpoint.")


def _problems(spec: OptimizerSpec, record: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    if census(record["scalars"]) != record["census"]:
        yield "numbers of the optimizer's state are missing, or are no longer what they were"
    if record["mode"] == "eval" and Trait.WEIGHT_SWAPPING not in spec.traits:
        yield f"its mode is 'eval', and {spec.name} has no weights for evaluation"
    grouped = {name for group in record["param_groups"] for name in group["params"]}
    for name in grouped ^ set(record["shapes"]) | set(record["scalars"]) - grouped:
        yield f"{name!r} is not in all of its lists of parameters"
    for name in stored:
        kind, _, rest = name.partition("/")
        if kind not in KINDS or (kind == "state" and rest.rpartition("/")[0] not in record["scalars"]):
            yield f"there is a tensor {name!r}, and the record has no place for it"
    for name, order in record["memory_orders"].items():
        if name not in stored or sorted(order) != list(range(len(stored[name].shape))):
            yield f"the memory order of {name!r} is {order}"
    for name in _referred(record["param_groups"]):
        if name not in stored:
            yield f"a param group refers to the tensor {name!r}, which is not there"


def _referred(value: Any) -> Iterator[str]:
    """The tensors that values of param groups stand for."""
    if isinstance(value, dict) and value.keys() == {"tensor"}:
        yield value["tensor"]
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _referred(item)


def check_decoded(held: Holdings, state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse values that the optimizer would not be built with, and state that cannot be made again.

    Not a collective; nothing is installed.

    Raises:
        StateDictError: With what is wrong.
    """
    restored = [rank_state.restored(group) for group in groups]
    at_start = [{**group, RATE: group[START]} if START in group else group for group in restored]
    if problem := held.spec.problem_in(restored) or held.spec.problem_in(at_start):
        raise StateDictError(f"The checkpoint is damaged: {str(problem).removesuffix(WRITE_ANOTHER)}")
    names = {record.name for record in held.spec.records()}
    for at, (own, saved) in enumerate(zip(held.groups, restored, strict=True)):
        missing = sorted((names & own.keys()) - saved.keys())
        missing = [name for name in missing if not callable(own[name])]
        if missing and not held.spec.is_undescribed_in(own):
            raise StateDictError(f"The checkpoint is damaged: group {at} has no {missing[0]!r}.")
    groups_of = [own for own, members in zip(held.groups, held.members, strict=True) for _ in members]
    for instance, index in held.stepped_here():
        own = state.get(held.placed[index].fqn, {})
        if STRUCTURE in own:
            instance.driver.decode_state(own, groups_of[index])
