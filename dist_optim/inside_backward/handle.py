"""Steps inside backward: a parameter is updated as soon as its reduced gradient is there, which is freed at once.

LOMO's idea, for every optimizer that steps tensors one by one. Gradients never exist all at once: at most a bucket and
the largest of them. In the training loop nothing changes::

    loss.backward()         # updates
    optimizer.step()        # ends the step: counters, failures of other ranks
    optimizer.zero_grad()   # nothing left to do

Where reduced gradients come from: in one process from autograd; under DistributedDataParallel from buckets of our own
(``fused_ddp``); under FSDP2 from its reduce-scatter, which runs the same hooks. Ranks must take the same way through
the model under FSDP2, as FSDP2's own collectives demand; under DDP they need not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_optim.errors import DistOptimError, StepFailedError, UnsupportedError, WrongModeError
from dist_optim.inside_backward.ddp import BucketReduction, retire_reducer
from dist_optim.inside_backward.guards import guard_clipping, mark, marked_by, unmark
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.ranks.agreement import num_ranks
from dist_optim.stepping.optimizer import DEFAULT_BUCKET_BYTES, DistributedOptimizer

__all__ = ["FusedBackward", "Shards", "follow", "install"]


def install(
    optimizer: DistributedOptimizer,
    model: nn.Module,
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    shards: Shards | None = None,
) -> FusedBackward:
    """Let backward make the updates of ``optimizer``; ``build_optimizer(..., fused_backward=True)`` calls this.

    Collective; after building, before the first backward. Ask ``fused_guards.why_not_fused`` before.

    Args:
        optimizer: Not yet stepped from stored gradients.
        model: The model that it was built on.
        bucket_bytes: Bytes of gradients that wait for each other: in a bucket under DistributedDataParallel, on the way
            to their owners under FSDP2.
        shards: How an engine that leaves full gradients on its sharded parameters is served.

    Raises:
        WrongModeError: The model has gradients already, or another fused backward.
    """
    fused = FusedBackward(optimizer, model, bucket_bytes, shards)
    optimizer.inside_backward = fused
    return fused


def follow(optimizer: DistributedOptimizer, model: nn.Module) -> None:
    """Let backward make the updates for another wrapper of the same model, where it made them for one. Collective."""
    fused = optimizer.inside_backward
    if isinstance(fused, FusedBackward) and isinstance(model, DistributedDataParallel) and not fused.serves(model):
        fused.remove()
        install(optimizer, model, bucket_bytes=fused.bucket_bytes)


class Shards:
    """How gradients come to this rank's parts of parameters: already reduced, unless an engine's subclass does it."""

    def parameter(self, placed: PlacedParameter) -> nn.Parameter:
        """The parameter that autograd knows."""
        return placed.parameter

    def reduced(self, placed: PlacedParameter, gradient: Tensor) -> Tensor:
        """This rank's part of the averaged gradient. Collective where there is something to reduce."""
        return gradient

    def end_backward(self) -> None:
        """After a backward pass: let the engine forget the full parameters, which are old now."""


