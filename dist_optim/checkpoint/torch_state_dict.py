"""torch's own doors to an optimizer's state: ``torch.distributed.checkpoint.state_dict``, and FSDP1's methods.

Their functions make state appear by a step with zero gradients, and look for it under numbers. For optimizers of ours
they are answered here: no step, logical names, and tensors as torch has them for the layout.

==================================  ===============================================================================
``full_state_dict=True``, and DDP,  every tensor whole, on every rank (with ``cpu_offload``, on rank 0 alone)
FSDP1
FSDP2, HSDP                         a ``DTensor`` where state is cut like its parameter; what an owner keeps whole, it
                                    alone lists: ``torch.distributed.checkpoint`` saves and loads both, under any
                                    number of ranks
==================================  ===============================================================================

Before the first step the tensors are room to load into. All of it is collective on the ranks that share the work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict as torch_doors
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dist_optim.errors import StateDictError
from dist_optim.overrides import check
from dist_optim.ranks.agreement import gather_objects, own_rank
from dist_optim.ranks.together import together
from dist_optim.specs.unwrapping import find_optimizer
from dist_optim.stepping import rank_state
from dist_optim.stepping.fresh_state import state_after_a_step
from dist_optim.stepping.holdings import Holdings
from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.stepping.whole_state import StateByName, gathered, is_slice, own_state, shape_of_whole

__all__ = ["answer_torch", "from_torch", "to_torch"]

StateDict = dict[str, Any]


def to_torch(optimizer: DistributedOptimizer, *, full: bool, on_rank_0: bool = False) -> StateDict:
    """``{"state": {fqn: {...}}, "param_groups": [...]}``. Collective on the ranks that share the work.

    Args:
        optimizer: Whose state; it is not changed, and takes no step.
        full: Every tensor whole, whatever the layout.
        on_rank_0: On the host, and on the other ranks nothing.
    """
    held, progress = optimizer.holdings, optimizer.progress
    optimizer.meet("reading its state by torch.distributed.checkpoint")
    together(lambda: _refuse_extras(held), held.all_ranks)
    mine = state_after_a_step(held) if progress.is_fresh else own_state(held)
    as_dtensors = all(isinstance(one.parameter, DTensor) for one in held.placed if not one.layout.is_replicated)
    has_shards = any(not one.layout.is_replicated for one in held.placed)
    if full or not has_shards or not as_dtensors:
        state = _as_upstream_has_it(held, gathered(held, mine))
        if on_rank_0 and own_rank(held.all_ranks):
            return {}
        if on_rank_0:
            state = {fqn: _on_host(own) for fqn, own in state.items()}
    else:
        state = _with_dtensors(optimizer, mine)
    groups = rank_state.plain_groups(held)
    rank_state.marked(groups, progress.num_steps, progress.mode)
    return {"state": state, "param_groups": groups}


def _as_upstream_has_it(held: Holdings, state: StateByName) -> StateByName:
    groups = {name: group for group, names in zip(held.groups, held.names_by_group(), strict=True) for name in names}
    driver = held.spec.driver
    return {fqn: driver.as_upstream_has_it(own, groups[fqn]) for fqn, own in state.items()}


def _refuse_extras(held: Holdings) -> None:
    readable = [instance.extras for instance in held.instances if instance.extras is not None]
    if not all(extras.is_as_constructed() for extras in readable):
        raise StateDictError(
            f"{held.spec.name} keeps more than state of its parameters, for which torch.distributed.checkpoint has no "
            "place. Save it with dist_optim.save_checkpoint, or with state_dict() on every rank."
        )


def from_torch(optimizer: DistributedOptimizer, given: Mapping[str, Any], *, from_rank_0: bool = False) -> None:
    """Install what ``to_torch`` made, or torch's functions of a stock optimizer with equal names. Collective.

    Args:
        optimizer: What is written into.
        given: Whole tensors, or DTensors.
        from_rank_0: Only the first rank has it.

    Raises:
        StateDictError: It does not fit; nothing was changed.
    """
    optimizer.meet("loading its state by torch.distributed.checkpoint")
    given = _unflattened(optimizer, _of_rank_0(optimizer, given) if from_rank_0 else given)
    held = optimizer.holdings
    parameters = {one.fqn: one.parameter for one in held.placed}
    cut = {held.placed[index].fqn for index in held.local_indices if not held.placed[index].layout.is_replicated}
    state = {
        fqn: _plain(own, parameters[fqn].data if fqn in cut else None)
        for fqn, own in given["state"].items()
        if fqn in parameters and own
    }
    together(
        lambda: optimizer.load_state_dict({"state": state, "param_groups": _own_groups(optimizer, given)}),
        held.all_ranks,
        doing="Loading the optimizer's state",
        otherwise=StateDictError,
    )


def _of_rank_0(optimizer: DistributedOptimizer, given: Mapping[str, Any]) -> Mapping[str, Any]:
    ranks = optimizer.holdings.all_ranks
    found: Mapping[str, Any] = gather_objects(given if own_rank(ranks) == 0 else None, ranks)[0]
    return found


def _own_groups(optimizer: DistributedOptimizer, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of all groups those of this optimizer: torch's functions give the groups of several optimizers together."""
    own = optimizer.holdings.names_by_group()
    saved = {frozenset(group["params"]): group for group in given["param_groups"]}
    if all(frozenset(names) in saved for names in own):
        return [{**saved[frozenset(names)], "params": names} for names in own]
    return [dict(group) for group in given["param_groups"]]


