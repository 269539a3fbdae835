"""Models under torch's engines, gradients cut as each engine cuts them, and parameters put together again."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dist_optim.building.stacks import stacks_of
from dist_optim.inside_backward.to_owners import MARK
from dist_optim.layouts import BoxShard, PlacedParameter, detect
from dist_optim.layouts.freezing_fsdp2 import param_groups_of, units_of
from dist_optim.ranks.agreement import gather_objects, own_rank

FSDP1 = {
    "fsdp1": ShardingStrategy.FULL_SHARD,
    "fsdp1 shard_grad_op": ShardingStrategy.SHARD_GRAD_OP,
    "fsdp1 no_shard": ShardingStrategy.NO_SHARD,
    "fsdp1 hybrid": ShardingStrategy.HYBRID_SHARD,
}

OF_TP = {"tp": ("tp",), "fsdp2 tp": ("shard", "tp"), "hsdp tp": ("replicate", "shard", "tp")}
"""The mesh axes of each; two ranks along each of them, but for the last, which has all that are left."""


def place(model: nn.Module, placement: str, **options: Any) -> nn.Module:
    """Put a model under an engine; units are its linear layers, and what is left in the root.

    Args:
        model: The user's own.
        placement: The engine, and how it is set.
        **options: More for the engine itself.
    """
    if placement == "none":
        return model
    if placement.startswith("ddp"):
        options = {"gradient_as_bucket_view": "bucket view" in placement, **options}
        return DistributedDataParallel(model, static_graph="static" in placement, **options)
    if placement in FSDP1:
        return _fsdp1(model, placement, **options)
    device_type = _device_of(model).type
    if placement in OF_TP:
        return _tensor_parallel(model, mesh_of(device_type, OF_TP[placement]), options)
    if placement == "ep":
        return _expert_parallel(model, device_type, options)
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    if placement == "hsdp":
        mesh = two_by_half(device_type)
    elif placement == "fsdp2 columns":  # FSDP2 shards a dim other than the first only where it divides evenly
        options["shard_placement_fn"] = lambda p: Shard(1 if p.ndim > 1 and p.shape[1] % mesh.size() == 0 else 0)
    elif placement == "fsdp2 no_reshard":
        options["reshard_after_forward"] = False
    elif placement == "fsdp2 units":
        for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            fully_shard(module, mesh=mesh, **options)
    elif placement != "fsdp2":
        raise ValueError(placement)
    fully_shard(model, mesh=mesh, **options)
    return model


# Made once in a process: every group of gloo's keeps threads that wake a hundred times a second, for good.


@cache
def two_by_half(device_type: str) -> DeviceMesh:
    """All ranks as two replicas of a half each."""
    return init_device_mesh(device_type, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


@cache
def mesh_of(device_type: str, names: tuple[str, ...]) -> DeviceMesh:
    """All ranks, two along each axis but the last."""
    twos = (2,) * (len(names) - 1)
    return init_device_mesh(device_type, (*twos, dist.get_world_size() // 2 ** len(twos)), mesh_dim_names=names)


@cache
def own_group() -> dist.ProcessGroup:
    """A process group of this rank alone, for what one process would do."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh, options: dict[str, Any]) -> nn.Module:
    """Linear layers by columns and by rows in turn, biases of both; what is no linear layer lies on no axis of tp."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    styles = [ColwiseParallel(), RowwiseParallel(), RowwiseParallel(), ColwiseParallel()]
    parallelize_module(model, mesh["tp"], {name: styles[at % 4] for at, name in enumerate(linears)})
    outer = tuple(name for name in mesh.mesh_dim_names or () if name != "tp")
    if outer:
        for name in linears:
            fully_shard(model.get_submodule(name), mesh=mesh[outer], **options)
        fully_shard(model, mesh=mesh[outer], **options)
    return model


def _expert_parallel(model: nn.Module, device_type: str, options: dict[str, Any]) -> nn.Module:
    """Stacks of experts over one axis, and FSDP2 over the other; all else by FSDP2 over all ranks.

    As torchtitan does: FSDP2 cuts inside the matrices of a stack that has fewer of them than there are ranks.
    """
    mesh = mesh_of(device_type, ("efsdp", "ep"))

    def cut(stack: nn.Parameter) -> Shard:
        return Shard(int(stack.shape[0] < mesh.size() and stack.shape[1] % mesh["efsdp"].size() == 0))

    for owner in sorted({name.rpartition(".")[0] for name in stacks_of(model, detect(model))}):
        experts = model.get_submodule(owner)
        for name, stack in list(experts.named_parameters(recurse=False)):
            part = distribute_tensor(stack.detach(), mesh["ep"], [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(part, requires_grad=stack.requires_grad))
        fully_shard(experts, mesh=mesh["efsdp"], shard_placement_fn=cut, **options)
    fully_shard(model, mesh=mesh_of(device_type, ("all",)), **options)
    return model


def _fsdp1(model: nn.Module, placement: str, **options: Any) -> nn.Module:
    mesh = None
    if placement == "fsdp1 hybrid":
        mesh = two_by_half(_device_of(model).type)
    return FullyShardedDataParallel(
        model,
        sharding_strategy=FSDP1[placement],
        auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
        use_orig_params=True,
        device_mesh=mesh,
        device_id=_device_of(model),  # FSDP1 looks for an accelerator otherwise
        **options,
    )


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def inject(model: nn.Module, full: dict[str, Tensor | None]) -> None:
    """Set gradients, cut as each parameter is; where FSDP2 sends them to owners, as its backward would."""
    if any(hasattr(unit, MARK) for unit in units_of(model)):
        reduce(model, full)
        return
    for name, placed in detect(model).items():
        gradient, parameter = full[name], placed.parameter
        if gradient is None:
            parameter.grad = None
        elif isinstance(parameter, DTensor):
            parameter.grad = _cut(gradient, placed)
        else:
            part = placed.layout.view_of(gradient, own_rank(placed.process_group))
            # FSDP1 leaves no gradient on a parameter of which this rank stores nothing.
            parameter.grad = part.clone() if part.numel() or placed.layout.is_replicated else None


def reduce(model: nn.Module, full: dict[str, Tensor | None]) -> None:
    """End a backward pass in which every rank had these gradients: exact, where their number is a power of two."""
    names = {id(placed.parameter): name for name, placed in detect(model).items()}
    state: Any = model._get_fsdp_state()  # type: ignore[operator]
    state._lazy_init()
    for module in [one for one in model.modules() if isinstance(one, FSDPModule)][::-1]:
        module.unshard()
        for unit in param_groups_of(module):
            for one in unit.fsdp_params:
                gradient = full[names[id(one.sharded_param)]]
                one.sharded_param.grad = None
                one.unsharded_param.grad = None if gradient is None else gradient.clone()
            unit.post_backward()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # FSDP2 reduces on a stream of its own, for which the end of backward waits


def full_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the full parameters, by logical name, on every rank."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {_logical(name): p.detach().clone() for name, p in model.named_parameters()}
    return {name: whole(placed) for name, placed in detect(model).items()}


def whole(placed: PlacedParameter) -> Tensor:
    """A copy of the full parameter, on every rank. Collective.

    ``full_tensor`` has other rows than FSDP2, where tensor parallelism has cut them and they do not divide evenly; and
    gloo reads what is on a GPU as if it were on the host then, which ends the process (seen in torch 2.11).
    """
    parameter = placed.parameter
    if not isinstance(parameter, DTensor):
        return parameter.detach().clone()
    is_on_gpu_over_gloo = placed.device.type != "cpu" and dist.get_backend(placed.process_group) == "gloo"
    if not isinstance(placed.layout, BoxShard) and not is_on_gpu_over_gloo:
        return parameter.full_tensor().detach().clone()
    full = torch.empty(placed.shape, dtype=placed.dtype, device=placed.device)
    for rank, part in enumerate(gather_objects(placed.local().detach(), placed.process_group)):
        placed.layout.view_of(full, rank).copy_(part)
    return full


def _cut(gradient: Tensor, placed: PlacedParameter) -> DTensor:
    """This rank's part of a gradient, placed as the parameter is."""
    parameter = placed.parameter
    assert isinstance(parameter, DTensor)
    part = placed.layout.view_of(gradient, own_rank(placed.process_group)).clone(memory_format=torch.contiguous_format)
    shape, stride = placed.shape, gradient.stride()
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)


def _logical(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
