"""One unmodified upstream optimizer, over the whole group structure, with ghosts for what is stepped elsewhere.

**Shadow**: the parameter object that upstream sees for a tensor that is really stepped here. Its ``data`` and ``grad``
are set right before the step, so the user's own parameters are never rebound and their ``grad`` never reshaped.

**Ghost**: an empty parameter in the place of a tensor that is stepped elsewhere. It keeps positions (APOLLO's seeds,
GrokAdamW's decay by layer) and group counters (StableAdamW, schedule-free) what they are in one process.

In one process, which steps by stored gradients, shadows are the model's own parameters where those are plain: upstream
does there what it does alone, and nothing is set before a step or after it.

A class that nobody described gets shadows with values and storage of their own, from before its constructor on: it may
read them there, keep them, or change one that has no gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.errors import DistOptimError, HyperparameterError, UnsupportedError
from dist_optim.exchange.rooms import as_if_alone
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.specs.driver import ParamGroup, as_given, tensors_in
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.specs.verdict import Ghosts
from dist_optim.stepping.code_watch import CodeWatch
from dist_optim.stepping.extras import Extras
from dist_optim.stepping.group_values import GroupValues, counters_in

__all__ = ["UpstreamInstance"]

MASTER = "(master)"
"""Key of the fp32 master among the state of a parameter in half precision."""


class UpstreamInstance:
    """The upstream optimizer of one bucket (or of everything that runs on local slices).

    Args:
        spec: Which upstream class, and how to drive it.
        groups: Hyperparameters of each param group; ``params`` holds the ``PlacedParameter`` of the group, in order.
        shapes: Shape of each tensor that is stepped here, by its position among all parameters.
        arguments: Constructor keywords.
        values: The model's own parameters where upstream may step those themselves; for a class that nobody described,
            else, what is stepped here and frozen tensors that it may see: storage that is the instance's from now on.
    """

    returned: Any = None
    """What the last step with a closure returned."""

    def __init__(
        self,
        spec: OptimizerSpec,
        groups: Sequence[ParamGroup],
        shapes: Mapping[int, torch.Size],
        arguments: Mapping[str, Any],
        values: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.driver = spec.driver
        self.shadows: dict[int, nn.Parameter] = {}
        self.ghosts: dict[int, nn.Parameter] = {}
        self._group_of: dict[int, int] = {}
        self._zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        is_two_way = [spec.is_undescribed_in(group) for group in groups]
        self.of_model: set[int] = set()
        """Which of what it sees are the model's own parameters."""
        self._own_storage: set[int] = set()
        self._ghosts: list[Ghosts] = [spec.ghosts_in(group) for group in groups for _ in group["params"]]
        self._watch: AbstractContextManager[object] = nullcontext()
        if spec.verdict is not None and spec.verdict.is_independent:
            self._watch = CodeWatch(spec.verdict)
        self._model_dtypes: dict[int, torch.dtype] = {}
        upstream_groups: list[ParamGroup] = []
        index = 0
        for group in groups:
            parameters, names = [], []
            for placed in group["params"]:
                made = self._make_parameter(index, placed, shapes, values or {})
                parameters += made
                names += [placed.fqn] * len(made)
                self._group_of[index] = len(upstream_groups)
                index += 1
            named = {"param_names": names} if self.driver.wants_names or "param_names" in group else {}
            upstream_groups.append({**group, "params": parameters, **named})
        try:
            given = as_given(upstream_groups) if spec.is_undescribed else upstream_groups
            self.optimizer: Optimizer = self.driver.construct(spec.load_class(), given, arguments)
        except DistOptimError:
            raise
        except (ValueError, TypeError) as error:  # upstream's own checks, of values that exclude each other, say
            raise HyperparameterError(
                f"{spec.name}: upstream's {spec.load_class().__name__} refuses its arguments: {error}. "
                f"They were: {', '.join(f'{key}={value!r}' for key, value in arguments.items())}."
            ) from error
        if spec.is_undescribed:
            _refuse_own_groups(spec.name, self.optimizer, upstream_groups, is_two_way)
        if Trait.WEIGHT_SWAPPING in spec.traits:
            # Upstream starts in eval mode, and refuses to step there. A wrapper may have the method, and its inner not.
            with contextlib.suppress(*([AttributeError] if spec.is_undescribed else [])):
                self.optimizer.train()  # type: ignore[attr-defined]
        owners = self.driver.undescribed(self.optimizer) if spec.is_undescribed else {}
        self.extras = Extras(owners, {**self.shadows, **self.ghosts}, self.shadows) if owners else None
        self.group_values = GroupValues(self.optimizer, is_two_way)

    def add_group(
        self,
        spec: OptimizerSpec,
        group: ParamGroup,
        first: int,
        shapes: Mapping[int, torch.Size],
        values: Mapping[int, Tensor] | None,
    ) -> None:
        """Let upstream have one more group, by its own ``add_param_group``.

        Args:
            spec: As this was built with; as are the kinds of what follows.
            group: The group.
            first: The index of its first parameter.
            shapes: Of those of its tensors that are stepped here.
            values: As in the constructor, of this group.
        """
        values = values or {}
        self._ghosts += [spec.ghosts_in(group)] * len(group["params"])
        parameters: list[nn.Parameter] = []
        names: list[str] = []
        for index, placed in enumerate(group["params"], start=first):
            made = self._make_parameter(index, placed, shapes, values)
            parameters += made
            names += [placed.fqn] * len(made)
            self._group_of[index] = len(self.optimizer.param_groups)
        named = {"param_names": names} if "param_names" in group else {}
        self.optimizer.add_param_group({**group, "params": parameters, **named})
        self.group_values.note_new_group(spec.is_undescribed_in(group))
        if self.extras is not None:
            owners = self.driver.undescribed(self.optimizer)
            self.extras = Extras(owners, {**self.shadows, **self.ghosts}, self.shadows)

    def drop_groups(self, num_groups: int, num_parameters: int) -> None:
        """Take away all but the first groups, and parameters, where adding one has failed."""
        del self.optimizer.param_groups[num_groups:]
        self.group_values.drop_groups(num_groups)
        del self._ghosts[num_parameters:]
        for known in (self.shadows, self.ghosts, self._group_of, self._model_dtypes):
            for index in [index for index in known if index >= num_parameters]:
                del known[index]
        for some in (self.of_model, self._own_storage):
            some -= {index for index in some if index >= num_parameters}

    def _make_parameter(
        self, index: int, placed: PlacedParameter, shapes: Mapping[int, torch.Size], values: Mapping[int, Tensor]
    ) -> list[nn.Parameter]:
        """What stands for a parameter in upstream's group: itself, a shadow, a ghost, or nothing."""
        if index in values:
            value, is_stepped = values[index], index in shapes
            if isinstance(value, nn.Parameter):
                self.of_model.add(index)
            else:
                self._own_storage.add(index)
                value = nn.Parameter(value, requires_grad=placed.parameter.requires_grad)
            if is_stepped and value.dtype != placed.dtype:
                self._model_dtypes[index] = placed.dtype
            (self.shadows if is_stepped else self.ghosts)[index] = value
        elif index in shapes:
            # The true shape from the start, on one element of storage: some optimizers read shapes in __init__.
            data = torch.zeros((), dtype=placed.dtype, device=placed.device).expand(shapes[index])
            self.shadows[index] = nn.Parameter(data)
        elif self._ghosts[index] == "none":
            return []
        else:
            # The true number of dimensions: some optimizers check it. Without dims a tensor has one element.
            shape = (0, *placed.shape[1:]) if placed.shape else ()
            ghost = torch.zeros(shape, dtype=placed.dtype, device=placed.device)
            self.ghosts[index] = nn.Parameter(ghost, requires_grad=placed.is_trained)
        return [self.shadows[index] if index in self.shadows else self.ghosts[index]]

    def step(
        self,
        parameters: Mapping[int, Tensor],
        gradients: Mapping[int, Tensor],
        present: Sequence[bool],
        closure: Callable[[], Any] | None = None,
    ) -> dict[int, Tensor]:
        """Run one upstream step.

        Args:
            parameters: Tensors to update, by position; upstream may update them in place or put others in their stead.
                The model's own parameters need not be among them.
            gradients: Their gradients, in the same shapes.
            present: For every position, whether that parameter has a gradient anywhere in this step.
            closure: Handed on to upstream, where there is one.

        Returns:
            The updated tensors, by position.

        Raises:
            UnprovenCodeError: It is about to run code of the class that was not seen when it was proven.
        """
        sees_model = self.of_model.issuperset(self.shadows)
        self.show(parameters)
        if not sees_model:
            self.give(gradients)
        for index, ghost in self.ghosts.items():
            if self._ghosts[index] == "with gradients":
                ghost.grad = torch.zeros_like(ghost) if present[index] and ghost.requires_grad else None
        if self.driver.counts_places:
            self.driver.take_places(self.optimizer, self._places(gradients, present))
        try:
            with self._watch:
                if closure is None:
                    self.driver.step(self.optimizer, [self.shadows[index] for index in gradients])
                else:
                    self.returned = self.optimizer.step(closure)
        finally:  # a gradient of a step that failed must not be there in a later one, where its tensor has none
            if not sees_model:
                self.take_gradients(self.shadows)
        return self._outgoing_of(parameters)

    def _outgoing_of(self, parameters: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """These tensors as the model is to have them: the very same where upstream has left them in place."""
        if self._is_on(parameters):
            return dict(parameters)
        shadows = self.shadows
        return {
            index: tensor if shadows[index].data_ptr() == tensor.data_ptr() else self._outgoing(index)
            for index, tensor in parameters.items()
        }

    def _is_on(self, parameters: Mapping[int, Tensor]) -> bool:
        """Whether upstream's parameters are on the very memory of these tensors, all of them."""
        shadows = [self.shadows[index] for index in parameters]
        return list(map(Tensor.data_ptr, shadows)) == list(map(Tensor.data_ptr, parameters.values()))

    def outgoing(self, indices: Collection[int] | None = None) -> dict[int, Tensor]:
        """These tensors, or all that are stepped here, as the model is to have them."""
        return {index: self._outgoing(index) for index in (self.shadows if indices is None else indices)}

    def _outgoing(self, index: int) -> Tensor:
        value = self.shadows[index].data
        return value.to(self._model_dtypes[index]) if index in self._model_dtypes else value

    def give(self, gradients: Mapping[int, Tensor]) -> None:
        """Let upstream see these gradients; parameters that are the model's own have theirs."""
        for index, gradient in gradients.items():
            if index not in self.of_model:
                shadow = self.shadows[index]
                if not shadow.requires_grad:  # it was frozen when this was built
                    shadow.requires_grad_(True)
                shadow.grad = gradient if gradient.dtype == shadow.dtype else gradient.to(shadow.dtype)

    def take_gradients(self, indices: Collection[int]) -> None:
        """Let upstream see none any more."""
        for index in indices:
            if index not in self.of_model:
                self.shadows[index].grad = None

    def _places(self, gradients: Mapping[int, Tensor], present: Sequence[bool]) -> list[list[int]]:
        """Group by group, of what is stepped now: how many before it have a gradient."""
        places: list[list[int]] = [[] for _ in self.optimizer.param_groups]
        num_before = [0] * len(places)
        for index, group in self._group_of.items():
            if present[index] and (self.ghosts.get(index) is None or self.ghosts[index].requires_grad):
                if index in gradients:
                    places[group].append(num_before[group])
                num_before[group] += 1
        return places

    def step_each(
        self, parameters: Mapping[int, Tensor], gradients: Mapping[int, Tensor], keys: Collection[str]
    ) -> dict[int, Tensor]:
        """Run upstream's step on each of these tensors alone, in time that does not grow with the others' number.

        Upstream sees the tensor as the only member of its group, and the group's counters as they were: they move on
        in ``tick``.

        Args:
            parameters: Tensors to update, by position.
            gradients: Their gradients, in the same shapes.
            keys: Hyperparameters in the groups; what is not among them upstream counts itself.

        Returns:
            The updated tensors, by position.
        """
        self.show(parameters)
        every_group = self.optimizer.param_groups
        for index, gradient in gradients.items():
            shadow, group = self.shadows[index], every_group[self._group_of[index]]
            members, counters = group["params"], counters_in(group, keys)
            shadow.grad = as_if_alone(gradient)
            try:
                self.optimizer.param_groups, group["params"] = [group], [shadow]
                self.driver.step(self.optimizer, [shadow])
            finally:
                self.optimizer.param_groups, group["params"] = every_group, members
                group.update(counters)
                shadow.grad = None
        return self._outgoing_of(parameters)

    def tick(self, keys: Collection[str]) -> None:
        """Let the groups' counters move on by one step, after ``step_each`` of what has a gradient in this step."""
        if any(counters_in(group, keys) for group in self.optimizer.param_groups):
            self.driver.step(self.optimizer, [])

    def call(
        self, name: str, args: Sequence[Any], keywords: Mapping[str, Any], gradients: Mapping[int, Tensor]
    ) -> tuple[Any, bool]:
        """Call a method of upstream's own, on the parameters in its view and these gradients.

        Returns:
            What it returns, and whether it has cleared all gradients.

        Raises:
            UnsupportedError: It has changed gradients.
        """
        before = {index: (gradient, gradient._version) for index, gradient in gradients.items()}
        self.give(gradients)
        try:
            result = getattr(self.optimizer, name)(*args, **keywords)
            after = {index: self.shadows[index].grad for index in gradients if index not in self.of_model}
            is_cleared = bool(after) and all(gradient is None for gradient in after.values())
            if not is_cleared:
                _refuse_changed_gradients(name, {index: before[index] for index in after}, after)
            return result, is_cleared
        finally:
            self.take_gradients(gradients)

    def release(self, indices: Collection[int]) -> None:
        """Drop the full tensors, so that between steps only the shards hold the parameters."""
        for index in indices:
            if index not in self.of_model and index not in self._own_storage:
                shadow = self.shadows[index]
                shadow.data = self._zero_like(shadow).expand(shadow.shape)

    def _zero_like(self, tensor: Tensor) -> Tensor:
        """One element for all that is stepped elsewhere or not now: nobody may write to what many share."""
        key = (tensor.dtype, tensor.device)
        if key not in self._zeros:
            self._zeros[key] = tensor.detach().new_zeros(())
        return self._zeros[key]

    def show(self, parameters: Mapping[int, Tensor]) -> None:
        """Let upstream's parameters be these tensors: on their storage, or copied where upstream keeps its own."""
        if self._is_on(parameters) and not self._own_storage:
            return  # as the last step left them
        for index, tensor in parameters.items():
            if index in self.of_model:
                continue
            shadow = self.shadows[index]
            if index not in self._own_storage:
                shadow.data = tensor
            elif index in self._model_dtypes:
                # The master stands, but for elements that somebody changed in the model: weights were loaded, say.
                is_same = shadow.data.to(tensor.dtype) == tensor
                shadow.data.copy_(torch.where(is_same, shadow.data, tensor.to(shadow.dtype)))
            elif shadow.data_ptr() != tensor.data_ptr():
                shadow.data.copy_(tensor)

    # State --------------------------------------------------------------------------------------------------------

    def encoded_state(self, index: int) -> dict[str, Any]:
        """State of one tensor as plain tensors and scalars; empty before its first step."""
        state = self.driver.read_state(self.optimizer, self.shadows[index])
        encoded = self.driver.encode_state(state) if state else {}
        return {**encoded, MASTER: self.shadows[index].data} if encoded and index in self._model_dtypes else encoded

    def write_encoded_state(self, index: int, encoded: Mapping[str, Any], *, may_keep: bool = False) -> None:
        """Install state that ``encoded_state`` returned, in place of any there is; tensors are copied to the device.

        Args:
            index: Which parameter.
            encoded: The state.
            may_keep: Whether tensors that are on the device already may be kept as they are: nobody else uses them.
        """
        shadow, group = self.shadows[index], self.optimizer.param_groups[self._group_of[index]]
        if not encoded:
            self.driver.clear_state(self.optimizer, shadow)
            return
        copied = {key: _copy(key, value, shadow.device, group, may_keep) for key, value in encoded.items()}
        master = copied.pop(MASTER, None)
        if master is not None and index in self._model_dtypes:
            shadow.data.copy_(master)
        self.driver.write_state(self.optimizer, shadow, self.driver.decode_state(copied, group))

    def state_tensors(self) -> list[Tensor]:
        """Every tensor of the state held here, also those inside upstream's own objects."""
        return [
            tensor
            for shadow in self.shadows.values()
            for tensor in tensors_in(self.driver.read_state(self.optimizer, shadow))
        ]


def _refuse_own_groups(
    name: str, optimizer: Optimizer, groups: Sequence[ParamGroup], is_undescribed: Sequence[bool]
) -> None:
    """A class that nobody described and that was given groups keeps them: what it steps is found in them again.

    Raises:
        UnsupportedError: It has made others.
    """
    given = [[id(one) for one in group["params"]] for group in groups]
    made = [[id(one) for one in group["params"]] for group in optimizer.param_groups]
    told = [not has or own == theirs for own, theirs, has in zip(given, made, is_undescribed, strict=False)]
    if len(given) != len(made) or not all(told):
        raise UnsupportedError(
            f"{name} steps other tensors, or in other param groups, than it was given: "
            f"{len(optimizer.param_groups)} groups of {sum(len(g['params']) for g in optimizer.param_groups)} tensors, "
            f"not {len(groups)} of {sum(len(g['params']) for g in groups)}. Make its groups yourself, in params=[...]; "
            "or use it in one process, without dist_optim."
        )


def _refuse_changed_gradients(
    name: str, before: Mapping[int, tuple[Tensor, int]], now: Mapping[int, Tensor | None]
) -> None:
    """Raise when a method has written to gradients, or taken some away: they would not find their way back.

    Raises:
        UnsupportedError: Perhaps on this rank alone.
    """
    if any(now[index] is not gradient or gradient._version != version for index, (gradient, version) in before.items()):
        raise UnsupportedError(
            f"{name}() changes gradients, which stay with the model here. Change them before step(), on "
            "parameter.grad of every rank."
        )


def _copy(key: str, value: Any, device: torch.device, group: ParamGroup, may_keep: bool) -> Any:
    """Tensors go to the parameter's device; a step counter stays where torch keeps it (on the host, unless fused)."""
    if not isinstance(value, Tensor):
        return value
    stays = key == "step" and not group.get("fused") and not group.get("capturable")
    return value.detach().clone() if stays else value.detach().to(device, copy=not may_keep)
