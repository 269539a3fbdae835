"""How often the host waits for the GPU in a steady step, and where: ours beside upstream's own.

On a GPU torch itself says so (``torch.cuda.set_sync_debug_mode``). On the CPU nothing waits, and what would is counted:
reads of a tensor's value.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fused import fused_step, given_gradients, place_injected
from fused_cases import FUSED_CASES
from parity import Case, build_subject, gradients, make_model, param_groups, place, set_learning_rates
from placements import inject

from dist_optim.exchange.packed import gather, scatter
from dist_optim.exchange.plan import Item, make_plan
from dist_optim.exchange.tasks import Task
from dist_optim.layouts.detect import detect
from measuring.counting import traffic_counted
from measuring.on_gpu.rows import Items, Settings
from measuring.on_gpu.sides import join_alone, leave_uncompiled, one_case_a_name
from measuring.recipes import in_training

__all__ = ["items", "waits_of"]

STEADY = 4
"""All have stepped before, every parameter has a gradient, and no projection is refreshed, in all cases."""
PLACEMENT = "fsdp2"
BUCKET_BYTES = 6000
QUICK = ("adamw_torch", "lomo")


def items(settings: Settings) -> Items:
    """A packed round of ours alone; steps; a step inside backward."""
    cases = one_case_a_name(settings)
    chosen = QUICK if settings.is_quick else tuple(cases)
    found: dict[str, Any] = {"a packed round": partial(packed_round, settings)}
    inside = next(case for case in FUSED_CASES if case.name == "adamw_torch")
    found[str(inside)] = partial(inside_backward, inside, settings)
    return found | {str(cases[name]): partial(steady_step, cases[name], settings) for name in chosen}


def steady_step(case: Case, settings: Settings) -> dict[str, Any]:
    """Ours under FSDP2 on one rank, and upstream in one process."""
    join_alone(settings)
    leave_uncompiled(case)
    model = place(make_model(case), PLACEMENT)
    subject = build_subject(case, model, bucket_bytes=BUCKET_BYTES)
    subject.train()
    mine = of_steady_step(case, subject, lambda step: inject(model, gradients(case, make_model(case), step)), settings)

    alone = make_model(case)
    named = dict(alone.named_parameters())
    reference = in_training(case.make_reference(param_groups(case, named)))

    def give(step: int) -> None:
        for name, gradient in gradients(case, alone, step).items():
            named[name].grad = gradient

    return figures(mine, of_steady_step(case, reference, give, settings))


def of_steady_step(
    case: Case, optimizer: torch.optim.Optimizer, give: Callable[[int], None], settings: Settings
) -> Counter[str]:
    for step in range(STEADY + 1):
        give(step)
        set_learning_rates(optimizer, case, step)
        if step == STEADY:
            return waits_of(optimizer.step, settings)
        optimizer.step()
    raise AssertionError


def inside_backward(case: Case, settings: Settings) -> dict[str, Any]:
    """Forward, backward and step, of ours alone."""
    join_alone(settings)
    case = replace(case, device=settings.device)
    model = place_injected(case, PLACEMENT)
    optimizer = build_subject(case, model, fused_backward=True, bucket_bytes=BUCKET_BYTES)
    optimizer.train()
    for step in range(STEADY):
        fused_step(case, model, optimizer, step)
    given = given_gradients(case, STEADY)

    def act() -> None:
        model(given).backward()
        optimizer.step()
        optimizer.zero_grad()

    return figures(waits_of(act, settings))


def packed_round(settings: Settings) -> dict[str, Any]:
    """To owners and back, as between ranks on GPUs; this rank sends to itself."""
    join_alone(settings)
    case = one_case_a_name(settings)["adamw_torch"]
    found = list(detect(place(make_model(case), PLACEMENT)).values())
    items = [
        Item(at, one.shape, one.layout, one.dtype, one.device, float(one.shape.numel())) for at, one in enumerate(found)
    ]
    local = {at: one.local().detach() for at, one in enumerate(found)}

    def act() -> None:
        for bucket in make_plan(items, 1, BUCKET_BYTES).buckets:
            route = bucket.route(0)
            parts = {item.index: local[item.index] for item in bucket.items}
            (full,) = result_of(gather(bucket, [parts], route, None))
            result_of(scatter(bucket, full, parts, route, None))

    act()
    return figures(waits_of(act, settings))


def result_of(task: Task[Any]) -> Any:
    while True:
        try:
            next(task)
        except StopIteration as end:
            return end.value


def figures(mine: Counter[str], upstreams: Counter[str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"waits": mine.total(), "places": dict(mine.most_common(8))}
    if upstreams is not None:
        found |= {"upstream_waits": upstreams.total(), "upstream_places": dict(upstreams.most_common(8))}
    return found


def waits_of(act: Callable[[], Any], settings: Settings) -> Counter[str]:
    """How often the host waits during the act, by place in the code."""
    if settings.device != "cuda":
        with traffic_counted() as traffic:
            act()
        return Counter({"reads": traffic.reads} if traffic.reads else {})
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            act()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(place_of(one) for one in caught if "synchronizing CUDA operation" in str(one.message))


def place_of(warning: warnings.WarningMessage) -> str:
    """Package, file and line, without where they are installed."""
    path = Path(warning.filename)
    return f"{'/'.join(path.parts[-3:])}:{warning.lineno}"
