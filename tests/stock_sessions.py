"""The sessions of docs/situations.md with stock optimizers: torch's own and upstream's, and no line of ours in a step.

What is saved and loaded is what a user of that engine calls: ``torch.save`` on rank 0 under DDP, torch's distributed
checkpoints of ``get_state_dict`` under FSDP, the engine's own files under ZeRO.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sessions import ENGINES, OPTIONS, Engine, Session, TorchSession, ZeroSession, chosen, options_of
from torch import nn
from torch.distributed.checkpoint import state_dict as torch_doors
from torch.nn.parallel import DistributedDataParallel

from dist_optim.integrations import cpu_rehearsal

CLASSES = {
    "adamw_torch": "torch.optim.AdamW",
    "galore_adamw": "galore_torch.GaLoreAdamW",
    "muon": "torch.optim.Muon",
    "stable_adamw": "optimi.StableAdamW",
    "schedule_free_adamw": "schedulefree.AdamWScheduleFree",
}
"""By our name, the class that a user of stock takes; others are paths."""
WITHOUT_GPU = {"stable_adamw": {"triton": False}}
FILE = "checkpoint.pt"


def class_of(name: str) -> Callable[..., torch.optim.Optimizer]:
    found = chosen(CLASSES.get(name, name))
    assert not isinstance(found, str)
    return found


def import_classes(names: str) -> None:
    """Of one name, or of several with a plus between them."""
    for name in names.split(" + "):
        class_of(name)


def build(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The stock optimizer of these parameters."""
    if name != "galore_adamw":
        return class_of(name)(parameters, **options_of(name), **WITHOUT_GPU.get(name, {}))
    options = {key: value for key, value in OPTIONS[name].items() if key not in ("lr", "target_modules")}
    matrices = [one for one in parameters if one.ndim == 2]
    rest = [one for one in parameters if one.ndim != 2]
    groups = [{"params": rest}, {"params": matrices, **options, "proj_type": "std"}]
    return class_of(name)([group for group in groups if group["params"]], lr=OPTIONS[name]["lr"])


@dataclass(frozen=True)
class StockEngine(Engine):
    """A column of the table, with a stock optimizer."""

    def session(self, name: str | None, **options: Any) -> Session:
        kind = StockZeroSession if self.is_zero else StockTorchSession
        return kind(self, name, **options)

    def alone(self, name: str | None, *, mixed: bool = False, **options: Any) -> TorchSession:
        return StockTorchSession(ONE_PROCESS, name, mixed=self._precision() if mixed else "", **options)

    def deepspeed(self) -> Any:
        return deepspeed()

    def prepare(self, accelerator: Any, model: nn.Module, name: str, params: Any = None) -> tuple[nn.Module, Any]:
        given = list(model.parameters()) if params is None else params
        if cpu_rehearsal.is_ignored(accelerator):
            cpu_rehearsal.turn_fsdp_on(accelerator)
        prepared: tuple[nn.Module, Any] = accelerator.prepare(model, build(name, given))
        return prepared


STOCK = tuple(StockEngine(one.title, one.num_ranks, one.placement, one.stage) for one in ENGINES)
ONE_PROCESS = STOCK[0]


class StockTorchSession(TorchSession):
    """With the parameters that are trainable when the optimizer is built, or with all that are listed."""

    def __init__(self, engine: Engine, name: str | None, **options: Any) -> None:
        self.stock: list[torch.optim.Optimizer] = []
        super().__init__(engine, name, **options)
        self.optimizers = self.stock  # type: ignore[assignment]

    def build(self, name: str, params: Any = None) -> None:
        if params is not None:
            self.stock.append(class_of(name)(params, **options_of(name)))
            return
        names = name.split(" + ")
        with_frozen = self.is_listed and not self.only_trainable
        all_of = [(fqn, one) for fqn, one in self.model.named_parameters() if one.requires_grad or with_frozen]
        matrices = [one for fqn, one in all_of if {"first", "idle"} & set(fqn.split(".")) and fqn.endswith("weight")]
        rest = [one for _, one in all_of if not any(one is matrix for matrix in matrices)]
        parts = [[one for _, one in all_of]] if len(names) == 1 else [matrices, rest]
        for one, parameters in zip(names, parts, strict=True):
            self.stock.append(build(one, parameters))
        self.mode(True)

    def mode(self, is_training: bool) -> None:
        self.model.train(is_training)
        for optimizer in self.stock:
            change = getattr(optimizer, "train" if is_training else "eval", None)
            if change is not None:
                change()

    def own_model(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def write(self, folder: Path) -> None:
        """What rank 0 does alone under DDP, and all ranks do under FSDP."""
        if self.engine.placement in ("none", "ddp"):
            folder.mkdir(parents=True, exist_ok=True)
            states = [one.state_dict() for one in self.stock]
            torch.save({"model": self.own_model().state_dict(), "optimizers": states}, folder / FILE)
            return
        model, optimizer = torch_doors.get_state_dict(self.model, self.stock)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def save(self, folder: Path) -> None:
        if self.engine.placement not in ("none", "ddp") or dist.get_rank() == 0:
            self.write(folder)
        dist.barrier()

    def load(self, folder: Path) -> None:
        is_alone = self.engine.placement == "none"
        if self.engine.placement == "ddp" or (is_alone and not (folder / ".metadata").exists()):
            held = torch.load(folder / FILE)
            self.own_model().load_state_dict(held["model"])
            for optimizer, state in zip(self.stock, held["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            return
        model, optimizers = torch_doors.get_state_dict(self.model, self.stock)
        state = {"model": model, "optimizer": optimizers}
        dcp.load(state, checkpoint_id=folder, no_dist=is_alone)
        torch_doors.set_state_dict(
            self.model, self.stock, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )


class StockZeroSession(ZeroSession):
    """DeepSpeed's engine with torch's AdamW, named in its JSON, or with a class of the user's."""

    def named(self, name: str) -> dict[str, Any]:
        if "." in name:
            return super().named(name)
        return {"optimizer": {"type": "AdamW", "params": {**OPTIONS["adamw_torch"], "torch_adam": True}}}

    def client(self, model: nn.Module, name: str) -> torch.optim.Optimizer | None:
        return class_of(name)(model.parameters(), **options_of(name)) if "." in name else None

    def mode(self, is_training: bool) -> None:
        self.held.train(is_training)

    def load(self, folder: Path) -> None:
        self.held.load_checkpoint(str(folder))  # with a warning, and no error, where there is nothing


def deepspeed() -> Any:
    """The package, quiet, without our names in it, and without its C++ all-reduce, which takes a minute to compile."""
    import deepspeed as package
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return package
