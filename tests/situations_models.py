"""More rows of docs/situations.md: models and optimizer classes that people bring, and how they name parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import situations
import torch
from sessions import ENGINES, Engine, Net, Session, TorchSession, batch, options_of
from situations import ALONE, RIGHT, Outcome, Situation, is_last, refusal, trained, unchanged, zero
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as torch_doors
from torch.nn.parallel import DistributedDataParallel

from dist_optim.errors import RanksDisagreeError, UnsupportedError


class Embedded(nn.Module):
    """A vocabulary in front, from which each batch takes some rows; most of all weights are in it."""

    def __init__(self, is_sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(501, 17, sparse=is_sparse)
        self.net = Net()

    def forward(self, inputs: Tensor, targets: Tensor, with_idle: bool) -> Tensor:
        numbers = (inputs[:, 0].abs() * 100).long() % 501
        loss: Tensor = self.net(inputs + self.words(numbers), targets, with_idle)
        return loss


class Experts(nn.Module):
    """Three matrices in one tensor, which every row of a batch goes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.experts = nn.Parameter(torch.randn(3, 17, 17) / 10)

    def forward(self, inputs: Tensor, targets: Tensor, with_idle: bool) -> Tensor:
        mixed = torch.einsum("bi,eij->bj", inputs, self.experts)
        loss: Tensor = self.net(inputs + mixed, targets, with_idle)
        return loss


def half() -> nn.Module:
    return Net().bfloat16()


def sparse_model() -> nn.Module:
    return Embedded(is_sparse=True)


def by_another_type() -> nn.Module:
    """Gradients of its parameters may have a dtype of their own."""
    model = Net()
    for parameter in model.parameters():
        parameter.grad_dtype = None
    return model


def gradient_of_another_type(engine: Engine, name: str, folder: Path) -> Outcome:
    """One rank's gradients are rounded, and kept so."""
    session = engine.session(name, make=by_another_type)
    assert isinstance(session, TorchSession)
    session.train(range(2))
    before = session.weights()
    session.backward(2)
    round_gradients(session)
    outcome = refusal(UnsupportedError, session.step)
    unchanged(session, before)
    return outcome


def round_gradients(session: Session) -> None:
    """Of the last rank."""
    for parameter in session.module().parameters() if is_last() else ():
        if parameter.grad is not None:
            parameter.grad_dtype = None
            parameter.grad = parameter.grad.to(torch.bfloat16)


def sparse(engine: Engine, name: str, folder: Path) -> Outcome:
    """``nn.Embedding(sparse=True)``."""
    return refusal(UnsupportedError, lambda: engine.session(name, make=sparse_model))


def saved_and_resumed(engine: Engine, name: str, folder: Path) -> Outcome:
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        one.train(range(3))
    session.save(folder)
    resumed = engine.session(name)
    resumed.load(folder)
    for one in (session, alone, resumed):
        one.train(range(3, 6))
    situations.compare("After it was saved", session, alone)
    situations.compare("Resumed", resumed, alone)
    return Outcome(RIGHT)


def layer_absent(engine: Engine, name: str, folder: Path) -> Outcome:
    """A layer takes no part in the first steps, nor in one later, on all ranks."""
    session, alone = engine.session(name, unused=True, idle_until=2), engine.alone(name, idle_until=2)
    for one in (session, alone):
        one.train(range(4))
        one.idle_until = 5
        one.train([4])
        one.train(range(5, 7))
    situations.compare("After steps without a layer", session, alone)
    return Outcome(RIGHT)


def of_named_parameters(engine: Engine, name: str, folder: Path) -> Outcome:
    """Pairs of name and parameter, as torch's optimizers take them."""
    session, alone = engine.session(None), engine.alone(None)
    for one in (session, alone):
        assert isinstance(one, TorchSession)
        one.build(name, list(one.model.named_parameters()))
        one.train(range(4))
    situations.compare("By named parameters", session, alone)
    return Outcome(RIGHT)


def argument_differs(engine: Engine, name: str, folder: Path) -> Outcome:
    """One rank was started with another decay."""
    decay = 0.1 if is_last() else 0.2
    return refusal(RanksDisagreeError, lambda: engine.session(name, extra={"weight_decay": decay}))


def wrapped_again(engine: Engine, name: str, folder: Path) -> Outcome:
    """Memory ends inside backward, and the same model is wrapped and built again, for smaller batches."""
    session, alone = engine.session(name), engine.alone(name)
    assert isinstance(session, TorchSession) and isinstance(session.model, DistributedDataParallel)
    alone.train(range(3))
    session.train(range(1))
    plain = session.model.module
    head: Any = plain.first
    handle = head.weight.register_hook(out_of_memory)
    try:
        session.backward(1)
        raise AssertionError("memory did not end")
    except torch.OutOfMemoryError:
        handle.remove()
    del session
    for parameter in plain.parameters():
        parameter.grad = None
    plain.load_state_dict(Net().state_dict())
    again = engine.session(name, make=lambda: plain)
    again.train(range(3))
    situations.compare("Wrapped again", again, alone)
    return Outcome(RIGHT)


