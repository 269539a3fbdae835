"""Every registered name under every ZeRO stage: the engine's run against one process, after each of ten steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import zero
from end_to_end import RUNS
from torch import Tensor
from zero import NO_DECAY, Recorder, Reference, ZeroRun

import dist_optim
from dist_optim.building.choice import resolve
from dist_optim.errors import UnsupportedError
from dist_optim.generators import seed_generators

STEPS = 10
STAGES = (0, 1, 2, 3)
NAMES_OF_BOTH = ("adagrad", "lamb", "lion", "muon")
"""DeepSpeed has optimizers of these names too: ours need their prefix."""
_LOW_RANK = {"target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3}


def refusal_of(name: str) -> str:
    """The first sentence of why DeepSpeed cannot have it; empty where it can."""
    try:
        resolve(name)
    except UnsupportedError as error:
        return str(error).partition(". ")[0] + "."
    return ""


def served_names() -> list[str]:
    return [name for name in dist_optim.names() if not refusal_of(name)]


def run_of_name(name: str, stage: int) -> ZeroRun:
    """The name as the end-to-end table asks for it, or at a plain rate; two param groups where it decays weights."""
    spec = dist_optim.get_spec(name)
    known = next((run for run in RUNS if run.name == name), None)
    options: dict[str, Any] = dict(known.options) if known else {"lr": 1e-2}
    options.pop("fused_backward", None)  # DeepSpeed steps after backward
    if known is None and dist_optim.Trait.LOW_RANK in spec.traits:
        options |= _LOW_RANK
    if "weight_decay" in _names(spec):
        options = {"weight_decay": 0.01, **options, "no_decay": NO_DECAY}
    return ZeroRun(
        f"dist_optim.{name}" if name in NAMES_OF_BOTH else name,
        options,
        stage,
        real_batches=True,
    )


def _names(spec: dist_optim.OptimizerSpec) -> set[str]:
    return {record.name for record in spec.records()}


def gaps_of(name: str, stage: int) -> tuple[float, float]:
    """The body: the largest gap after any step, relative to the tensor's largest weight, from two one-process runs.

    Returns:
        From the run that is given the engine's averaged gradients, and from the run on its own gradients.
    """
    torch.compiler.set_stance("force_eager")  # torchao compiles a kernel for each shape otherwise, for minutes
    run = run_of_name(name, stage)
    given, own = Reference(run), Reference(run)
    engine = zero.engine_of(run)
    recorder = Recorder(engine)
    found = (0.0, 0.0)
    for step in range(STEPS):
        for take in (
            lambda step: zero.train_engine(engine, run, range(step, step + 1)),
            lambda _: given.follow(recorder.gradients),
            own.train_step,
        ):
            seed_generators(step)
            take(step)
        weights = zero.weights_of(engine, run)
        found = (max(found[0], largest_gap(weights, given)), max(found[1], largest_gap(weights, own)))
    assert engine.basic_optimizer.num_steps == STEPS
    return found


def floor_of(stage: int) -> float:
    """The body: the same for torch's AdamW as DeepSpeed's client optimizer, on its own gradients: no code of ours."""
    run = ZeroRun("adamw_torch", {"lr": 1e-2, "weight_decay": 0.01}, stage, real_batches=True)
    alone, model = Reference(run), run.make_model()
    config = {key: value for key, value in run.json().items() if key != "optimizer"}
    engine = zero.deepspeed().initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), **run.options),
        config={**config, "zero_allow_untested_optimizer": True},
    )[0]
    gap = 0.0
    for step in range(STEPS):
        zero.train_engine(engine, run, range(step, step + 1))
        alone.train_step(step)
        gap = max(gap, largest_gap(zero.weights_of(engine, run), alone))
    return gap


def largest_gap(weights: list[Tensor], reference: Reference) -> float:
    pairs = zip(weights, reference.weights(), strict=True)
    gaps = torch.stack([((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs])
    dist.all_reduce(gaps, op=dist.ReduceOp.MAX)
    return gaps.max().item()
