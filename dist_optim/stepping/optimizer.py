"""``DistributedOptimizer``: any upstream optimizer, with its one-process trajectory, on sharded parameters.

A step reads as the idea does. Elementwise groups run upstream on the local slices. For everything else, bucket by
bucket: full tensors to their owners, the upstream step there, updated tensors back to the ranks that hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dist_optim.errors import UnsupportedError, WrongModeError
from dist_optim.exchange.ddp_hook import OwnerReduction
from dist_optim.exchange.norms import clip_gradients, norm_in_fp32, total_norm
from dist_optim.exchange.plan import Bucket
from dist_optim.exchange.routing import plan_owners, refuse_misfits, runs_on_local_slices
from dist_optim.exchange.transfer import Task, gather_to_owner, run_tasks, scatter_from_owner
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import Elsewhere
from dist_optim.ranks.agreement import assert_ranks_equal, num_ranks, own_rank
from dist_optim.ranks.failures import FailureNotice
from dist_optim.ranks.fingerprints import fingerprint
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.hyperparameters import Scope
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.stepping import rank_state as state_dicts
from dist_optim.stepping.audit import route_audit
from dist_optim.stepping.presence import agree_on_gradients, assert_gradients_reduced, hyperparameters_of
from dist_optim.stepping.sentinel import compare_ranks
from dist_optim.stepping.upstream_instance import UpstreamInstance, as_if_alone

__all__ = ["DistributedOptimizer"]

DEFAULT_BUCKET_BYTES = 64 << 20


class InsideBackward(Protocol):
    """Takes the updates over from ``step``: see ``dist_optim.inside_backward.handle``."""

    def finish_step(self) -> None:
        """End a training step whose updates backward has made. Collective."""

    def backward(self, loss: Tensor) -> Tensor | None:
        """Back-propagate, and update; returns the norm of all gradients where it was measured. Collective."""

    def why_no_clipping(self) -> str:
        """What to say to who would clip gradients that are gone."""

    def remove(self) -> None:
        """Store gradients again, and update from them in ``step``."""


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
        check_ranks_every: Steps between two comparisons of what ranks should hold alike; 0 for none.
        all_ranks: All ranks that train the model: also the replicas of a shard group (HSDP).
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
        check_ranks_every: int = 0,
        all_ranks: dist.ProcessGroup | None = None,
        reshard: Callable[[], None] = lambda: None,
    ) -> None:
        self.spec = spec
        self.process_group = process_group
        self.num_steps = 0
        self._resident = resident_parameters
        self.mode = "train"
        self._check_ranks_every = check_ranks_every
        self._all_ranks = all_ranks
        self._reshard = reshard
        # One entry a parameter, in group order: the position that everything below counts by.
        self._placed: list[PlacedParameter] = [placed for group in groups for placed in group["params"]]
        values = [{**arguments, **_without_params(group)} for group in groups for _ in group["params"]]
        members = {
            index: (placed, own)
            for index, (placed, own) in enumerate(zip(self._placed, values, strict=True))
            if placed.parameter.requires_grad
        }
        refuse_misfits(spec, list(members.values()))
        self.needs_total_norm = spec.driver.needs_total_norm(arguments)
        if self.needs_total_norm and any(isinstance(placed.layout, Elsewhere) for placed in self._placed):
            raise UnsupportedError(
                f"{spec.name}: clip_grad_norm needs all gradients at once, and the engine steps one part of them after "
                'another. Let the engine clip ("gradient_clipping" in DeepSpeed\'s configuration).'
            )
        self._trainable = set(members)
        here = {index: member for index, member in members.items() if not isinstance(member[0].layout, Elsewhere)}
        self._local_indices = [index for index, member in here.items() if runs_on_local_slices(spec, *member)]
        owned = {index: member for index, member in here.items() if index not in self._local_indices}
        self.plan = plan_owners(spec, owned, bucket_bytes, process_group)
        self.local_instance: UpstreamInstance | None = None
        self._instances: list[UpstreamInstance] = []
        self._build_instances(groups, arguments)
        constructor_only = set(spec.in_scope(Scope.CONSTRUCTOR))
        self.pushed_keys = {record.name for record in spec.records()} - constructor_only
        self._fixed = [_without_params(group) for group in self._any_instance().optimizer.param_groups]
        outer = [
            {**values, "params": [placed.parameter for placed in group["params"]]}
            for values, group in zip(self._fixed, groups, strict=True)
        ]
        self._is_built = False
        super().__init__(outer, self._any_instance().optimizer.defaults)
        self._is_built = True
        self._fingerprints: dict[int, int] = {}  # of the slices that resident copies were made of
        self._copies_are_stale = True
        self._reduction: OwnerReduction | None = None
        self.inside_backward: InsideBackward | None = None  # set by fused_backward.install
        self.failures = FailureNotice(self._placed[0].device, process_group)

    # Building -----------------------------------------------------------------------------------------------------

    def _build_instances(self, groups: Sequence[ParamGroup], arguments: Mapping[str, Any]) -> None:
        rank = own_rank(self.process_group)
        if self._local_indices or not self.plan.buckets:
            shapes = {index: self._placed[index].local().shape for index in self._local_indices}
            self.local_instance = UpstreamInstance(self.spec, groups, shapes, arguments)
        for bucket in self.plan.buckets:
            shapes = {item.index: item.shape for item in bucket.owned[rank]}
            self._instances.append(UpstreamInstance(self.spec, groups, shapes, arguments))

    def instances(self) -> list[UpstreamInstance]:
        """The upstream optimizers of this rank."""
        return ([self.local_instance] if self.local_instance else []) + self._instances

    def owner_instances(self) -> list[UpstreamInstance]:
        """Those that step whole tensors, one for each bucket of the plan."""
        return list(self._instances)

    def _any_instance(self) -> UpstreamInstance:
        return self.instances()[0]

    def agree_on_plan(self) -> None:
        """Compare names, shapes, layouts, owners and hyperparameters over the ranks. Collective; once, after building.

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
            self._all_ranks,
        )

    # Stepping -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Collective on all ranks of the process group.

        Raises:
            StepFailedError: Upstream's step failed on another rank in the step before.
            WrongModeError: ``eval()`` was called, and ``train()`` not since.
            RanksDisagreeError: A gradient is there on some ranks and missing on others, a hyperparameter differs, or
                (checked in the first step) gradients of replicated parameters are not equal.
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
        if self.inside_backward is not None:
            self._reshard()
            self.inside_backward.finish_step()
            return loss
        self.failures.receive(self.spec.name, self.num_steps)
        self._reshard()
        present = self._agree_on_gradients()
        for instance in self.instances():
            instance.push_hyperparameters(self.param_groups, self.pushed_keys)
        if self.needs_total_norm:
            self._hand_out_total_norm(present)
        if self.local_instance is not None:
            self._step_locally(self.local_instance, present)
        absent = {index for index, is_present in enumerate(present) if not is_present}
        run_tasks(
            self._step_task(bucket.without(absent), instance, present)
            for bucket, instance in zip(self.plan.buckets, self._instances, strict=True)
        )
        self.end_step()
        return loss

    def end_step(self) -> None:
        """What follows the updates of a training step. Collective."""
        self.failures.send()
        self._publish_counters()
        self.num_steps += 1
        if self._check_ranks_every and self.num_steps % self._check_ranks_every == 0:
            compare_ranks(self, self._all_ranks)

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
        full_gradients = {index: as_if_alone(gradient) for index, gradient in full_gradients.items()}
        try:
            updated = instance.step(full_parameters, full_gradients, present)
        except Exception as error:  # the other ranks wait for this bucket: go on, and raise when the exchange is done
            self.failures.note(error)
            updated = full_parameters
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

    def _agree_on_gradients(self) -> list[bool]:
        """Which parameters have a gradient, the same answer on every rank, and whether resident copies are stale."""
        values = hyperparameters_of(self.param_groups, self.pushed_keys)
        if self._reduction is not None:
            flag = self._reduction.were_changed()
        else:
            flag = self._resident and self._copies_differ()
        present, flag = agree_on_gradients(self._placed, self._trainable, values, flag, self.process_group)
        if self._reduction is None:
            self._copies_are_stale = flag
            if self.num_steps == 0:
                assert_gradients_reduced(self._placed, self.process_group)
        elif flag:
            raise UnsupportedError(
                "A gradient was changed between backward and step(). With reduce_to_owner=True only its owner holds a "
                "reduced gradient, so that torch.nn.utils.clip_grad_norm_ and accelerator.clip_grad_norm_ see NaN. Use "
                "optimizer.clip_grad_norm_(max_norm), or leave reduce_to_owner out."
            )
        return present

    def _copies_differ(self) -> bool:
        """Whether a slice was changed by somebody else (a checkpoint was loaded, say) since its copy was made."""
        planned = {item.index for bucket in self.plan.buckets if not bucket.is_replicated for item in bucket.items}
        return any(
            self._placed[index].parameter.grad is not None
            and fingerprint(self._placed[index].local()) != self._fingerprints.get(index)
            for index in planned
        )

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Clip the global norm of all gradients, exactly as ``torch.nn.utils.clip_grad_norm_`` does in one process.

        Collective. Norms are those of whole tensors, combined in the order of ``model.parameters()``, so the result is
        equal to the bit under every layout; sharded gradients travel once more for it.

        Returns:
            The global norm before clipping: 0-D, equal on all ranks.
        """
        if self.inside_backward is not None:
            raise UnsupportedError(self.inside_backward.why_no_clipping())
        self._reshard()
        present = self._agree_on_gradients()
        ordered, kept, owner_of = self._in_model_order(present)
        total = clip_gradients(ordered, kept, max_norm, norm_type, owner_of, self.process_group)
        if self._reduction is not None:
            self._reduction.accept_changes()
        return total

    def _in_model_order(self, present: Sequence[bool]) -> tuple[list[PlacedParameter], list[bool], list[int | None]]:
        """All parameters in the order of ``model.parameters()``, whether each has a gradient, and who alone has it."""
        order = sorted(range(len(self._placed)), key=lambda index: self._placed[index].position)
        owners = self.plan.owners if self._reduction is not None else {}
        return (
            [self._placed[index] for index in order],
            [present[index] for index in order],
            [owners.get(index) for index in order],
        )

    def _hand_out_total_norm(self, present: Sequence[bool]) -> None:
        """The norm of all gradients together, in fp32, to every upstream optimizer of this rank."""
        placed, kept, owners = self._in_model_order(present)
        total = total_norm(placed, kept, norm_in_fp32, 2.0, owners, self.process_group)
        for instance in self.instances():
            self.spec.driver.take_total_norm(instance.optimizer, total)

    def backward(self, loss: Tensor) -> Tensor | None:
        """``loss.backward()``; with ``clip_grad_norm`` and a fused backward, twice: for the norm, then for the updates.

        Returns:
            The norm of all gradients together before clipping, where it was measured in this way.
        """
        if self.inside_backward is not None:
            return self.inside_backward.backward(loss)
        torch.autograd.backward(loss)
        return None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by torch's GradScaler before it looks for gradients to unscale."""
        if self.inside_backward is not None:
            raise UnsupportedError(
                f"{self.spec.name}: GradScaler found out too late for this backward: its scaled gradients were applied "
                "inside backward. Use bfloat16, which needs no scaling, or build with fused_backward=False. The "
                "parameters are spoiled: start again."
            )
        return False

    def reduce_to_owners(self, ddp: DistributedDataParallel) -> None:
        """Replace DDP's all-reduce by a reduction of each gradient to its owner. Once, right after building."""
        owners = {id(self._placed[index].parameter): owner for index, owner in self.plan.owners.items()}
        self._reduction = OwnerReduction(ddp, owners, self.process_group)

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
        if self.local_instance is not None:
            self.local_instance.swap_weights(mode, self._local_parameters(self._local_indices))
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
        return self._any_instance().group_counters(self.pushed_keys | {"params"})

    @property
    def num_replicas(self) -> int:
        """How many groups of ranks hold the same shards (HSDP), and step them alike."""
        return num_ranks(self._all_ranks) // num_ranks(self.process_group)

    @property
    def all_ranks(self) -> dist.ProcessGroup | None:
        """All ranks that train the model: those that share the work, and under HSDP their replicas too."""
        return self._all_ranks

    def stepped_here(self) -> Iterator[tuple[UpstreamInstance, int]]:
        """What this rank steps: who steps it, and its position among all parameters."""
        for instance in self.instances():
            for index in instance.shadows:
                yield instance, index

    def free_gathered_copies(self) -> None:
        """Free full copies of sharded parameters that the engine may have left: call it after changing the shards."""
        self._reshard()

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


def _without_params(group: Mapping[str, Any]) -> ParamGroup:
    return {key: value for key, value in group.items() if key != "params"}