def _with_dtensors(optimizer: DistributedOptimizer, mine: StateByName) -> StateByName:
    held = optimizer.holdings
    made: StateByName = {}
    for instance, index in held.stepped_here():
        placed = held.placed[index]
        for key, value in mine.get(placed.fqn, {}).items():
            if is_slice(held, instance, index, value):
                parameter = placed.parameter
                assert isinstance(parameter, DTensor)
                whole = shape_of_whole(value.shape, placed)
                strides = torch.empty(whole, device="meta").stride()
                mesh, placements = parameter.device_mesh, parameter.placements
                value = DTensor.from_local(value, mesh, placements, run_check=False, shape=whole, stride=strides)
            made.setdefault(placed.fqn, {})[key] = value
    return made


def _plain(own: Mapping[str, Any], weight: Tensor | None) -> dict[str, Any]:
    """Without DTensors: the local part of what is cut like the weight, else the whole tensor. Collective for those.

    Args:
        own: State of one parameter.
        weight: The parameter's, where each rank steps its part of it.
    """

    def plain(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        is_alike = isinstance(weight, DTensor) and (weight.placements, weight.device_mesh) == (
            value.placements,
            value.device_mesh,
        )
        return value.to_local() if is_alike else value.full_tensor()

    return {key: plain(value) for key, value in own.items()}


def _on_host(own: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in own.items()}


def _flattened(given: StateDict) -> StateDict:
    """``state.<fqn>.<key>`` and ``param_groups.<fqn>.<key>``, as ``flatten_optimizer_state_dict`` asks for."""
    flat = {f"state.{fqn}.{key}": value for fqn, own in given["state"].items() for key, value in own.items()}
    for group in given["param_groups"]:
        values = {key: value for key, value in group.items() if key != "params"}
        flat |= {f"param_groups.{fqn}.{key}": value for fqn in group["params"] for key, value in values.items()}
    return flat


def _unflattened(optimizer: DistributedOptimizer, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of flat keys the dictionaries that they were."""
    if "state" in given or not given:
        return given if given else {"state": {}, "param_groups": []}
    listed = optimizer.holdings.names_by_group()
    known = {fqn for names in listed for fqn in names}
    values: dict[str, StateByName] = {"state": {}, "param_groups": {}}
    for flat, value in given.items():
        kind, _, rest = flat.partition(".")
        fqn, key = _split(rest, known)
        if kind in values and fqn:
            values[kind].setdefault(fqn, {})[key] = value
    groups = []
    for names in listed:
        group: dict[str, Any] = {"params": names}
        for fqn in names:
            group |= values["param_groups"].get(fqn, {})
        groups.append(group)
    return {"state": values["state"], "param_groups": groups}


def _split(path: str, known: Collection[str]) -> tuple[str, str]:
    """The longest known name that a dotted path begins with, and the rest; empty names where there is none."""
    fqn, dot, key = path.rpartition(".")
    while dot and fqn not in known:
        fqn, dot, last = fqn.rpartition(".")
        key = f"{last}.{key}"
    return (fqn, key) if dot else ("", "")


# torch's functions --------------------------------------------------------------------------------------------------


def answer_torch() -> None:
    """Have torch's functions ask us about optimizers of ours. Once in a process; stock optimizers are served as before.

    The functions inside their module are replaced, so that it does not matter who imported the public ones before.
    """
    check("torch.distributed.checkpoint")
    if getattr(torch_doors._get_optim_state_dict, "answers_for_dist_optim", False):
        return
    torch_doors._init_optim_state = _only_stock(torch_doors._init_optim_state)
    torch_doors._get_optim_state_dict = _reading(torch_doors._get_optim_state_dict)
    torch_doors._load_optim_state_dict = _loading(torch_doors._load_optim_state_dict)
    fsdp: Any = FullyShardedDataParallel
    fsdp._optim_state_dict_impl = staticmethod(_reading_fsdp1(fsdp._optim_state_dict_impl))
    fsdp._optim_state_dict_to_load_impl = staticmethod(_loading_fsdp1(fsdp._optim_state_dict_to_load_impl))


def _ours(optimizer: Any) -> DistributedOptimizer | None:
    return find_optimizer(optimizer, DistributedOptimizer)


def _only_stock(initialize: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(initialize)
    def initialize_state(optim: Optimizer) -> None:
        if _ours(optim) is None:
            initialize(optim)

    return initialize_state


def _reading(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def read_state(model: nn.Module, optimizers: Sequence[Optimizer], info: Any) -> Any:
        ours = [one for optimizer in optimizers if (one := _ours(optimizer)) is not None]
        if not info.handle_optim or not ours:
            return read(model, optimizers, info)
        stock = tuple(optimizer for optimizer in optimizers if _ours(optimizer) is None)
        flat, info.flatten_optimizer_state_dict = info.flatten_optimizer_state_dict, False
        try:
            everything = read(model, stock, info) if stock else {"state": {}, "param_groups": []}
        finally:
            info.flatten_optimizer_state_dict = flat
        for optimizer in ours:
            made = to_torch(optimizer, full=info.full_state_dict, on_rank_0=info.full_state_dict and info.cpu_offload)
            if not made:
                return {}
            everything["state"] |= made["state"]
            everything["param_groups"] += made["param_groups"]
        if info.cpu_offload:
            everything["state"] = {fqn: _on_host(own) for fqn, own in everything["state"].items()}
        return _flattened(everything) if flat else everything

    read_state.answers_for_dist_optim = True  # type: ignore[attr-defined]
    return read_state


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_state(model: nn.Module, optimizers: Sequence[Optimizer], state_dict: Any, info: Any) -> None:
        ours = [one for optimizer in optimizers if (one := _ours(optimizer)) is not None]
        stock = tuple(optimizer for optimizer in optimizers if _ours(optimizer) is None)
        if stock or not ours:
            load(model, stock if ours else optimizers, state_dict, info)
        for optimizer in ours if info.handle_optim else ():
            from_torch(optimizer, state_dict, from_rank_0=info.broadcast_from_rank0)

    return load_state


def _reading_fsdp1(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def read_state(model: nn.Module, optim: Optimizer, *args: Any, **keywords: Any) -> Any:
        if (ours := _ours(optim)) is None:
            return read(model, optim, *args, **keywords)
        return to_torch(ours, full=True, on_rank_0=bool(keywords.get("rank0_only")))

    return read_state


def _loading_fsdp1(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def to_load(*args: Any, **keywords: Any) -> Any:
        ours = _ours(keywords.get("optim"))
        if ours is None:
            return load(*args, **keywords)
        given: Mapping[str, Any] = keywords["optim_state_dict"]
        return dict(_of_rank_0(ours, given) if keywords.get("rank0_only") else given)

    return to_load
