"""``plan``: what a model, an optimizer and a strategy would take on each rank, before anything is started.

Owners, rounds and their bytes are the real planner's; the bytes of state are upstream's own, stepped without data
(``rehearsal``); weights, gradients and masters follow the engine's arithmetic (``placement``). What is offloaded lies
in the host's memory, where the CPU steps it. Estimates, and named so: activations, the engine's buffers, seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.building.choice import resolve
from dist_optim.building.simulate import Machine
from dist_optim.errors import UnsupportedError, UsageError
from dist_optim.planning.activations import activation_bytes
from dist_optim.planning.dealing import Loads, composed_work, deal_out
from dist_optim.planning.engines import place
from dist_optim.planning.model import PlannedModel, read_model
from dist_optim.planning.placement import OFFLOADED, PRECISIONS, STRATEGIES, Placement, Request, bytes_of, names_in
from dist_optim.specs.registry import Trait
from dist_optim.stepping.division import DEFAULT_BUCKET_BYTES

__all__ = ["Forecast", "Share", "plan"]

INSIDE_BACKWARD = ("one", "ddp", "fsdp2", "hsdp")
"""Strategies under which updates can be made inside backward."""
USABLE = 0.9
"""Of a GPU's memory: the rest is left to CUDA, NCCL and fragmentation."""
MODEL_FLOPS_PER_S = 4e14
"""Of a model's bf16 products on an H100, in practice."""
GIB = 1 << 30
ONE_BUCKET = 1 << 62
HOST = Machine(elements_per_s=75e9 / 28, flops_per_s=0.5e12)
"""An eighth of a node's two CPUs, for each rank: 600 GB/s of memory, 4 TFLOP/s (vendors' figures)."""
BUS_BYTES_PER_S = 5.5e10
"""Between a GPU and the host's memory, one way, in practice."""
ON_HOST = ("gradients", "masters", "optimizer state", "whole tensors", "scratch")
"""What an offloaded optimizer takes with it; under FSDP2 the weights go too."""


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes on the fullest rank, and on the mean of all."""

    max: int
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A plan. Bytes of ``memory`` are those of a rank."""

    model: str
    optimizer: str
    strategy: str
    num_ranks: int
    num_nodes: int
    precision: str
    numel: int
    """Elements of the model."""
    memory: dict[str, Share]
    """weights, gradients, masters, state, engine buffers, whole tensors (of the rounds in flight), scratch (of
    upstream's step), activations."""
    host: dict[str, Share]
    """The same parts, as far as they lie in the host's memory, each rank's own: of an offloaded optimizer."""
    peak: Share
    """Of the GPU at its fullest moment: in backward, or in the step."""
    gpu_bytes: int
    """Of the GPU's memory, what is counted on."""
    checkpoint_bytes: int
    """Of weights and optimizer together, all ranks."""
    wire: dict[str, int]
    """Bytes that the fullest rank sends or receives in a step, by phase: first the engine's, then ours."""
    owned_imbalance: float
    """Elements that the fullest owner has, over the mean; 1 where nothing is owned."""
    num_rounds: int
    optimizer_s: float
    """Estimate of the optimizer's step."""
    refresh_s: float
    """Of it, on the busiest rank, what is made anew every so many steps (an SVD), shared out over them."""
    step_s: float | None
    """Estimate of all of a training step, where batch and length were given."""
    notes: tuple[str, ...] = ()

    @property
    def headroom(self) -> int:
        """Bytes that are left on the fullest rank; negative where it does not fit."""
        return self.gpu_bytes - self.peak.max

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room."""
        return self.headroom >= 0

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "headroom": self.headroom, "fits": self.fits}


def plan(
    model: str | Path | nn.Module | PlannedModel,
    optimizer: str | type[Optimizer],
    strategy: str = "fsdp2",
    num_ranks: int = 1,
    *,
    num_nodes: int | None = None,
    gpu_memory_gib: float = 80.0,
    batch: int = 0,
    length: int = 0,
    gradient_checkpointing: bool = False,
    precision: str = "mixed",
    master_weights: bool = False,
    fused_backward: bool | None = None,
    replicate: str | None = None,
    target_modules: str | Sequence[str] | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    machine: Machine | None = None,
    device: str = "cuda",
    **options: Any,
) -> Forecast:
    """Plan a job of so many ranks. One process, no process group, no memory for the model.

    Args:
        model: As ``read_model`` takes it, or what it returned.
        optimizer: A registered name, or a class; of one without a name it is assumed that its tensors are independent.
        strategy: One of ``STRATEGIES``, or of ``OFFLOADED``.
        num_ranks: Of the job, each with one GPU.
        num_nodes: Machines that they are on; None: one for each eight.
        gpu_memory_gib: Of one GPU; a tenth of it is not counted on.
        batch: Sequences that a rank passes through the model at once; 0: no activations are estimated.
        length: Tokens of a sequence.
        gradient_checkpointing: Whether layers are computed again in backward.
        precision: ``"mixed"`` (fp32 weights, bf16 products), ``"fp32"``, or ``"bf16"`` (bf16 weights).
        master_weights: Whether fp32 masters stand beside bf16 weights, as in ``build_optimizer``.
        fused_backward, replicate: As in ``build_optimizer``.
        target_modules: As there; None: all linear layers, where the optimizer needs some.
        bucket_bytes: As there.
        machine: For the seconds.
        device: What it runs on: some optimizers are served on GPUs only.
        **options: Hyperparameters, and ``no_decay``, ``rest``, ``rest_options`` of ``build_optimizer``.

    Raises:
        UnknownOptimizerError, HyperparameterError, TargetModulesError, ParameterError, MissingPackageError,
        UnsupportedError: As ``build_optimizer``: a plan is refused where the job would be.
        UsageError: The model, the strategy, the precision or a number cannot be used.
    """
    if precision not in PRECISIONS or gpu_memory_gib <= 0 or batch < 0 or length < 0:
        raise UsageError(
            f"precision={precision!r}, gpu_memory_gib={gpu_memory_gib}, batch={batch}, length={length}: give one of "
            f"{', '.join(PRECISIONS)}, and numbers that are not negative."
        )
    if strategy not in (*STRATEGIES, *OFFLOADED):
        raise UsageError(f"strategy {strategy!r} is unknown. Strategies: {', '.join([*STRATEGIES, *OFFLOADED])}.")
    engine, is_offloaded = OFFLOADED.get(strategy, strategy), strategy in OFFLOADED
    read = read_model(model)
    nodes = num_nodes or max(1, -(-num_ranks // 8))
    is_inside = fused_backward is not False and engine in INSIDE_BACKWARD
    spec = resolve(optimizer, inside_backward=is_inside or strategy == "fsdp1")
    if spec.instead and not is_inside:
        raise UnsupportedError(
            f"{spec.name} cannot step inside backward here: FSDP1 reduces one flat gradient for a whole unit. "
            f"Use fsdp2, or {spec.instead}, the same algorithm with stored gradients."
        )
    is_inside = is_inside and (bool(fused_backward) or Trait.FUSED_BACKWARD in spec.traits)
    notes = []
    if target_modules is None and Trait.LOW_RANK in spec.traits:
        target_modules = "all-linear"
        notes.append("target_modules: all-linear, as none were named")
    if spec.is_undescribed:
        notes.append("assumed: its tensors are independent, which the job proves before it shards them")
    # Updates inside backward leave stacks of experts whole.
    runs_on, splits = "cpu" if is_offloaded else device, not is_inside
    work = composed_work(read, spec, engine, precision, runs_on, target_modules, options, splits_stacks=splits)
    asked = Request(
        model=read,
        strategy=engine,
        num_ranks=num_ranks,
        num_nodes=nodes,
        precision=PRECISIONS[precision],
        trained=work.trained(),
        stores_gradients=not is_inside,
        is_offloaded=is_offloaded,
        needs_all=work.needs_all,
    )
    placement = place(asked)
    machine = machine or (HOST if is_offloaded else Machine())
    rounds = ONE_BUCKET if is_inside else bucket_bytes  # inside backward, what travels together is what is ready
    loads = deal_out(work, placement, rounds, master_weights, replicate == "elementwise", machine, num_ranks)
    activations = activation_bytes(read, batch, length, PRECISIONS[precision].compute, gradient_checkpointing)
    if activations is None:
        notes.append("activations could not be estimated for this class of model")
    if loads.is_together:
        notes.append("one rank steps all tensors, as they depend on each other: it holds all of the state")
    everything = _memory(placement, loads, activations or 0)
    memory, host = _divided(everything, (*ON_HOST, *(["weights"] if engine == "fsdp2" else [])) if is_offloaded else ())
    bus = _over_the_bus(asked) if is_offloaded else {}
    wire = {**placement.wire, **loads.wire, **bus}
    bus_s = sum(bus.values()) / BUS_BYTES_PER_S
    return Forecast(
        model=read.name,
        optimizer=spec.name,
        strategy=strategy,
        num_ranks=num_ranks,
        num_nodes=nodes,
        precision=precision,
        numel=read.numel,
        memory={key: _share(value) for key, value in memory.items()},
        host={key: _share(value) for key, value in host.items()},
        peak=_share(_peak(memory)),
        gpu_bytes=int(gpu_memory_gib * GIB * USABLE),
        checkpoint_bytes=read.numel * asked.dtype.itemsize + int((loads.state + everything["masters"]).sum()),
        wire={key: value for key, value in wire.items() if value},
        owned_imbalance=loads.owned_imbalance,
        num_rounds=loads.num_rounds,
        optimizer_s=loads.step_s + bus_s,
        refresh_s=loads.refresh_s,
        step_s=_step_s(
            read, placement, loads.step_s + bus_s, batch * length, gradient_checkpointing, num_ranks, machine
        ),
        notes=tuple(notes),
    )


def _memory(placement: Placement, loads: Loads, activations: int) -> dict[str, Tensor]:
    ranks = placement.num_sharing
    return {
        "weights": placement.weights,
        "gradients": placement.gradients,
        "masters": placement.masters + loads.masters,
        "optimizer state": loads.state,
        "engine buffers": torch.full((ranks,), placement.buffers, device="cpu"),
        "whole tensors": loads.whole,
        "scratch": loads.scratch,
        "activations": torch.full((ranks,), activations, device="cpu"),
    }


def _divided(parts: Mapping[str, Tensor], away: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """On the GPU, and on the host."""
    none = torch.zeros_like(parts["weights"])
    return {key: none if key in away else value for key, value in parts.items()}, {key: parts[key] for key in away}


def _over_the_bus(asked: Request) -> dict[str, int]:
    """Between a GPU and its host in a step: gradients there, and the weights that are computed with back."""
    ranks, is_fsdp = asked.num_ranks, asked.strategy == "fsdp2"
    trained = bytes_of(asked, names_in(asked)) // ranks
    weights = 2 * bytes_of(asked, asked.model.shapes) // ranks if is_fsdp else trained  # forward and backward
    return {"backward: gradients to the host": trained, "weights from the host": weights}


def _peak(memory: Mapping[str, Tensor]) -> Tensor:
    kept = memory["weights"] + memory["masters"] + memory["optimizer state"] + memory["gradients"]
    backward = memory["activations"] + memory["engine buffers"]
    return kept + torch.maximum(backward, memory["whole tensors"] + memory["scratch"])


def _share(values: Tensor) -> Share:
    return Share(int(values.max()), float(values.double().mean()))


def _step_s(
    read: PlannedModel,
    placement: Placement,
    optimizer_s: float,
    tokens: int,
    is_checkpointed: bool,
    num_ranks: int,
    machine: Machine,
) -> float | None:
    """Products of the model, or the engine's messages where those take longer, then the optimizer's step."""
    if not tokens:
        return None
    passes = 8 if is_checkpointed else 6
    compute = passes * read.numel * tokens / MODEL_FLOPS_PER_S
    rate = machine.link_bytes_per_s if num_ranks <= machine.ranks_per_node else machine.network_bytes_per_s
    return max(compute, sum(placement.wire.values()) / rate) + optimizer_s
