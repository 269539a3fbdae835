"""One training step of a ``DistributedOptimizer`` taken a few parameters at a time, in the order of their gradients.

``begin``, then ``update`` for each set of parameters, then ``finish``: together they are ``DistributedOptimizer.step``.
Every parameter is updated once, and what upstream counts in its groups moves on once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dist_optim.errors import WrongModeError
from dist_optim.exchange.norms import combine_norms, norm_in_fp32
from dist_optim.exchange.plan import Bucket, Item, make_plan
from dist_optim.exchange.transfer import Task, gather_to_owner, run_tasks, scatter_from_owner
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.stepping.presence import agree_on_hyperparameters, hyperparameters_of
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["PartialStep"]

ONE_ROUND = 1 << 62


class PartialStep:
    """The parts of a step, over the upstream optimizers of one ``DistributedOptimizer``.

    Gradients come as ``{index: this rank's part}``. All methods are collective; every rank gives the same indices in
    the same order.
    """

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        self._optimizer = optimizer
        self._group = optimizer.process_group
        self._rank, self._world_size = own_rank(self._group), num_ranks(self._group)
        self._placed = optimizer.placed_parameters()
        self._instance_of: dict[int, UpstreamInstance] = {}
        self._bucket_of: dict[int, Bucket] = {}
        self._items: dict[int, Item] = {}
        self._owners = dict(optimizer.plan.owners)
        for bucket, instance in zip(optimizer.plan.buckets, optimizer.owner_instances(), strict=True):
            for item in bucket.items:
                self._items[item.index], self._bucket_of[item.index] = item, bucket
                self._instance_of[item.index] = instance
        self._total: Tensor | None = None
        self._norms: dict[int, Tensor] = {}
        self._agreed: list[tuple[str, object]] = []

    def travels(self, index: int) -> bool:
        """Whether updating this parameter exchanges tensors between ranks."""
        return self._world_size > 1 and index in self._items

    # The parts ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Agree on hyperparameters, and give them to upstream.

        Raises:
            StepFailedError: Upstream's step failed on another rank in the step before.
            WrongModeError: The averaged weights are in place: ``eval()`` was called, and ``train()`` not since.
            RanksDisagreeError: A hyperparameter differs between ranks.
        """
        optimizer = self._optimizer
        if optimizer.mode == "eval":
            raise WrongModeError(
                f"{optimizer.spec.name}: backward after eval(), while the averaged weights are in place. Call "
                "optimizer.train() on all ranks before the forward pass of each training phase."
            )
        optimizer.failures.receive(optimizer.spec.name, optimizer.num_steps)
        self._agreed = hyperparameters_of(optimizer.param_groups, optimizer.pushed_keys)
        agree_on_hyperparameters(self._agreed, self._placed[0].device, self._group)
        for instance in optimizer.instances():
            instance.push_hyperparameters(optimizer.param_groups, optimizer.pushed_keys)

    @torch.no_grad()
    def update(self, gradients: Mapping[int, Tensor]) -> None:
        """Update these parameters by their gradients."""
        for instance, indices in self._by_instance(gradients):
            if self._total is not None:
                self._optimizer.spec.driver.take_total_norm(instance.optimizer, self._total)
            if instance is self._optimizer.local_instance:
                self._update_locally(instance, {index: gradients[index] for index in indices})
            else:
                run_tasks([self._update_task(self._bucket(indices, self._items, self._owners), instance, gradients)])

    def finish(self) -> None:
        """End the training step: groups move on, and every rank learns of a failure.

        Raises:
            WrongModeError: A hyperparameter was changed since ``begin``: the updates are made with the old value.
        """
        optimizer = self._optimizer
        now = hyperparameters_of(optimizer.param_groups, optimizer.pushed_keys)
        changed = [name for (name, old), (_, new) in zip(self._agreed, now, strict=True) if old != new]
        if changed:
            raise WrongModeError(
                f"{optimizer.spec.name}: {changed[0]} was changed between backward and step(), after the updates were "
                "made. Change hyperparameters after step(), as schedulers do: scheduler.step() follows "
                "optimizer.step()."
            )
        for instance in optimizer.instances():
            instance.tick(optimizer.pushed_keys)
        self._total = None
        optimizer.end_step()

    # The norm of all gradients ------------------------------------------------------------------------------------

    @property
    def lacks_total_norm(self) -> bool:
        """Whether updates need the norm of all gradients together, and it has not been measured in this step."""
        return self._optimizer.needs_total_norm and self._total is None

    @torch.no_grad()
    def measure(self, gradients: Mapping[int, Tensor]) -> None:
        """Take the norms of these gradients, each of the whole tensor; nothing is updated."""
        whole = [index for index in gradients if self._holds_all_of(index)]
        self._norms.update({index: norm_in_fp32(gradients[index]) for index in whole})
        cut = [index for index in gradients if not self._holds_all_of(index)]
        if cut:
            items = [self._plain_item(index) for index in cut]
            plan = make_plan(items, self._world_size, ONE_ROUND)
            run_tasks(self._norm_task(bucket, gradients) for bucket in plan.buckets)

    @torch.no_grad()
    def finish_measuring(self) -> Tensor:
        """Combine the norms, in the order of ``model.parameters()``; ``update`` clips by it until ``finish``."""
        order = sorted(self._norms, key=lambda index: self._placed[index].position)
        is_whole = [self._holds_all_of(index) for index in order]
        norms = [self._norms[index] for index in order]
        self._total = combine_norms(norms, is_whole, self._placed[0].device, self._group)
        self._norms.clear()
        return self._total

    def _norm_task(self, bucket: Bucket, gradients: Mapping[int, Tensor]) -> Task[None]:
        (full,) = yield from gather_to_owner(bucket, [gradients], self._group)
        for item in bucket.items:
            is_here = item.index in full
            self._norms[item.index] = norm_in_fp32(full[item.index]) if is_here else torch.zeros((), device=item.device)

    def _holds_all_of(self, index: int) -> bool:
        return self._world_size == 1 or self._placed[index].layout.is_replicated

    def _plain_item(self, index: int) -> Item:
        placed = self._placed[index]
        return Item(index, placed.shape, placed.layout, placed.dtype, placed.device, float(placed.shape.numel()))

    # Updating -----------------------------------------------------------------------------------------------------

    def _by_instance(self, indices: Iterable[int]) -> Iterable[tuple[UpstreamInstance, list[int]]]:
        found: dict[int, tuple[UpstreamInstance, list[int]]] = {}
        for index in indices:
            instance = self._instance_of.get(index) or self._optimizer.local_instance
            assert instance is not None
            found.setdefault(id(instance), (instance, []))[1].append(index)
        return found.values()

    def _update_locally(self, instance: UpstreamInstance, gradients: Mapping[int, Tensor]) -> None:
        parameters = {index: self._placed[index].local() for index in gradients}
        for index, tensor in instance.step_each(parameters, gradients, self._optimizer.pushed_keys).items():
            if tensor.data_ptr() != parameters[index].data_ptr():
                parameters[index].copy_(tensor)
        instance.release(gradients.keys())

    def _update_task(self, bucket: Bucket, instance: UpstreamInstance, gradients: Mapping[int, Tensor]) -> Task[None]:
        parameters = {item.index: self._placed[item.index].local() for item in bucket.items}
        fields = [gradients, parameters]
        full_gradients, full_parameters = yield from gather_to_owner(bucket, fields, self._group)
        try:
            updated = instance.step_each(full_parameters, full_gradients, self._optimizer.pushed_keys)
        except Exception as error:  # the other ranks wait for this bucket: go on, and raise at the end of the step
            self._optimizer.failures.note(error)
            updated = full_parameters
        del full_gradients, full_parameters
        yield from scatter_from_owner(bucket, updated, parameters, self._group)
        instance.release(updated.keys())

    def _bucket(self, indices: Iterable[int], items: Mapping[int, Item], owners: Mapping[int, int]) -> Bucket:
        owned: dict[int, list[Item]] = defaultdict(list)
        for index in indices:
            owned[owners[index]].append(items[index])
        like = self._bucket_of[next(iter(indices))]
        by_rank = tuple(tuple(owned[rank]) for rank in range(self._world_size))
        return Bucket(like.index, by_rank, like.is_replicated, like.dtype, like.device)
