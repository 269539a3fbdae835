"""Bytes that a rank really holds, engine by engine, and what the planner says of the same job."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from end_to_end import batch, make_llama
from placements import place
from torch import Tensor, nn
from zero import ZeroRun, engine_of
from zero_names import NAMES_OF_BOTH, run_of_name

import dist_optim
from dist_optim.errors import DistOptimError
from dist_optim.planning import Forecast, PlannedModel, plan, read_model
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.testing import RankPool

FIELDS = ("weights", "gradients", "masters", "optimizer state")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Bytes = dict[str, int]


@dataclass(frozen=True)
class Column:
    """A strategy on a number of ranks: odd ones where the cuts are uneven then."""

    strategy: str
    num_ranks: int
    placement: str = ""
    """Of ``placements.place``; empty under DeepSpeed."""
    units: tuple[str, ...] = ()
    """Classes that it wraps one by one."""
    make: Callable[[], nn.Module] = make_llama
    """The model."""

    def __str__(self) -> str:
        return f"{self.strategy}, {self.num_ranks}"


COLUMNS = (
    Column("one", 1, "none"),
    Column("ddp", 2, "ddp"),
    Column("fsdp1", 3, "fsdp1", ("Linear",)),
    Column("fsdp2", 3, "fsdp2 units", ("Linear",)),
    Column("hsdp", 4, "hsdp"),
    Column("zero0", 2),
    Column("zero1", 2),
    Column("zero2", 3),
    Column("zero3", 3),
    Column("zero2_offload", 2),
    Column("zero3_offload", 2),
)
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@functools.cache
def model_of(make: Callable[[], nn.Module], units: tuple[str, ...]) -> PlannedModel:
    return read_model(make(), unit_classes=units)


def options_of(name: str) -> dict[str, Any]:
    return dict(run_of_name(name, 0).options)


def forecast(name: str, column: Column, precision: str) -> Forecast:
    return plan(
        model_of(column.make, column.units),
        name,
        column.strategy,
        column.num_ranks,
        num_nodes=2 if column.strategy == "hsdp" else 1,
        precision=precision,
        device="cpu",
        **options_of(name),
    )


def planned(name: str, column: Column, precision: str) -> dict[str, list[float]] | str:
    """Of the fullest rank and of the mean; or the first sentence of the refusal."""
    try:
        found = forecast(name, column, precision)
    except DistOptimError as error:
        return first_sentence(error)
    shares = {key: found.host.get(key, found.memory[key]) for key in FIELDS}  # here all of them are in one memory
    return {key: [share.max, round(share.mean, 1)] for key, share in shares.items()}


def measured(name: str, column: Column, precision: str, pool: RankPool) -> dict[str, list[float]] | str:
    """The same of a job that runs."""
    by_rank = pool.run(held, name, column, precision)
    rows = [one for one in by_rank if not isinstance(one, str)]
    if len(rows) < len(by_rank):
        return next(one for one in by_rank if isinstance(one, str))
    return {key: [max(one[key] for one in rows), sum(one[key] for one in rows) / len(rows)] for key in FIELDS}


def held(name: str, column: Column, precision: str) -> Bytes | str:
    """The body: train two steps, and count storages at the fullest moment."""
    torch.compiler.set_stance("force_eager")  # torchao compiles a kernel for each shape otherwise, for minutes
    try:
        return _under_torch(name, column, precision) if column.placement else _under_zero(name, column, precision)
    except DistOptimError as error:
        return first_sentence(error)


def _under_torch(name: str, column: Column, precision: str) -> Bytes:
    model = place(column.make().to(DTYPES[precision]), column.placement)
    optimizer = dist_optim.build_optimizer(model, name, print_audit=False, **options_of(name))
    optimizer.train()
    for step in range(2):
        optimizer.zero_grad()
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        gradients = storages(one.local_gradient() for one in optimizer.holdings.placed)
        optimizer.step()
    optimizer.train()
    weights = storages(one.local() for one in optimizer.holdings.placed)
    copies = copies_of(optimizer)
    return {
        "weights": total(weights),
        "gradients": total(gradients),
        "masters": total({key: size for key, size in copies.items() if key not in weights}),
        "optimizer state": optimizer.optimizer_state_bytes(),
    }


def dealt(name: str, column: Column) -> tuple[float, int, int, int]:
    """The body: imbalance and rounds of a job's plan; bytes of one field that go from here to owners, and come here."""
    model = place(column.make(), column.placement)
    optimizer = dist_optim.build_optimizer(model, name, print_audit=False, **options_of(name))
    held = optimizer.holdings
    ranks, own, rounds = num_ranks(held.process_group), own_rank(held.process_group), held.plan.buckets
    numels = [0] * ranks
    for at, owner in held.plan.owners.items():
        numels[owner] += held.placed[at].shape.numel()
    sent, received = 0, 0
    for each in rounds:
        if not each.is_replicated:
            route = each.route(own)
            sent += each.dtype.itemsize * (sum(route.to_owners) - route.to_owners[own])
            received += each.dtype.itemsize * (sum(route.from_holders) - route.from_holders[own])
    return max(numels) * ranks / sum(numels), len(rounds), sent, received


