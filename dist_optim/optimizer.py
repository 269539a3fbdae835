"""``DistributedOptimizer``: any upstream optimizer, with its one-process trajectory, on sharded parameters.

A step reads as the idea does. Elementwise groups run upstream on the local slices. For everything else, bucket by
bucket: full tensors to their owners, the upstream step there, updated tensors back to the ranks that hold them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from dist_optim import state_dicts
from dist_optim.agreement import agree_on_presence, assert_ranks_equal, num_ranks, own_rank
from dist_optim.audit import route_audit
from dist_optim.errors import ParameterError, RanksDisagreeError, UnsupportedError, WrongModeError
from dist_optim.exchange.plan import Bucket, Item, Plan, make_plan
from dist_optim.exchange.transfer import Task, gather_to_owner, run_tasks, scatter_from_owner
from dist_optim.fingerprints import fingerprint
from dist_optim.hyperparameters import Scope
from dist_optim.instance import UpstreamInstance
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.registry import OptimizerSpec, Trait
from dist_optim.upstream import ParamGroup

__all__ = ["DistributedOptimizer"]

DEFAULT_BUCKET_BYTES = 64 << 20
MAX_NAMES = 8


class DistributedOptimizer(Optimizer):
    """An unmodified upstream optimizer over a placed model; made by ``dist_optim.build_optimizer``.

    Given equal gradients, the parameters after any number of steps are bit for bit those of the upstream optimizer in
    one process. Each rank holds the optimizer state of what it owns, about ``total / world_size``.

    ``param_groups`` hold the model's own parameters and every hyperparameter: changing ``lr`` (or another one that
    upstream keeps per group) takes effect at the next step. Collective on all ranks of the process group: ``step``,
    and ``train`` and ``eval`` of optimizers that swap weights.

    Args:
        spec: The optimizer.
        groups: Param groups; ``params`` lists the ``PlacedParameter`` of the group.
        arguments: Constructor keywords for upstream.
        process_group: The ranks that share the work; the default group when None.
        resident_parameters: Owners keep a copy of the full parameters that they own. Saves a third of the traffic of
            sharded layouts and costs ``parameters / world_size`` of memory.
        bucket_bytes: Bytes of parameters that one owner takes in one round.
        reshard: Frees the full copies of sharded parameters that the engine may have left after a forward pass.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        groups: Sequence[ParamGroup],
        arguments: Mapping[str, Any],
        *,
        process_group: dist.ProcessGroup | None = None,
        resident_parameters: bool = False,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        reshard: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self.process_group = process_group
        self.num_steps = 0
        self._resident = resident_parameters
        self.mode = "train"
        self._reshard = reshard
        # One entry a parameter, in group order: the position that everything below counts by.
        self._placed: list[PlacedParameter] = [placed for group in groups for placed in group["params"]]
        self._group_values = [
            {**arguments, **{key: value for key, value in group.items() if key != "params"}}
            for group in groups
            for _ in group["params"]
        ]
        trainable = [index for index, placed in enumerate(self._placed) if placed.parameter.requires_grad]
        self._local_indices = [index for index in trainable if self._runs_locally(index)]
        self._trainable = set(trainable)
        self._refuse_misfits()
        self.plan = self._make_plan(bucket_bytes)
        self._local_instance: UpstreamInstance | None = None
        self._instances: list[UpstreamInstance] = []
        self._build_instances(groups, arguments)
        constructor_only = set(spec.in_scope(Scope.CONSTRUCTOR))
        self._pushed_keys = {record.name for record in spec.records()} - constructor_only
        self._fixed: list[ParamGroup] = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._any_instance().optimizer.param_groups
        ]
        outer = [
            {**values, "params": [placed.parameter for placed in group["params"]]}
            for values, group in zip(self._fixed, groups, strict=True)
        ]
        self._is_built = False
        super().__init__(outer, self._any_instance().optimizer.defaults)
        self._is_built = True
        self._fingerprints: dict[int, int] = {}  # of the slices that resident copies were made of
        self._copies_are_stale = True

    # Building -----------------------------------------------------------------------------------------------------

    def _runs_locally(self, index: int) -> bool:
        placed = self._placed[index]
        if placed.layout.is_replicated or Trait.ELEMENTWISE not in self.spec.traits:
            return False
        # torch's CPU kernels round half precision once in a full SIMD vector, but after each operation in the tail:
        # an element's result depends on where a slice ends.
        rounds_by_position = placed.device.type == "cpu" and placed.dtype.itemsize < 4
        return not rounds_by_position and self.spec.driver.runs_on_slices(self._group_values[index], placed.device)

    def _refuse_misfits(self) -> None:
        names_by_reason: dict[str, list[str]] = defaultdict(list)
        for index in sorted(self._trainable):
            placed = self._placed[index]
            reason = self.spec.driver.why_refused(placed.shape, placed.dtype, placed.device, self._group_values[index])
            if reason:
                names_by_reason[reason].append(placed.fqn)
        for reason, names in names_by_reason.items():
            listing = ", ".join(map(repr, names[:MAX_NAMES])) + (", ..." if len(names) > MAX_NAMES else "")
            noun = "parameter" if len(names) == 1 else f"{len(names)} parameters"
            raise UnsupportedError(f"{self.spec.name}, {noun} {listing}: {reason}")

    def _make_plan(self, bucket_bytes: int) -> Plan:
        items = []
        for index in sorted(self._trainable - set(self._local_indices)):
            placed = self._placed[index]
            cost = self.spec.driver.step_cost(placed.shape, self._group_values[index])
            items.append(Item(index, placed.shape, placed.layout, placed.dtype, placed.device, cost))
        element_size = max([item.dtype.itemsize for item in items], default=4)
        # One process has nothing to overlap: all in one round.
        world_size = num_ranks(self.process_group)
        bucket_numel = bucket_bytes // element_size if world_size > 1 else 1 << 62
        return make_plan(items, world_size, bucket_numel)

    def _build_instances(self, groups: Sequence[ParamGroup], arguments: Mapping[str, Any]) -> None:
        rank = own_rank(self.process_group)
        if self._local_indices or not self.plan.buckets:
            shapes = {index: self._placed[index].local().shape for index in self._local_indices}
            self._local_instance = UpstreamInstance(self.spec, groups, shapes, arguments)
        for bucket in self.plan.buckets:
            shapes = {item.index: item.shape for item in bucket.owned[rank]}
            self._instances.append(UpstreamInstance(self.spec, groups, shapes, arguments))

    def instances(self) -> list[UpstreamInstance]:
        """The upstream optimizers of this rank."""
        return ([self._local_instance] if self._local_instance else []) + self._instances

    def _any_instance(self) -> UpstreamInstance:
        return self.instances()[0]

    def agree_on_plan(self, process_group: dist.ProcessGroup | None) -> None:
        """Compare names, shapes, layouts, owners and hyperparameters over the ranks. Collective; once, after building.

        Args:
            process_group: All ranks that train the model: also the replicas of a shard group (HSDP).

        Raises:
            RanksDisagreeError: On all ranks, with the first entry that differs.
        """
        items: list[tuple[str, Any]] = [("optimizer", self.spec.name)]
        for number, values in enumerate(self._fixed):
            items += [(f"group {number}, {key}", value) for key, value in values.items() if not callable(value)]
        round_of = {item.index: bucket.index for bucket in self.plan.buckets for item in bucket.items}
        for index, placed in enumerate(self._placed):
            described = (tuple(placed.shape), placed.dtype, placed.layout, placed.parameter.requires_grad)
            travel = ("owner", self.plan.owners.get(index), "round", round_of.get(index))
            items.append((f"parameter {placed.fqn!r}", (*described, *travel)))
        assert_ranks_equal(
            f"The plan of {self.spec.name!r} differs between ranks",
            items,
            "Build the same model, with the same arguments, on every rank.",
            process_group,
        )

    # Stepping -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Collective on all ranks of the process group.

        Raises:
            WrongModeError: ``eval()`` was called, and ``train()`` not since.
            RanksDisagreeError: A gradient is there on some ranks and missing on others, or (checked in the first step)
                gradients of replicated parameters are not equal.
            ParameterError: A parameter that was frozen when the optimizer was built has a gradient.
        """
        if self.mode == "eval":
            raise WrongModeError(
                f"{self.spec.name}: step() was called after eval(), while the averaged weights are in place. Their "
                "gradients belong to other weights than upstream would step. Call optimizer.train() on all ranks "
                "before the forward pass of each training phase, and optimizer.eval() before evaluating."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._reshard()
        present = self._agree_on_gradients()
        for instance in self.instances():
            instance.push_hyperparameters(self.param_groups, self._pushed_keys)
        if self._local_instance is not None:
            self._step_locally(self._local_instance, present)
        absent = {index for index, is_present in enumerate(present) if not is_present}
        run_tasks(
            self._step_task(bucket.without(absent), instance, present)
            for bucket, instance in zip(self.plan.buckets, self._instances, strict=True)
        )
        self._publish_counters()
        self.num_steps += 1
        return loss

    def _publish_counters(self) -> None:
        """Show in our own groups what upstream counts in its groups: state dicts are read from ours."""
        for group, values in zip(self.param_groups, self._counters(), strict=True):
            group.update(values)

    def _step_locally(self, instance: UpstreamInstance, present: Sequence[bool]) -> None:
        """Elementwise groups: upstream on this rank's slices, in place."""
        stepped = [index for index in self._local_indices if present[index]]
        parameters = self._local_parameters(stepped)
        updated = instance.step(parameters, self._local_gradients(stepped), present)
        for index, tensor in updated.items():
            if tensor.data_ptr() != parameters[index].data_ptr():
                parameters[index].copy_(tensor)

    def _step_task(self, bucket: Bucket, instance: UpstreamInstance, present: Sequence[bool]) -> Task[None]:
        indices = [item.index for item in bucket.items]
        parameters, gradients = self._local_parameters(indices), self._local_gradients(indices)
        if self._keeps_copies(bucket) and not self._copies_are_stale:
            (full_gradients,) = yield from gather_to_owner(bucket, [gradients], self.process_group)
            full_parameters = {index: instance.shadows[index].data for index in full_gradients}
        else:
            fields = [gradients, parameters]
            full_gradients, full_parameters = yield from gather_to_owner(bucket, fields, self.process_group)
        updated = instance.step(full_parameters, full_gradients, present)
        del full_gradients, full_parameters
        yield from scatter_from_owner(bucket, updated, parameters, self.process_group)
        self._settle(bucket, instance, updated, parameters)

    def _settle(
        self,
        bucket: Bucket,
        instance: UpstreamInstance,
        updated: Mapping[int, Tensor],
        parameters: Mapping[int, Tensor],
    ) -> None:
        """After a bucket's way back: free the owners' full tensors, or note what their copies are copies of."""
        if bucket.is_replicated:
            instance.show({index: parameters[index] for index in updated})
        elif self._resident:
            self._fingerprints.update({index: fingerprint(local) for index, local in parameters.items()})
        else:
            instance.release(updated.keys())

    def _keeps_copies(self, bucket: Bucket) -> bool:
        return self._resident and not bucket.is_replicated

    def _local_parameters(self, indices: Sequence[int]) -> dict[int, Tensor]:
        return {index: self._placed[index].local() for index in indices}

    def _local_gradients(self, indices: Sequence[int]) -> dict[int, Tensor]:
        gradients = {}
        for index in indices:
            placed = self._placed[index]
            gradient = placed.local_gradient()
            gradients[index] = torch.zeros_like(placed.local()) if gradient is None else gradient
        return gradients

    # Agreement before a step --------------------------------------------------------------------------------------

    def _agree_on_gradients(self) -> list[bool]:
        """Which parameters have a gradient, the same answer on every rank; refuses gradients that are not reduced."""
        has = [placed.parameter.grad is not None for placed in self._placed]
        lacks = [not has[i] and placed.local().numel() > 0 for i, placed in enumerate(self._placed)]
        stale = self._resident and self._copies_differ(has)
        present, lacking = agree_on_presence([*has, stale], [*lacks, False], self._placed[0].device, self.process_group)
        self._copies_are_stale = present.pop()
        for index, placed in enumerate(self._placed):
            if present[index] and lacking[index]:
                raise RanksDisagreeError(
                    f"Parameter {placed.fqn!r} has a gradient on some ranks and none on others. Gradients must be "
                    "reduced before step(): wrap the model in DistributedDataParallel (find_unused_parameters=True "
                    "where ranks use different parameters), or all-reduce them yourself."
                )
            if present[index] and index not in self._trainable:
                raise ParameterError(
                    f"Parameter {placed.fqn!r} has a gradient, but was frozen (requires_grad=False) when the optimizer "
                    "was built. Build the optimizer after unfreezing, or leave the parameter frozen."
                )
        self._check_gradients(present)
        return present

    def _copies_differ(self, stepped: Sequence[bool]) -> bool:
        """Whether a slice was changed by somebody else (a checkpoint was loaded, say) since its copy was made."""
        planned = {item.index for bucket in self.plan.buckets if not bucket.is_replicated for item in bucket.items}
        return any(
            stepped[index] and fingerprint(self._placed[index].local()) != self._fingerprints.get(index)
            for index in planned
        )

    def _check_gradients(self, present: Sequence[bool]) -> None:
        """Gradients have the parameters' dtype; in the first step also: replicated ones are equal on all ranks."""
        marks: list[tuple[str, Any]] = []
        for placed, is_present in zip(self._placed, present, strict=True):
            gradient = placed.local_gradient()
            if not is_present or gradient is None:
                continue
            if gradient.is_sparse or (gradient.dtype != placed.dtype and not placed.layout.is_replicated):
                raise UnsupportedError(
                    f"The gradient of {placed.fqn!r} is {gradient.layout}, {gradient.dtype}; a sharded parameter of "
                    f"dtype {placed.dtype} needs a dense gradient of its own dtype. Set sparse=False in the embedding, "
                    "or keep gradients in the parameter's dtype."
                )
            if self.num_steps == 0 and placed.layout.is_replicated:
                marks.append((f"the gradient of {placed.fqn!r} (fingerprint)", fingerprint(gradient)))
        if self.num_steps == 0 and num_ranks(self.process_group) > 1:
            assert_ranks_equal(
                "Gradients differ between ranks in the first step",
                marks,
                "Replicated parameters need reduced gradients: wrap the model in DistributedDataParallel, end gradient "
                "accumulation with a synchronised backward pass, or all-reduce gradients before step().",
                self.process_group,
            )

    # Weights for evaluation ---------------------------------------------------------------------------------------

    def train(self) -> None:
        """Put the training weights in place. Collective where the optimizer swaps weights; otherwise nothing."""
        self._swap_weights("train")

    def eval(self) -> None:
        """Put the averaged weights in place, as schedule-free methods evaluate and export them. Collective there."""
        self._swap_weights("eval")

    @torch.no_grad()
    def _swap_weights(self, mode: str) -> None:
        if Trait.WEIGHT_SWAPPING not in self.spec.traits or mode == self.mode:
            return
        self._reshard()
        if self._local_instance is not None:
            self._local_instance.swap_weights(mode, self._local_parameters(self._local_indices))
        run_tasks(
            self._swap_task(bucket, instance, mode)
            for bucket, instance in zip(self.plan.buckets, self._instances, strict=True)
        )
        self._publish_counters()
        self.mode = mode

    def _swap_task(self, bucket: Bucket, instance: UpstreamInstance, mode: str) -> Task[None]:
        parameters = self._local_parameters([item.index for item in bucket.items])
        (full,) = yield from gather_to_owner(bucket, [parameters], self.process_group)
        updated = instance.swap_weights(mode, full)
        yield from scatter_from_owner(bucket, updated, parameters, self.process_group)
        self._settle(bucket, instance, updated, parameters)

    # State --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's share of the state, by parameter name: plain tensors and scalars. Not a collective.

        It loads with ``torch.load(weights_only=True)``, on the same rank of a run with the same world size.
        """
        return state_dicts.read(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Install what ``state_dict`` returned on this rank; hyperparameters of the groups included.

        Raises:
            StateDictError: It belongs to another optimizer, other parameters, or another rank.
        """
        state_dicts.write(self, state_dict)

    def parameter_names(self) -> list[str]:
        """Logical names of all parameters, in group order."""
        return [placed.fqn for placed in self._placed]

    def counter_keys(self) -> list[str]:
        """Keys that upstream itself counts in, in its groups (none for most optimizers)."""
        return sorted({key for group in self._counters() for key in group})

    def _counters(self) -> list[dict[str, Any]]:
        return self._any_instance().group_counters(self._pushed_keys | {"params"})

    def placed_parameters(self) -> list[PlacedParameter]:
        """All parameters and where they are stored, in group order."""
        return list(self._placed)

    def route_audit(self) -> str:
        """Which algorithm got which tensors, and who steps them: the text that is printed before step 1."""
        return route_audit(self)

    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds, counted on the real storages."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for instance in self.instances()
            for tensor in instance.state_tensors()
        }
        return sum(storages.values())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is built: owners and positions are planned over all parameters together."""
        if getattr(self, "_is_built", False):
            raise UnsupportedError(
                "add_param_group after building would change owners and positions in the middle of a run. Pass all "
                "groups at once: build_optimizer(model, name, params=[{'params': [...]}, ...])."
            )
        super().add_param_group(param_group)