def out_of_memory(gradient: Tensor) -> None:
    raise torch.OutOfMemoryError("out of memory. Tried to allocate 20 MiB")


def gone_on_by_plain_torch(engine: Engine, name: str, folder: Path) -> Outcome:
    """All of model and state through torch's functions into a plain model and torch's own class."""
    session, alone = engine.session(name), engine.alone(name)
    assert isinstance(session, TorchSession)
    session.train(range(3))
    alone.train(range(6))
    whole = torch_doors.StateDictOptions(full_state_dict=True)
    weights, state = torch_doors.get_state_dict(session.model, session.optimizers, options=whole)
    plain = Plain(name)
    torch_doors.set_state_dict(
        plain.model, plain.optimizer, model_state_dict=weights, optim_state_dict=state, options=whole
    )
    plain.train(range(3, 6))
    situations.compare("Gone on by plain torch", plain, alone)
    return Outcome(RIGHT)


class Plain:
    """A plain model and an upstream class, as a script without us has them."""

    def __init__(self, name: str, divide: Callable[[nn.Module], Any] = nn.Module.parameters) -> None:
        assert name == "adamw_torch"
        self.model = Net()
        self.optimizer = torch.optim.AdamW(divide(self.model), **options_of(name))

    def train(self, steps: Iterable[int], num_parts: int = 1) -> None:
        """Each step from so many batches, one after the other."""
        for step in steps:
            for part in range(num_parts):
                (self.model(*batch(num_parts * step + part), True) / num_parts).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return {name: one.detach().clone() for name, one in self.model.named_parameters()}


def by_its_own_method(engine: Engine, name: str, folder: Path) -> Outcome:
    """A class that averages weights, and has a method that puts the average in their place and back."""
    session, alone = engine.session(name), engine.alone(name)
    for one in (session, alone):
        assert isinstance(one, TorchSession)
        optimizer: Any = one.optimizers[0]
        one.train(range(3))
        optimizer.swap()
    situations.compare("Swapped", session, alone)
    for one in (session, alone):
        assert isinstance(one, TorchSession)
        optimizer = one.optimizers[0]
        optimizer.swap()
        one.train(range(3, 5))
    situations.compare("Swapped back and trained", session, alone)
    return Outcome(RIGHT)


KEEPS_GRADIENTS = "DeepSpeed keeps the gradients itself"
HAS_MASTERS = "DeepSpeed keeps fp32 masters of such a model: mixed precision, above"
DDP_ALONE = {engine.title: "no hook of it outlasts the wrapper" for engine in ENGINES if engine.title != "DDP"}
BY_CLIENT = zero("DeepSpeed's engine takes the optimizer's parameters from the model, and flattens them")
MODELS = (
    Situation(
        "a bf16 model without fp32 masters",
        partial(trained, make=half),
        ("adamw_torch", "stable_adamw"),
        zero(HAS_MASTERS),
    ),
    Situation("Muon for the whole model, by one name", partial(trained, extra={"rest": "adamw_torch"}), ("muon",)),
    Situation("experts in one tensor, as matrices", partial(trained, make=Experts), ("galore_adamw", "muon")),
    Situation("one tensor is most of the model", partial(trained, make=Embedded), ("stable_adamw", "adafactor")),
    Situation("a sparse embedding", sparse),
    Situation(
        "a gradient of another dtype than its parameter's", gradient_of_another_type, not_for=zero(KEEPS_GRADIENTS)
    ),
    Situation("named parameters", of_named_parameters, not_for=BY_CLIENT),
    Situation("an argument of the build differs on one rank", argument_differs, not_for=ALONE),
    Situation(
        "classes without a description, saved and resumed",
        saved_and_resumed,
        ("pytorch_optimizer.SOAP", "pytorch_optimizer.AggMo", "pytorch_optimizer.StableSPAM"),
    ),
    Situation("a class that shares a step size among tensors", saved_and_resumed, ("pytorch_optimizer.DAdaptLion",)),
    Situation(
        "a class that clips by a norm over all, bf16",
        partial(trained, make=half),
        ("proof_traps.ClipsGlobally",),
        zero(HAS_MASTERS),
    ),
    Situation("a class that reads an absent gradient as zeros", layer_absent, ("proof_traps.ReadsAbsentAsZero",)),
    Situation(
        "a class with a method of its own",
        by_its_own_method,
        ("any_classes.Averaging",),
        zero("DeepSpeed's wrapper has upstream's methods no more"),
    ),
    Situation("memory ends in backward, wrapped and built again", wrapped_again, not_for=DDP_ALONE),
    Situation(
        "gone on with by plain torch", gone_on_by_plain_torch, ("adamw_torch",), zero("DeepSpeed's engine holds both")
    ),
)
"""In the order of the table."""
