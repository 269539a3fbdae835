"""A small model under each engine, behind one face: train, evaluate, save, load, read the weights.

All ranks pass the same batch, so that an engine's average is exact on two and on four ranks, and the weights must be
those of one process to the bit.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import zero
from placements import full_parameters, own_group, place
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

import dist_optim
from dist_optim.checkpoint import load_optimizer, save_optimizer
from dist_optim.integrations.accelerate import prepare
from dist_optim.integrations.deepspeed.engine import build_optimizer_for_engine
from dist_optim.layouts.detect import detect, reshard
from dist_optim.stepping.upstream_instance import UpstreamInstance

BATCH = 8
SIZES = 17, 23, 9
"""Of what goes in, what lies between, and what comes out."""
ALWAYS = 0
"""For ``idle_until``: the idle layer takes part from the first step on."""

_GALORE = {"lr": 1e-2, "target_modules": ["first", "idle", "head"], "rank": 4, "update_proj_gap": 2, "scale": 0.5}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"lr": 1e-2, "weight_decay": 0.01},
    "adafactor": {"lr": 1e-2},
    "galore_adamw": _GALORE,
    "muon": {"lr": 1e-2},
    "schedule_free_adamw": {"lr": 1e-2},
}


def options_of(name: str) -> dict[str, Any]:
    """Of an optimizer by its name, or by the path of its class."""
    return OPTIONS.get(name, {"lr": 1e-2})


def chosen(name: str) -> str | type[torch.optim.Optimizer]:
    """A name as it is; the class that a path with dots leads to."""
    module, _, attribute = name.rpartition(".")
    found: str | type[torch.optim.Optimizer] = getattr(importlib.import_module(module), attribute) if module else name
    return found


class Net(nn.Module):
    """Sizes that two does not divide; a parameter outside every unit; a layer that is idle at times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner, between, outer = SIZES
        self.first = nn.Linear(inner, between)
        self.idle = nn.Linear(between, between)
        self.head = nn.Linear(between, outer, bias=False)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, between))

    def forward(self, inputs: Tensor, targets: Tensor, with_idle: bool) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        if with_idle:
            hidden = hidden + torch.tanh(self.idle(hidden))
        return nn.functional.mse_loss(self.head(hidden * self.scale).float(), targets.float())


