"""Step time and peak memory of each optimizer on a Llama of a billion parameters, upstream's step beside ours.

Of those that work inside backward the whole training step is measured, for there is no other. Projections are not
refreshed: ``decompositions`` measures what that costs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from parity import Case
from torch import nn
from torch.optim import Optimizer

from measuring.on_gpu.billion import digest, give_gradients, llama, on_llama, ours, upstream
from measuring.on_gpu.rows import Items, Settings, free_memory, outcome
from measuring.on_gpu.sides import leave_uncompiled, one_case_a_name, without_decompositions
from measuring.timing import timed, without_collector

__all__ = ["items"]

FIRST = (
    "adamw_torch",
    "galore_adamw",
    "apollo_adamw",
    "adamw_bnb_8bit",
    "flash_adamw",
    "adafactor",
    "schedule_free_adamw",
    "stable_adamw",
    "muon",
    "lion",
)
LAST = ("grokadamw", "kron", "shampoo", "soap", "adamw_torch_4bit", "adamw_torch_8bit")
"""Dear on matrices of this size, or with their state on the host: other items have their figures before."""
QUICK = ("adamw_torch", "galore_adamw", "muon")
LOMO = ("lomo", "adalomo")
LAYERWISE = "galore_adamw_layerwise"
WARM_UP, STEPS = 2, 5
TOKENS, QUICK_TOKENS = 512, 16
Side = dict[str, Any]


def items(settings: Settings) -> Items:
    """Whole training steps first, then the steps alone."""
    cases = one_case_a_name(settings)
    inside = ["lomo"] if settings.is_quick else ["lomo", "adalomo", "adamw_torch", LAYERWISE]
    found: dict[str, Any] = {
        f"{name}, inside backward": partial(whole_steps, name, cases[name.removesuffix("_layerwise")], settings)
        for name in inside
    }
    order = [*FIRST, *(name for name in cases if name not in FIRST + LAST), *LAST]
    chosen = QUICK if settings.is_quick else [name for name in order if name in cases]
    return found | {name: partial(steps, cases[name], settings) for name in chosen}


def steps(case: Case, settings: Settings) -> dict[str, Any]:
    """Of both sides, from the same gradients; and whether they end on the same weights."""
    case = on_llama(case, settings)
    leave_uncompiled(case)

    def side(make: Callable[[Case, nn.Module], Optimizer]) -> Side:
        model = llama(settings)
        optimizer, parameters = make(case, model), list(model.parameters())
        found = measured(lambda step: give_gradients(parameters, step), optimizer.step, settings)
        return {**found, "digest": digest(parameters)}

    return beside(partial(side, ours), partial(side, upstream))


def whole_steps(name: str, case: Case, settings: Settings) -> dict[str, Any]:
    """Forward, backward and step: ours updates inside backward, and so does upstream where it is LOMO's."""
    case, tokens = on_llama(case, settings), (1, QUICK_TOKENS if settings.is_quick else TOKENS)
    if name in LOMO:  # lomo-optim's decay is that of all parameters alike
        case = replace(case, hyperparameters={"lr": case.hyperparameters["lr"]})

    def side(make: Callable[[nn.Module], Callable[[torch.Tensor], None]]) -> Side:
        model = llama(settings)
        act, ids = make(model), torch.arange(tokens[1], device=settings.place).expand(tokens)
        found = measured(lambda step: None, lambda: act(model(input_ids=ids, labels=ids).loss), settings)
        return {**found, "digest": digest(list(model.parameters()))}

    return beside(partial(side, partial(fused, name, case)), partial(side, partial(as_upstream, name, case)))


def fused(name: str, case: Case, model: nn.Module) -> Callable[[torch.Tensor], None]:
    constructor = {key: value for key, value in case.constructor.items() if key != "fused_backward"}
    optimizer = ours(replace(case, name=name, constructor=constructor), model, fused_backward=True)

    def act(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return act


def as_upstream(name: str, case: Case, model: nn.Module) -> Callable[[torch.Tensor], None]:
    """LOMO's own inside backward; else from stored gradients."""
    if name in LOMO:
        import lomo_optim

        rate = case.hyperparameters["lr"]
        made = {"lomo": lomo_optim.Lomo, "adalomo": lomo_optim.AdaLomo}[name](model, lr=rate)
        return lambda loss: made.fused_backward(loss, rate)
    optimizer = upstream(case, model)

    def act(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return act


def measured(prepare: Callable[[int], None], act: Callable[[], Any], settings: Settings) -> Side:
    """The median of a few steps, and the most memory that one of them took."""
    taken, is_cuda = [], settings.device == "cuda"
    with without_decompositions(), without_collector():
        for step in range(WARM_UP + STEPS):
            prepare(step)
            if is_cuda and step == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
            taken.append(timed(act, settings.place).wall_s)
    peak = torch.cuda.max_memory_allocated() / 1e9 if is_cuda else None
    return {"ms": round(1e3 * statistics.median(taken[WARM_UP:]), 2), "peak_gb": peak and round(peak, 2)}


def alone(side: Callable[[], Side]) -> Side:
    free_memory()
    return side()


def better(first: Side, second: Side) -> Side:
    """Of two turns that end on the same weights, what else ran on the machine is in the slower one."""
    if first["digest"] != second["digest"]:
        return {**first, "digest": None}
    return min(first, second, key=lambda side: side["ms"])


def beside(ours: Callable[[], Side], upstream: Callable[[], Side]) -> dict[str, Any]:
    """Each has the memory to itself, and two turns. Where upstream cannot run here, ours still has its figures."""
    mine = alone(ours)
    try:
        theirs = better(alone(upstream), alone(upstream))
    except Exception as error:
        theirs = {"ms": None, "peak_gb": None, "digest": None, "upstream_reason": outcome(error)["reason"]}
    mine = better(mine, alone(ours))
    own, other = mine.pop("digest"), theirs.pop("digest")
    figures = {"ms": mine["ms"], "upstream_ms": theirs["ms"]}
    figures |= {"peak_gb": mine["peak_gb"], "upstream_peak_gb": theirs["peak_gb"]}
    figures["same_weights"] = None if other is None else own == other
    return figures | {key: value for key, value in theirs.items() if key == "upstream_reason"}