def _under_zero(name: str, column: Column, precision: str) -> Bytes:
    config = {} if precision == "fp32" else {precision: {"enabled": True}}
    wanted = f"dist_optim.{name}" if name in NAMES_OF_BOTH else name
    engine_name, _, offload = column.strategy.partition("_")
    stage, zero = int(engine_name[-1]), OFFLOAD if offload else {}
    engine = engine_of(ZeroRun(wanted, options_of(name), stage, zero=zero, config=config, make_model=column.make))
    optimizer = engine.basic_optimizer
    kept: list[Tensor] = []  # held until the step is over, so that no copy takes the place of what was freed
    found: list[int] = []
    for part in optimizer.parts():
        part.step_part = functools.partial(_look, kept, found, optimizer, part.step_part)
    for step in range(2):
        engine.backward(engine(input_ids=batch(step), labels=batch(step)).loss)
        kept[:] = tensors_in(_kept_by(engine))
        engine.step()
    weights = storages(getattr(one, "ds_tensor", one) for one in engine.module.parameters())
    masters = storages(part.live for call in optimizer._engine_calls for part in call.slices.values())
    for part in optimizer.parts():
        masters |= copies_of(part)
    return {
        "weights": total(weights),
        "gradients": max(found),
        "masters": total({key: size for key, size in masters.items() if key not in weights}),
        "optimizer state": optimizer.optimizer_state_bytes(),
    }


def _look(
    kept: list[Tensor], found: list[int], optimizer: Any, step_part: Callable[[list[bool]], None], present: list[bool]
) -> None:
    """Count what was kept after backward, and what the optimizer is shown in this call."""
    slices = [part for call in optimizer._engine_calls for part in call.slices.values()]
    found.append(total(storages([*kept, *(part.live.grad for part in slices)])))
    step_part(present)


def _kept_by(engine: Any) -> list[Any]:
    """Gradients that the engine keeps after backward."""
    kept = [getattr(engine.optimizer, key, None) for key in ("averaged_gradients", "grad_partitions_flat_buffer")]
    return [*kept, [one.grad for one in engine.module.parameters()]]


def copies_of(optimizer: dist_optim.DistributedOptimizer) -> dict[int, int]:
    """Tensors that are upstream's own, beside the model's."""
    if not optimizer.holdings.division.keeps_tensors:
        return {}
    return storages(one.data for instance in optimizer.holdings.instances for one in instance.shadows.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(one)


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of the storages, by address."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {one.data_ptr(): one.nbytes() for one in found if one.nbytes()}


def total(found: dict[int, int]) -> int:
    return sum(found.values())


def first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0].rstrip(".") + "."


def deviation(planned_cell: dict[str, list[float]], measured_cell: dict[str, list[float]]) -> float:
    """The largest, of any field, on the fullest rank or on the mean; relative to what is measured."""
    pairs = [(planned_cell[key][at], measured_cell[key][at]) for key in FIELDS for at in (0, 1)]
    return max(abs(one - other) / max(other, 1.0) if one != other else 0.0 for one, other in pairs)


__all__ = [
    "COLUMNS",
    "DTYPES",
    "FIELDS",
    "Column",
    "dealt",
    "deviation",
    "forecast",
    "held",
    "make_llama",
    "measured",
    "planned",
]
