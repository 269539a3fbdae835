"""What a rank holds of one optimizer: the record that audits, checks, state and the step itself read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from dist_optim.exchange.plan import Plan
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.stepping import half_steps
from dist_optim.stepping.division import Division
from dist_optim.stepping.edited_groups import why_edited
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["Holdings", "Progress"]


@dataclass(slots=True)
class Progress:
    """How far an optimizer has come."""

    num_steps: int = 0
    mode: str = "train"
    """``"eval"`` while the averaged weights are in place, for optimizers that swap weights."""
    num_calls: int = 0
    """Calls of a class's own methods, which may step as ``step`` does."""
    num_skipped: int = 0
    """Steps that were left out since the optimizer was built, with ``on_nonfinite="skip"``."""
    num_loads: int = 0
    """How often state of some steps was installed since the optimizer was built."""
    failed_step: int | None = None
    """The step that failed half way, until something is loaded: weights and state are of no step at all."""

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was done yet, so that no rank has any state."""
        return not self.num_steps and not self.num_calls

    def why_not_saved(self) -> str:
        """Why what is held now must not be saved, and what to do; empty where it may be."""
        return "" if self.failed_step is None else half_steps.text_of(self.failed_step)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Holdings:
    """Fixed when an optimizer is built; tensors and param groups inside change with training.

    An **index** is a position among all parameters, in group order.
    """

    spec: OptimizerSpec
    placed: tuple[PlacedParameter, ...]
    groups: list[ParamGroup]
    """The param groups that the user sees."""
    plan: Plan
    local_instance: UpstreamInstance | None
    """Steps what is elementwise, on this rank's slices."""
    owner_instances: tuple[UpstreamInstance, ...]
    """Step whole tensors, one for each bucket of the plan; one and the same where tensors are stepped together."""
    division: Division
    """Who steps what; it builds the same instances anew, without state."""
    pushed_keys: frozenset[str]
    """Hyperparameters: what the groups hand to upstream. Upstream itself counts under other keys."""
    needs_total_norm: bool
    """Whether updates need the norm of all gradients together."""
    process_group: dist.ProcessGroup | None
    """The ranks that share the work."""
    all_ranks: dist.ProcessGroup | None
    """All ranks that train the model: under HSDP the replicas of those that share the work too."""

    @property
    def members(self) -> list[list[PlacedParameter]]:
        """The parameters of each group when the optimizer was built."""
        return [list(group["params"]) for group in self.division.groups]

    @property
    def instances(self) -> list[UpstreamInstance]:
        """The upstream optimizers of this rank, each once."""
        owners = self.owner_instances[:1] if self.division.is_together else self.owner_instances
        return [*([self.local_instance] if self.local_instance else []), *owners]

    @property
    def num_replicas(self) -> int:
        """How many groups of ranks hold the same shards (HSDP), and step them alike."""
        return num_ranks(self.all_ranks) // num_ranks(self.process_group)

    @property
    def rank(self) -> int:
        """This rank among those that share the work."""
        return own_rank(self.process_group)

    @property
    def trained(self) -> list[int]:
        """Indices of what is stepped when it has a gradient: fixed when the optimizer was built."""
        return [index for index, one in enumerate(self.placed) if one.is_trained]

    @property
    def local_indices(self) -> list[int]:
        """Indices of what this rank steps as a slice."""
        return list(self.local_instance.shadows) if self.local_instance else []

    def stepped_here(self) -> Iterator[tuple[UpstreamInstance, int]]:
        """Who steps what on this rank."""
        for instance in self.instances:
            for index in instance.shadows:
                yield instance, index

    def names_by_group(self) -> list[list[str]]:
        """Logical names of the parameters of each group.

        Raises:
            ParameterError: Somebody has edited the groups after building.
        """
        if problem := why_edited(self.members, self.groups):
            raise problem
        return [[one.fqn for one in group] for group in self.members]

    def counters(self) -> list[dict[str, object]]:
        """What upstream counts in its groups, group by group: the same in all instances after a step."""
        return self.instances[0].group_values.counters(self.pushed_keys | {"params"})

    def published(self) -> list[dict[str, object]]:
        """What upstream shows in its groups: its counters, and all of them where nobody described what it writes."""
        if not self.spec.is_undescribed:
            return self.counters()
        whole = [instance.group_values.published() for instance in self.instances][0]
        both = zip(self.instances[0].group_values.is_two_way, whole, self.counters(), strict=True)
        return [group if is_two_way else counted for is_two_way, group, counted in both]

    def drop_foreign_keys(self, groups: Sequence[ParamGroup]) -> None:
        """Let the last of the user's groups, so many as are given, have upstream's keys and no others."""
        for group, inner in zip(groups, self.instances[0].optimizer.param_groups[-len(groups) :], strict=True):
            for key in group.keys() - inner.keys() - {"params"}:
                del group[key]

    def extras(self) -> dict[str, object]:
        """What upstream keeps outside the state of its parameters: the same in all instances after a step."""
        readable = [instance.extras for instance in self.instances if instance.extras is not None]
        return readable[0].read() if readable else {}

    def counter_keys(self) -> list[str]:
        """Keys that upstream itself counts in, in its groups (none for most optimizers)."""
        return sorted({key for group in self.counters() for key in group})

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds, counted on the real storages."""
        tensors: Iterator[Tensor] = (tensor for instance in self.instances for tensor in instance.state_tensors())
        storages = (tensor.untyped_storage() for tensor in tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
