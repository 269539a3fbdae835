"""More rows of docs/situations.md: what loops with accelerate call, on each of its strategies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import situations
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.local_sgd import LocalSGD
from accelerate.utils import GradientAccumulationPlugin
from accelerated import Training, started_by_accelerate
from fresh import forget
from placements import full_parameters
from sessions import BATCH, ENGINES, Engine, Net, batch, leave_imports_to_live, options_of
from situations import ALONE, RIGHT, Defect, Outcome, Situation, refusal, unchanged, zero
from situations_alone import refused_alone
from situations_models import Plain
from torch import Tensor, nn

from dist_optim.errors import ParameterError, RanksDisagreeError, UnsupportedError
from dist_optim.integrations.accelerate import prepare
from dist_optim.integrations.cpu_rehearsal import deepspeed_arguments
from dist_optim.layouts.detect import reshard

STRATEGIES = {"none": "ddp", "ddp": "ddp", "fsdp1": "fsdp1", "fsdp2 units": "fsdp2", "hsdp": "hsdp"}
DIFFERENT = ("adamw_torch", "galore_adamw", "schedule_free_adamw")


@contextmanager
def accelerator_of(engine: Engine, num_parts: int = 1) -> Iterator[Accelerator]:
    """As a rank of ``accelerate launch`` makes it. Its process-wide state ends with the context."""
    if not engine.is_zero:
        training = Training("", {}, accumulation=num_parts, settings={"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"})
        with started_by_accelerate(STRATEGIES[engine.placement], training) as accelerator:
            yield accelerator
        return
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": num_parts,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": engine.stage},
    }
    with mock.patch.dict("os.environ"):
        engine.deepspeed()
        leave_imports_to_live()
        try:
            yield Accelerator(
                **deepspeed_arguments(),
                deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=num_parts, sync_with_dataloader=False
                ),
            )
        finally:
            forget()


@dataclass
class Prepared:
    """A model and its optimizer, as ``prepare`` returned them."""

    engine: Engine
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    differs: bool = False
    """Whether each rank passes batches of its own."""

    def train(self, steps: Iterable[int], num_parts: int = 1) -> None:
        """Each step from so many batches, one after the other."""
        for step in steps:
            for part in range(num_parts):
                number = num_parts * step + part
                with self.accelerator.accumulate(self.model):
                    loss = self.model(*batch(number, dist.get_rank() if self.differs else 0), True)
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        if not self.engine.is_zero:
            reshard(self.model)
            return full_parameters(self.model)
        held: Any = self.model
        parameters = dict(held.module.named_parameters())
        with self.engine.deepspeed().zero.GatheredParameters(list(parameters.values()), enabled=self.engine.stage == 3):
            return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@contextmanager
def prepared(engine: Engine, name: str, num_parts: int = 1, differs: bool = False) -> Iterator[Prepared]:
    with accelerator_of(engine, num_parts) as accelerator:
        yield Prepared(engine, accelerator, *engine.prepare(accelerator, Net(), name), differs)


def halves(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, and the rest at another rate."""
    matrices, rest = ([one for one in model.parameters() if (one.ndim == 2) is here] for here in (True, False))
    return [{"params": matrices}, {"params": rest, "lr": 1e-3}]


def groups_of_the_plain_model(engine: Engine, name: str, folder: Path) -> Outcome:
    with accelerator_of(engine) as accelerator:
        model, plain = Net(), Plain(name, halves)
        one = Prepared(engine, accelerator, *engine.prepare(accelerator, model, name, halves(model)))
        one.train(range(4))
        plain.train(range(4))
        situations.compare("By groups", one, plain)
    return Outcome(RIGHT)


def accumulated(engine: Engine, name: str, folder: Path) -> Outcome:
    plain = Plain(name)
    plain.train(range(3), num_parts=2)
    with prepared(engine, name, num_parts=2) as one:
        one.train(range(3), num_parts=2)
        situations.compare("Accumulated", one, plain)
    return Outcome(RIGHT)


class Counter:
    """What a script registers, to be saved with all else."""

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