class FusedBackward:
    """The hooks on a model's parameters; ``remove`` takes them off. Made by ``install``."""

    def __init__(
        self,
        optimizer: DistributedOptimizer,
        model: nn.Module,
        bucket_bytes: int,
        shards: Shards | None = None,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._model = weakref.ref(model)
        self.bucket_bytes = bucket_bytes
        self._name = optimizer.spec.name
        self._placed = optimizer.placed_parameters()
        self._shards = shards or Shards()
        trained = optimizer.holdings.trained
        self._refuse_leftovers()
        self._steps = optimizer.training_step
        self._has_begun = False
        self._is_measuring = False
        self._has_updated = False
        self._seen: set[int] = set()
        self._removers: list[Callable[[], None]] = []
        held = optimizer.holdings
        travelling = set(held.plan.owners) if num_ranks(held.process_group) > 1 else set()
        deliver = _weakly(self._deliver)
        self._source: _Queue | BucketReduction = _Queue(travelling, self._placed, bucket_bytes, deliver)
        if isinstance(model, DistributedDataParallel):
            self._removers.append(retire_reducer(model))
            self._source = BucketReduction(self._placed, trained, held.process_group, bucket_bytes, deliver)
        self._removers += [self._watch(index) for index in trained]
        guard_clipping()

    @property
    def active(self) -> bool:
        """Whether backward makes the updates."""
        return bool(self._removers)

    def serves(self, model: nn.Module) -> bool:
        """Whether it was installed on this wrapper."""
        return self._model() is model

    def held_bytes(self) -> int:
        """Bytes of gradients that this rank holds now, for the updates to come: what ``param.grad`` would show."""
        return self._source.held_bytes()

    def remove(self) -> None:
        """Take the hooks off: gradients are stored again, and ``step`` updates from them.

        A DistributedDataParallel wrapper reduces no longer, and refuses to train: wrap the module anew.
        """
        for remove in self._removers:
            remove()
        self._removers = []
        optimizer = self._optimizer()
        if optimizer is not None and optimizer.inside_backward is self:
            optimizer.inside_backward = None

    def _watch(self, index: int) -> Callable[[], None]:
        """Hooks hold this object weakly: when its optimizer is gone, they do nothing."""
        parameter, own = self._shards.parameter(self._placed[index]), weakref.ref(self)
        if marked_by(parameter) is not None:
            raise WrongModeError(
                f"{self._placed[index].fqn!r} is already updated inside backward by another optimizer. Call "
                "optimizer.inside_backward.remove() of that one first."
            )
        mark(parameter, self)

        def on_gradient(ready: Tensor) -> None:
            fused = own()
            if fused is not None:
                fused._on_gradient(index)

        is_frozen = not parameter.requires_grad
        parameter.requires_grad_(True)  # torch takes no hook otherwise, and keeps it
        handle = parameter.register_post_accumulate_grad_hook(on_gradient)
        parameter.requires_grad_(not is_frozen)

        def remove() -> None:
            handle.remove()
            unmark(parameter)

        return remove

    # Inside backward ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _on_gradient(self, index: int) -> None:
        placed = self._placed[index]
        if index in self._seen:
            raise WrongModeError(self._why_no_accumulation(placed))
        self._seen.add(index)
        self._begin()
        parameter = self._shards.parameter(placed)
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise UnsupportedError(
                f"The gradient of {placed.fqn!r} is sparse. Set sparse=False in the embedding, or use "
                "fused_backward=False."
            )
        if misplaced := placed.why_misplaced(gradient):
            raise UnsupportedError(
                f"The gradient of {placed.fqn!r} {misplaced} Build with fused_backward=False for it."
            )
        parameter.grad = None
        part = placed.part_of(gradient)
        _wait_for_copy(part)
        self._source.ready(index, self._shards.reduced(placed, part))

    def _begin(self) -> None:
        """At the first gradient of a training step."""
        if not self._has_begun:
            self._steps.begin(problem=self._values(), before_backward=True)
            self._has_begun = True
        if self._steps.lacks_total_norm and not self._is_measuring:
            raise WrongModeError(
                f"{self._name}: clip_grad_norm needs the norm of all gradients before the first update, and so a "
                "backward pass of its own. Call optimizer.backward(loss) in place of loss.backward(): it makes both. "
                "Or leave clip_grad_norm out, use clip_grad_value, or build with fused_backward=False."
            )

    def _values(self) -> DistOptimError | None:
        """What is wrong with the values in the param groups: no update may be made by them."""
        optimizer = self._optimizer()
        return None if optimizer is None else optimizer.problem_in_groups()

    def _deliver(self, gradients: Mapping[int, Tensor]) -> None:
        if self._is_measuring:
            self._steps.measure(gradients)
        else:
            self._has_updated = True
            self._steps.update(gradients)

    def backward(self, loss: Tensor) -> Tensor | None:
        """``loss.backward()``, twice where the norm of all gradients is needed; returns that norm. Collective.

        Raises:
            StepFailedError: It failed after updates were made. Before any, what it failed with is raised, and the next
                backward pass starts anew.
        """
        try:
            norm = self._measure(loss) if self._steps.lacks_total_norm else None
            torch.autograd.backward(loss)
        except Exception as error:
            if not self._has_updated:
                self._forget()
                raise
            self._steps.abandon()
            if isinstance(error, DistOptimError):
                raise
            raise StepFailedError(
                f"{self._name}: backward failed with {type(error).__name__} after a part of its updates was made: "
                "the weights are half of a step, and no smaller batch can repeat it. Load the last checkpoint, or "
                "build the model anew, and set a smaller batch size there; or build with fused_backward=False."
            ) from error
        return norm

    def _forget(self) -> None:
        """What a backward pass has left that ended early."""
        for index in self._seen:
            self._shards.parameter(self._placed[index]).grad = None
        self._has_begun = self._has_updated = False
        self._seen.clear()
        self._source.forget()
        self._steps.forget_norms()

    def _measure(self, loss: Tensor) -> Tensor:
        self._is_measuring = True
        try:
            torch.autograd.backward(loss, retain_graph=True)
            self._begin()
            self._source.flush()
            self._shards.end_backward()
        finally:
            self._is_measuring = False
        self._seen.clear()
        total = self._steps.total()
        self._steps.clip_updates_by(total)
        return total

    def finish_step(self, problem: DistOptimError | None) -> None:
        """End the training step. Collective.

        Args:
            problem: What this rank found wrong with the model: all ranks raise it.

        Raises:
            WrongModeError: On all ranks: a gradient was put in place by other means than backward, or hyperparameters
                were changed between backward and here.
            StepFailedError: On all ranks: upstream's step failed on one.
        """
        if not self._has_begun:
            self._steps.begin(before_backward=True)
        self._source.flush()
        self._shards.end_backward()
        problem = problem or self._stored()
        if problem is not None:
            self._steps.agreement.note(problem)
        self._has_begun = self._has_updated = False
        self._seen.clear()
        self._steps.end()
        if isinstance(self._source, BucketReduction):
            self._source.learn_order()

    # Refusals -----------------------------------------------------------------------------------------------------

    def _stored(self) -> WrongModeError | None:
        stored = next((placed.fqn for placed in self._placed if placed.parameter.grad is not None), None)
        if stored is None:
            return None
        return WrongModeError(
            f"{self._name}: {stored!r} has a stored gradient at step(), but this optimizer updates inside backward. It "
            "was set by hand, or the parameter was frozen when the optimizer was built, and no group named it. Let it "
            "be trainable when the optimizer is built, and freeze it after that; or build with fused_backward=False."
        )

    def _refuse_leftovers(self) -> None:
        for placed in self._placed:
            if placed.parameter.grad is not None:
                raise WrongModeError(
                    f"{placed.fqn!r} has a gradient already. Call model.zero_grad() before the optimizer is built with "
                    "a fused backward."
                )

    def _why_no_accumulation(self, placed: PlacedParameter) -> str:
        return (
            f"{self._name}: {placed.fqn!r} got a second gradient before step(). Its first was applied inside backward "
            "and is gone, so gradients cannot be accumulated. Call optimizer.step() after every backward; for larger "
            "batches raise the batch size or the number of ranks, with activation checkpointing (use_reentrant=False) "
            "if memory is short; or build the optimizer with fused_backward=False, which stores gradients."
        )

    def why_no_clipping(self) -> str:
        """What to say to who would clip gradients that are gone."""
        return (
            f"{self._name}: gradients cannot be clipped between backward and step(): they were applied and freed "
            "inside backward. Turn clipping off (max_grad_norm=0 in a Trainer, no clip_grad_norm_ call). lomo and "
            "adalomo take clip_grad_value, and clip_grad_norm with optimizer.backward(loss). fused_backward=False "
            "stores gradients, and clips as usual."
        )


def _weakly(deliver: Callable[[Mapping[int, Tensor]], None]) -> Callable[[Mapping[int, Tensor]], None]:
    """Where gradients come from does not keep alive where they go to: that one goes when its optimizer does."""
    method = weakref.WeakMethod(deliver)

    def deliver_weakly(gradients: Mapping[int, Tensor]) -> None:
        living = method()
        if living is not None:
            living(gradients)

    return deliver_weakly


class _Queue:
    """Gradients that are reduced already: each is handed on at once, or waits for others to travel to owners with."""

    def __init__(
        self,
        travelling: Collection[int],
        placed: Sequence[PlacedParameter],
        bucket_bytes: int,
        deliver: Callable[[Mapping[int, Tensor]], None],
    ) -> None:
        self._travelling = travelling
        self._placed = placed
        self._bucket_bytes = bucket_bytes
        self._deliver = deliver
        self._waiting: dict[int, Tensor] = {}
        self._nbytes = 0

    def ready(self, index: int, gradient: Tensor) -> None:
        """Take a gradient."""
        if index not in self._travelling:
            self._deliver({index: gradient})
            return
        # Counted in full tensors, equal on all ranks: so all of them empty the queue at the same parameter.
        nbytes = self._placed[index].shape.numel() * self._placed[index].dtype.itemsize
        if self._nbytes + nbytes > self._bucket_bytes:
            self.flush()
        self._waiting[index] = gradient
        self._nbytes += nbytes

    def held_bytes(self) -> int:
        """Bytes of this rank's parts of the gradients that wait."""
        return sum(gradient.nbytes for gradient in self._waiting.values())

    def forget(self) -> None:
        """Drop all that wait."""
        self._waiting, self._nbytes = {}, 0

    def flush(self) -> None:
        """Hand on all that wait."""
        waiting, self._waiting, self._nbytes = self._waiting, {}, 0
        if waiting:
            self._deliver(waiting)


def _wait_for_copy(gradient: Tensor) -> None:
    """One that FSDP2 offloads to pinned memory may still be on its way when hooks run; torch 2.13 waits itself."""
    if gradient.is_cpu and gradient.is_pinned():
        torch.accelerator.synchronize()
