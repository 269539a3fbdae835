"""What ``measure_any_optimizer.py`` runs: one class, one engine, one outcome."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from any_runs import (
    ALL_PRESENT,
    CASE,
    Choice,
    Reference,
    Regression,
    reference_of_engine,
    reference_run,
    reference_with_closure,
    run_given_gradients,
    run_under_zero,
    run_with_closure,
    weights_of,
)
from parity import make_model
from torch.optim import Optimizer

from dist_optim.building.choice import resolve
from dist_optim.building.groups import arrange
from dist_optim.errors import DistOptimError
from dist_optim.layouts import detect
from dist_optim.proving.known import without_roots
from dist_optim.proving.prove import prove
from dist_optim.specs.verdict import Verdict

ENGINES: Mapping[str, str | int] = {
    "one": "none",
    "DDP": "ddp",
    "FSDP2": "fsdp2 units",
    "FSDP1": "fsdp1",
    "ZeRO-2": 2,
    "ZeRO-3": 3,
}
HERE = "any_optimizer"


def around(wrapper: str, inner: Any, **more: Any) -> Any:
    """A function that builds a wrapper of pytorch-optimizer around an optimizer."""

    def build(params: Any) -> Optimizer:
        import pytorch_optimizer

        made: Optimizer = getattr(pytorch_optimizer, wrapper)(inner(params, lr=1e-2), **more)
        return made

    build.__name__ = wrapper
    return build


def over(wrapper: str, **more: Any) -> Any:
    """A function that builds one that takes parameters, and the class of its inner optimizer."""

    def build(params: Any) -> Optimizer:
        import pytorch_optimizer

        made: Optimizer = getattr(pytorch_optimizer, wrapper)(params, torch.optim.SGD, lr=1e-2, **more)
        return made

    build.__name__ = wrapper
    return build


lookahead = around("Lookahead", torch.optim.AdamW)
trac = around("TRAC", torch.optim.AdamW)
schedule_free_wrapper = around("ScheduleFreeWrapper", torch.optim.AdamW)
ortho_grad = around("OrthoGrad", torch.optim.AdamW)
sam, look_sam, friendly_sam = map(over, ("SAM", "LookSAM", "FriendlySAM"))

_OF_PYTORCH_OPTIMIZER = {
    "Lookahead": Choice(HERE, "lookahead"),
    "TRAC": Choice(HERE, "trac"),
    "ScheduleFreeWrapper": Choice(HERE, "schedule_free_wrapper"),
    "OrthoGrad": Choice(HERE, "ortho_grad"),
    "SAM": Choice(HERE, "sam"),
    "LookSAM": Choice(HERE, "look_sam"),
    "FriendlySAM": Choice(HERE, "friendly_sam"),
    "BSAM": Choice("pytorch_optimizer", "BSAM", {"num_data": 60}),
    "Ranger21": Choice("pytorch_optimizer", "Ranger21", {"num_iterations": 100}),
    **{
        name: Choice("pytorch_optimizer", name, {}, {"use_muon": True}, {"use_muon": False})
        for name in ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")
    },
}
PACKAGES: Mapping[str, tuple[str, Mapping[str, Choice]]] = {
    "torch.optim": ("torch", {}),
    "pytorch_optimizer": ("pytorch-optimizer", _OF_PYTORCH_OPTIMIZER),
    "timm.optim": ("timm", {}),
    "heavyball": ("heavyball", {}),
    "prodigyopt": ("prodigyopt", {}),
    "lion_pytorch": ("lion-pytorch", {}),
    "came_pytorch": ("came-pytorch", {"CAME": Choice("came_pytorch", "CAME", {"lr": 1e-3})}),
    "adam_mini": ("adam-mini", {}),
}


def mode_of(choice: Choice) -> dict[str, Any]:
    """How the class runs in one process: with missing gradients or without, with two groups or one, with a closure."""
    why = ""
    for mode in ("absent", "present", "one group", "closure", "second closure"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = _reference(choice, mode)
            if all(torch.equal(one, _start(mode)[name]) for name, one in expected.weights[-1].items()):
                why = why or "moves nothing"
                continue
            return {"mode": mode}
        except Exception as error:
            why = (
                why
                or f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]
            )
    return {"fails": why}


def _start(mode: str) -> dict[str, torch.Tensor]:
    return weights_of(Regression() if "closure" in mode else make_model(CASE if mode == "absent" else ALL_PRESENT))


def _reference(choice: Choice, mode: str) -> Reference:
    if "closure" in mode:
        return reference_with_closure(choice, mode == "second closure")
    return reference_run(CASE if mode == "absent" else ALL_PRESENT, choice, mode != "one group")


def measured(choice: Choice, mode: dict[str, Any], engine: str, directory: str) -> dict[str, Any]:
    """What comes out under one engine: in this process alone, or as the body on every rank."""
    warnings.simplefilter("ignore")
    where, way = ENGINES[engine], mode["mode"]
    try:
        if isinstance(where, int):
            has_closure = "closure" in way
            expected = reference_with_closure(choice, way != "closure") if has_closure else reference_of_engine(choice)
            problems, optimizer = run_under_zero(choice, expected, where, directory)
        elif "closure" in way:
            is_second = way == "second closure"
            expected = reference_with_closure(choice, is_second)
            problems, optimizer = run_with_closure(choice, expected, where, is_second)
        else:
            case = CASE if way == "absent" else ALL_PRESENT
            expected = reference_run(case, choice, way != "one group")
            problems, optimizer = run_given_gradients(case, choice, expected, where, way != "one group")
    except DistOptimError as error:
        return {"result": "refused", "text": without_roots(str(error))[:300]}
    except Exception as error:
        return {"result": "failed", "text": f"{type(error).__name__}: {error}"[:300]}
    if problems:
        return {"result": "differs", "text": problems[0]}
    held = optimizer.holdings
    verdict = held.spec.verdict
    is_whole = held.division.is_together and engine != "one"
    return {"result": "whole" if is_whole else "exact", "text": without_roots(verdict.reason) if verdict else ""}


def verdict_of(choice: Choice, mode: str) -> Verdict | None:
    """The verdict by which the class was measured under DDP; None where a name stands for it."""
    spec = resolve(choice.load())
    if not spec.is_undescribed or "closure" in mode:
        return None
    model = make_model(CASE if mode == "absent" else ALL_PRESENT)
    placed = detect(model)
    groups: Any = None
    if mode != "one group":
        matrices = [one.parameter for one in placed.values() if len(one.shape) > 1]
        others = [one.parameter for one in placed.values() if len(one.shape) <= 1]
        groups = [{"params": matrices, "lr": 0.02}, {"params": others}]
    arranged, arguments = arrange(model, spec, placed, choice.arguments, params=groups)
    return prove(spec, arranged, arguments)
