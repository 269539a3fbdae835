"""Updates inside backward on parameters that ZeRO-3 shards: no fp32 masters, no stored gradients.

DeepSpeed's engine at stage 3 without an optimizer only gathers and releases parameters. Each gradient is averaged when
it is there, and this rank's slice of the parameter updated from its slice. The engine's own ``backward`` and ``step``
need an optimizer of DeepSpeed's, so that these calls take their place::

    engine, *_ = deepspeed.initialize(model=model, config=config)      # stage 3, and no "optimizer" in it
    optimizer = build_fused_optimizer(engine, "adalomo", lr=1e-3)
    loss = engine.module(**batch).loss
    optimizer.backward(loss)
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.building.build import ONE_BUCKET
from dist_optim.building.choice import refuse_combination, resolve
from dist_optim.building.composing import compose
from dist_optim.building.patterns import has_patterns
from dist_optim.errors import UnsupportedError
from dist_optim.inside_backward.handle import Shards, install
from dist_optim.layouts.detect import PlacedParameter, named_parameters
from dist_optim.layouts.layout import FlatRange
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.ranks.together import together
from dist_optim.specs.registry import Trait
from dist_optim.stepping.division import Division, divide
from dist_optim.stepping.optimizer import DEFAULT_BUCKET_BYTES, DistributedOptimizer

__all__ = ["build_fused_optimizer"]

# torch 2.13 renamed the collective.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def build_fused_optimizer(
    engine: Any,
    optimizer: str | type[Optimizer],
    *,
    params: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
    target_modules: str | Sequence[str] | None = None,
    no_decay: Iterable[str] = (),
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    print_audit: bool = True,
    **hyperparameters: Any,
) -> DistributedOptimizer:
    """The optimizer of an engine that has none, stepped inside backward. Collective.

    Args:
        engine: Of ``deepspeed.initialize`` at stage 3, without an optimizer.
        optimizer: ``lomo``, ``adalomo``, a layerwise name, or an elementwise optimizer.
        params: As in ``dist_optim.build_optimizer``, from ``engine.module``; as are all other arguments.

    Raises:
        UnsupportedError: The engine has an optimizer, another stage, or keeps small parameters gathered.
        DistOptimError: As ``dist_optim.build_optimizer``.
    """
    model = engine.module
    real = dict(named_parameters(model))

    def prepare() -> Division:
        spec = resolve(optimizer, inside_backward=True)
        if not {Trait.FUSED_BACKWARD, Trait.ELEMENTWISE} & spec.traits:
            raise UnsupportedError(f"{spec.name} is not stepped inside backward. Name it in DeepSpeed's JSON.")
        _refuse_engine(engine)
        placed = {name: _place(name, parameter, at) for at, (name, parameter) in enumerate(real.items())}
        stand_ins = {id(real[name]): one.parameter for name, one in placed.items()}
        spec, groups, arguments = compose(
            model,
            spec,
            placed,
            hyperparameters,
            params=_of_stand_ins(params, stand_ins),
            no_decay=no_decay,
            target_modules=target_modules,
            takes_idle=False,
        )
        refuse_combination(spec, is_fused=True)
        if spec.driver.needs_total_norm(arguments):
            raise UnsupportedError(
                f"{spec.name}: clip_grad_norm takes two backward passes, and ZeRO-3 frees parameters in the first. Use "
                "clip_grad_value, or name the optimizer in DeepSpeed's JSON with gradient_clipping."
            )
        group = next(iter(placed.values())).process_group
        return divide(spec, groups, arguments, process_group=group, all_ranks=group, bucket_bytes=ONE_BUCKET)

    division = together(prepare, doing="Building the optimizer")
    division.agree()
    built = together(lambda: DistributedOptimizer(division), doing="Building the optimizer")
    install(built, model, bucket_bytes=bucket_bytes, shards=_ZeroShards(engine, real))
    if print_audit and own_rank() == 0:
        print(built.route_audit(), flush=True)
    return built


def _of_stand_ins(params: Any, stand_ins: Mapping[int, nn.Parameter]) -> Any:
    """What the user listed, with the slices in the place of DeepSpeed's parameters."""
    if params is None:
        return None
    listed = list(params)
    if listed and isinstance(listed[0], Mapping):
        return [
            group
            if has_patterns([group])
            else {**group, "params": [stand_ins.get(id(one), one) for one in group.get("params", ())]}
            for group in listed
        ]
    return [stand_ins.get(id(one), one) for one in listed]


def _refuse_engine(engine: Any) -> None:
    if engine.zero_optimization_stage() != 3:
        raise UnsupportedError(
            f"Stage {engine.zero_optimization_stage()}: updates inside backward are served at stage 3. Name the "
            "optimizer in DeepSpeed's JSON at other stages."
        )
    if type(engine.optimizer).__name__ != "DeepSpeedZeRoOffload":
        raise UnsupportedError(
            "The engine has an optimizer, which stores gradients. Leave the optimizer out of deepspeed.initialize and "
            "of its configuration."
        )
    parameters: dict[str, Any] = dict(named_parameters(engine.module))  # DeepSpeed adds attributes to them
    persistent = [name for name, parameter in parameters.items() if parameter.ds_persist]
    if persistent:
        raise UnsupportedError(
            f"{persistent[0]!r} stays gathered, and would not see its update. Set "
            '"stage3_param_persistence_threshold": 0 in "zero_optimization".'
        )
    if any(parameter.ds_tensor.dtype is torch.float16 for parameter in parameters.values()):
        raise UnsupportedError(
            "fp16 gradients need loss scaling, which updates inside backward cannot wait for. Use bf16."
        )


def _place(name: str, parameter: Any, position: int) -> PlacedParameter:
    """The parameter as this rank's slice of the flattened tensor, on DeepSpeed's own storage."""
    group, numel, size = parameter.ds_process_group, parameter.ds_numel, parameter.ds_tensor.ds_numel
    layout = FlatRange.cut(numel, size, num_ranks(group))
    own = parameter.ds_tensor.data[: layout.numel_on(parameter.ds_shape, own_rank(group))]
    view = nn.Parameter(own, requires_grad=parameter.requires_grad)
    return PlacedParameter(name, view, parameter.ds_shape, layout, group, position, parameter.requires_grad)


class _ZeroShards(Shards):
    """Full gradients of this rank's batch, averaged over the ranks as each gets its own slice."""

    def __init__(self, engine: Any, real: Mapping[str, nn.Parameter]) -> None:
        self._engine = engine
        self._real = real

    def parameter(self, placed: PlacedParameter) -> nn.Parameter:
        return self._real[placed.fqn]

    def reduced(self, placed: PlacedParameter, gradient: Tensor) -> Tensor:
        group, numel = placed.process_group, gradient.numel()
        size: int = cast(Any, self._real[placed.fqn]).ds_tensor.ds_numel
        whole = gradient.reshape(-1)
        if numel < size * num_ranks(group):  # DeepSpeed's slices are equally long, the last padded
            whole = torch.nn.functional.pad(whole, (0, size * num_ranks(group) - numel))
        own = gradient.new_empty(size)
        _reduce_scatter(own, whole.div_(num_ranks(group)), group=group)
        return own[: placed.local().numel()]

    def end_backward(self) -> None:
        # Both are the engine's: it keeps the last unit and the order of units for the next pass.
        self._engine.optimizer.partition_all_parameters()
        self._engine.optimizer.get_param_coordinator().reset_step()