def saved_with_all_else(engine: Engine, name: str, folder: Path) -> Outcome:
    """``save_state`` and ``load_state`` with a hook before each and a registered object; into a used optimizer."""
    alone, seen = engine.alone(name), []
    alone.train(range(4))
    with prepared(engine, name) as one:
        counter = Counter()
        one.accelerator.register_for_checkpointing(counter)
        one.accelerator.register_save_state_pre_hook(lambda *_: seen.append("saved"))
        one.train(range(2))
        counter.value = 2
        one.accelerator.save_state(str(folder))
        one.train(range(2, 4))
        situations.compare("After it was saved", one, alone)
    with prepared(engine, name) as one:
        counter = Counter()
        one.accelerator.register_for_checkpointing(counter)
        one.accelerator.register_load_state_pre_hook(lambda *_: seen.append("loaded"))
        one.train([7])
        one.accelerator.load_state(str(folder))
        if counter.value != 2 or seen != ["saved", "loaded"]:
            raise Defect(f"hooks or objects were left out: {counter.value}, {seen}")
        one.train(range(2, 4))
        situations.compare("Resumed", one, alone)
    return Outcome(RIGHT)


def two_models(engine: Engine, name: str, folder: Path) -> Outcome:
    """Two in one accelerator, trained in turns, saved and resumed together."""
    alone = engine.alone(name)
    alone.train(range(4))
    for is_resumed in (False, True):
        with prepared(engine, name) as first:
            accelerator = first.accelerator
            second = Prepared(engine, accelerator, *engine.prepare(accelerator, Net(), "adamw_torch"))
            pair = ((first, alone), (second, engine.alone("adamw_torch")))
            pair[1][1].train(range(4))
            steps = [7] if is_resumed else [0, 1]
            for one, _ in pair:
                one.train(steps)
            (accelerator.load_state if is_resumed else accelerator.save_state)(str(folder))
            for one, reference in pair:
                one.train(range(2, 4))
                situations.compare("One of two models", one, reference)
    return Outcome(RIGHT)


def uneven(engine: Engine, name: str, folder: Path) -> Outcome:
    """``join_uneven_inputs`` where ranks may stop at different steps."""
    alone = engine.alone(name)
    alone.train(range(2))
    with prepared(engine, name) as one:
        call = partial(one.accelerator.join_uneven_inputs, [one.model], even_batches=False)
        outcome = refusal(UnsupportedError, call)
        one.train(range(2))
        situations.compare("Gone on", one, alone)
    return outcome


def saved_by_one(engine: Engine, name: str, folder: Path) -> Outcome:
    alone = engine.alone(name)
    alone.train(range(3))
    with prepared(engine, name) as one:
        one.train(range(2))
        return refused_alone(one, alone, folder, lambda session, at: session.accelerator.save_state(str(at)))


def local_sgd(engine: Engine, name: str, folder: Path) -> Outcome:
    """accelerate's own, which lets each rank step by its own gradients, and averages weights now and then."""
    with prepared(engine, name, differs=True) as one:
        before = one.weights()
        with LocalSGD(one.accelerator, one.model, local_sgd_steps=2):
            outcome = refusal(RanksDisagreeError, lambda: one.train([0]))
            unchanged(one, before)  # type: ignore[arg-type]
    return outcome


def built_before(engine: Engine, name: str, folder: Path) -> Outcome:
    """An optimizer of torch's, as accelerate's own examples have it."""
    with accelerator_of(engine) as accelerator:
        model = Net()
        stock: Any = torch.optim.AdamW(model.parameters(), **options_of(name))
        outcome = refusal(ParameterError, lambda: prepare(accelerator, model, stock))
        one = Prepared(engine, accelerator, *engine.prepare(accelerator, model, name))
        alone = engine.alone(name)
        for side in (one, alone):
            side.train(range(3))
        situations.compare("Prepared by its name", one, alone)
    return outcome


ONE_FOR_EACH = "accelerate has one DeepSpeed engine for each plugin"
SERVES_DDP = {engine.title: "accelerate's LocalSGD takes DDP alone" for engine in ENGINES if engine.title != "DDP"}
WITH_ACCELERATE = (
    Situation("accelerate: groups of the plain model", groups_of_the_plain_model, ("adamw_torch",)),
    Situation("accelerate: gradients accumulated by accumulate()", accumulated, ("adamw_torch",)),
    Situation("accelerate: save_state and load_state, hooks and objects", saved_with_all_else, DIFFERENT),
    Situation("accelerate: two models, saved and resumed", two_models, ("galore_adamw",), zero(ONE_FOR_EACH)),
    Situation("accelerate: an optimizer that is built already", built_before, ("adamw_torch",)),
    Situation("accelerate: uneven inputs (join_uneven_inputs)", uneven, not_for=ALONE),
    Situation("accelerate: save_state by one rank", saved_by_one, not_for=ALONE),
    Situation("accelerate: LocalSGD", local_sgd, not_for=SERVES_DDP),
)
"""In the order of the table."""