def batch(step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(BATCH, SIZES[0], generator=generator), torch.randn(BATCH, SIZES[-1], generator=generator)


@dataclass(frozen=True)
class Engine:
    """One column of the table."""

    title: str
    num_ranks: int
    placement: str = ""
    stage: int | None = None
    """Of ZeRO; None for torch's own engines."""

    @property
    def is_zero(self) -> bool:
        return self.stage is not None

    def session(self, name: str | None, **options: Any) -> Session:
        """The model under this engine, with an optimizer unless ``name`` is None. Collective."""
        return ZeroSession(self, name, **options) if self.is_zero else TorchSession(self, name, **options)

    def alone(self, name: str | None, *, mixed: bool = False, **options: Any) -> TorchSession:
        """The same run in one process, as each rank computes it for itself."""
        return TorchSession(ONE_PROCESS, name, group=own_group(), mixed=self._precision() if mixed else "", **options)

    def deepspeed(self) -> Any:
        """The package."""
        return zero.deepspeed()

    def prepare(self, accelerator: Any, model: nn.Module, name: str, params: Any = None) -> tuple[nn.Module, Any]:
        """Model and optimizer through accelerate's door. Collective."""
        given = {} if params is None else {"params": params}
        return prepare(accelerator, model, name, print_audit=False, **options_of(name), **given)[:2]

    def _precision(self) -> str:
        """How mixed precision computes here: by casting inside the forward pass, or from a half-precision copy."""
        if self.is_zero:
            return "rounded copy"
        return "autocast" if self.placement in ("none", "ddp") else "copy"


ONE_PROCESS = Engine("one process", 1, "none")
ENGINES = (
    ONE_PROCESS,
    Engine("DDP", 2, "ddp"),
    Engine("FSDP1", 2, "fsdp1"),
    Engine("FSDP2", 2, "fsdp2 units"),
    Engine("HSDP", 4, "hsdp"),
    *(Engine(f"ZeRO-{stage}", 2, stage=stage) for stage in range(4)),
)
HAS_DEEPSPEED = find_spec("deepspeed") is not None


@cache
def leave_imports_to_live() -> None:
    """ZeRO-3 collects garbage for each engine, and would go through a million objects of the imports each time."""
    gc.collect()
    gc.freeze()


class Session:
    """One life of a model and its optimizers. Every method is collective.

    Args:
        engine: The column.
        name: Of the optimizer; "a + b" for a pair that divides the model's tensors.
        idle_until: The first step in which the idle layer takes part.
        differs: Whether each rank passes a batch of its own.
        frozen: A layer that is frozen when the optimizer is built, and but for DDP when the engine wraps the model.
        extra: More keywords of the optimizer.
        make: The plain model, called as ``Net`` is, and returning a loss.
    """

    dtype = torch.float32
    """Of the batches."""

    def __init__(
        self,
        engine: Engine,
        *,
        idle_until: int = ALWAYS,
        differs: bool = False,
        frozen: str = "",
        extra: Mapping[str, Any] | None = None,
        make: Callable[[], nn.Module] = Net,
    ) -> None:
        self.engine = engine
        self.make = make
        self.idle_until = idle_until
        self.differs = differs
        self.frozen = frozen
        self.extra = dict(extra or {})

    def loss(self, step: int) -> Tensor:
        raise NotImplementedError

    def backward(self, step: int) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def mode(self, is_training: bool) -> None:
        """Of model and optimizers."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def instances(self) -> list[UpstreamInstance]:
        """The upstream optimizers of this rank."""
        raise NotImplementedError

    def groups(self) -> list[dict[str, Any]]:
        """The param groups that the user sees."""
        raise NotImplementedError

    def without_reduction(self) -> AbstractContextManager[None]:
        """Inside, backward passes do not reduce gradients over the ranks."""
        raise NotImplementedError

    def module(self) -> nn.Module:
        """The model, as the engine shows it."""
        raise NotImplementedError

    def freeze(self, layer: str, is_frozen: bool = True) -> None:
        """Or unfreeze."""
        freeze(self.module(), layer, is_frozen)

    def train(self, steps: Sequence[int]) -> None:
        for step in steps:
            self.backward(step)
            self.step()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A forward pass without backward, and what the block does before training goes on."""
        self.mode(False)
        with torch.no_grad():
            self.loss(0)
        yield
        self.mode(True)

    def evaluate(self) -> None:
        with self.evaluation():
            pass

    def arguments(self, step: int) -> tuple[Tensor, Tensor, bool]:
        inputs, targets = (one.to(self.dtype) for one in batch(step, dist.get_rank() if self.differs else 0))
        return inputs, targets, step >= self.idle_until


def freeze(model: nn.Module, layer: str, is_frozen: bool = True) -> None:
    for name, parameter in model.named_parameters():
        if layer and layer in name.split("."):
            parameter.requires_grad_(not is_frozen)


class TorchSession(Session):
    """Under torch's engines, or under none. ``mixed`` names the way of mixed precision; a string of its own or True.

    ``is_listed``: all parameters are given to the optimizer in groups, in place of the model's own; with
    ``only_trainable`` those that are trainable then.
    """

    def __init__(
        self,
        engine: Engine,
        name: str | None,
        *,
        group: dist.ProcessGroup | None = None,
        mixed: bool | str = False,
        unused: bool = False,
        is_listed: bool = False,
        only_trainable: bool = False,
        is_wrapped_frozen: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(engine, **options)
        self.is_listed = is_listed
        self.only_trainable = only_trainable
        self.mixed = engine._precision() if mixed is True else mixed or ""
        self.group = group
        plain = self.make()
        if self.mixed == "rounded copy":
            plain.bfloat16().float()
        if engine.placement != "ddp" or is_wrapped_frozen:
            freeze(plain, self.frozen)
        self.model = place(plain, engine.placement, **self._placing(unused))
        freeze(self.model, self.frozen)
        self.copy = Net().bfloat16() if self.mixed.endswith("copy") and engine.placement == "none" else None
        self.dtype = next(plain.parameters()).dtype if self.copy is None else torch.bfloat16
        self.optimizers: list[dist_optim.DistributedOptimizer] = []
        if name is not None:
            self.build(name)

    def _placing(self, unused: bool) -> dict[str, Any]:
        if self.engine.placement == "ddp":
            return {"find_unused_parameters": unused or self.idle_until > 0}
        if not self.mixed or self.engine.placement == "none":
            return {}
        half, full = torch.bfloat16, torch.float32
        if self.engine.placement.startswith("fsdp1"):
            return {"mixed_precision": MixedPrecision(param_dtype=half, reduce_dtype=full)}
        return {"mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=full)}

    def build(self, name: str, params: Any = None) -> None:
        """``params``: as a user gives them, in place of what the session's own options say."""
        names = name.split(" + ")
        matrices = [one.parameter for fqn, one in detect(self.model).items() if fqn in ("first.weight", "idle.weight")]
        rest = [p for p in self.model.parameters() if not any(p is matrix for matrix in matrices)]
        listed = [one for one in self.model.parameters() if one.requires_grad or not self.only_trainable]
        all_given = params if params is not None else [{"params": listed}] if self.is_listed else None
        for one, params in zip(names, [all_given] if len(names) == 1 else [matrices, rest], strict=True):
            options = {**options_of(one), **self.extra, "params": params, "process_group": self.group}
            options["print_audit"] = False
            self.optimizers.append(dist_optim.build_optimizer(self.model, chosen(one), **options))

    def loss(self, step: int) -> Tensor:
        if self.copy is not None:
            for half, master in zip(self.copy.parameters(), self.model.parameters(), strict=True):
                half.data.copy_(master.data)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed == "autocast"):
            result: Tensor = (self.copy or self.model)(*self.arguments(step))
        return result

    def backward(self, step: int) -> None:
        self.loss(step).backward()
        if self.copy is not None:
            for half, master in zip(self.copy.parameters(), self.model.parameters(), strict=True):
                master.grad, half.grad = None if half.grad is None else half.grad.float(), None

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def mode(self, is_training: bool) -> None:
        self.model.train(is_training)
        for optimizer in self.optimizers:
            (optimizer.train if is_training else optimizer.eval)()

    def save(self, folder: Path) -> None:
        dist_optim.save_checkpoint(folder, self.model, self.optimizers[0])
        for at, optimizer in enumerate(self.optimizers[1:]):
            save_optimizer(folder.with_name(f"{folder.name}-{at}"), optimizer)

    def load(self, folder: Path) -> None:
        dist_optim.load_checkpoint(folder, self.model, self.optimizers[0])
        for at, optimizer in enumerate(self.optimizers[1:]):
            load_optimizer(folder.with_name(f"{folder.name}-{at}"), optimizer)

    def weights(self) -> dict[str, Tensor]:
        reshard(self.model)
        return full_parameters(self.model)

    def module(self) -> nn.Module:
        return self.model

    def instances(self) -> list[UpstreamInstance]:
        return [instance for optimizer in self.optimizers for instance in optimizer.holdings.instances]

    def groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @contextmanager
    def without_reduction(self) -> Iterator[None]:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(False)
            yield
            self.model.set_requires_gradient_sync(True)
            return
        assert isinstance(self.model, (DistributedDataParallel, FullyShardedDataParallel))
        with self.model.no_sync():
            yield

    @contextmanager
    def without_all_reduce(self) -> Iterator[None]:
        """HSDP: gradients are reduced inside the shard group, and not between its replicas."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_all_reduce(False)
        yield
        self.model.set_requires_all_reduce(True)


class ZeroSession(Session):
    """Under DeepSpeed's engine, which names the optimizer in its JSON."""

    def __init__(self, engine: Engine, name: str | None, *, mixed: bool = False, **options: Any) -> None:
        for key in ("unused", "is_listed", "is_wrapped_frozen"):
            options.pop(key, None)
        super().__init__(engine, **options)
        assert name is not None
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_clipping": 0.0,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": engine.stage},
            **self.named(name),
            **({"bf16": {"enabled": True}} if mixed else {}),
        }
        self.dtype = torch.bfloat16 if mixed else torch.float32
        self.package = engine.deepspeed()
        leave_imports_to_live()
        plain = self.make()
        freeze(plain, self.frozen)
        self.held = self.package.initialize(model=plain, optimizer=self.client(plain, name), config=config)[0]

    def named(self, name: str) -> dict[str, Any]:
        """What the JSON has of the optimizer: its name, or that there will be one that DeepSpeed does not know."""
        if "." in name:
            return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        own_name = f"dist_optim.{name}" if name == "muon" else name
        return {"optimizer": {"type": own_name, "params": {**options_of(name), **self.extra}}}

    def client(self, model: nn.Module, name: str) -> torch.optim.Optimizer | None:
        """An optimizer of the user's, where the JSON cannot name it."""
        return build_optimizer_for_engine(model, chosen(name), **options_of(name)) if "." in name else None

    def loss(self, step: int) -> Tensor:
        result: Tensor = self.held(*self.arguments(step))
        return result

    def backward(self, step: int) -> None:
        self.held.backward(self.loss(step))

    def step(self) -> None:
        self.held.step()

    def mode(self, is_training: bool) -> None:
        self.held.train(is_training)
        change: Callable[[], None] = getattr(self.held.basic_optimizer, "train" if is_training else "eval")
        change()

    def save(self, folder: Path) -> None:
        self.held.save_checkpoint(str(folder))

    def load(self, folder: Path) -> None:
        path, _ = self.held.load_checkpoint(str(folder))
        assert path is not None, "DeepSpeed found nothing to load"

    def weights(self) -> dict[str, Tensor]:
        parameters = dict(self.held.module.named_parameters())
        with self.package.zero.GatheredParameters(list(parameters.values()), enabled=self.engine.stage == 3):
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def module(self) -> nn.Module:
        module: nn.Module = self.held.module
        return module

    def instances(self) -> list[UpstreamInstance]:
        return [instance for part in self.held.basic_optimizer.parts() for instance in part.holdings.instances]

    def groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.held.optimizer.param_groups
        return groups

    def without_reduction(self) -> AbstractContextManager[None]:
        unreduced: AbstractContextManager[None] = self.held.no_sync()
        return unreduced
