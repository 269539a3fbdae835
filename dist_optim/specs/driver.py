"""How an unmodified upstream optimizer is constructed, stepped, and its state read and written.

``UpstreamDriver`` suits every optimizer that keeps to torch's conventions. A family that does not (objects in its
state, state outside ``optimizer.state``, arguments that must be forced) overrides the one method concerned, in the
family's file under ``dist_optim/optimizers/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.specs.state_codec import Leaves, decode, encode, is_plain

__all__ = ["FLOPS_PER_ELEMENT", "STRUCTURE", "NamedDriver", "ParamGroup", "UpstreamDriver", "tensors_in"]

FLOPS_PER_ELEMENT = 20.0
"""Of ``step_cost``: arithmetic that takes as long as an elementwise pass over one element."""
STRUCTURE = "(structure)"
"""Key of the text that says how the nested parts of a state belong together."""

ParamGroup = dict[str, Any]


class UpstreamDriver:
    """The seam between dist_optim and one upstream class; the default for classes that keep to torch's conventions."""

    wants_names: bool = False
    """Whether param groups carry the parameters' names too, under ``param_names``, as in torch's own optimizers."""
    ghosts_have_gradients: bool = False
    """A parameter that is stepped elsewhere is present as an empty ghost. Where upstream counts only parameters *with*
    a gradient, the ghost must carry an empty one; upstream then steps all ghosts in each round."""
    counts_places: bool = False
    """Upstream goes by a parameter's place among those of its group that have a gradient: ``take_places`` is called."""

    rebinds_parameters: bool = False
    """Upstream lets what it steps have other storage, or another gradient: it is not given the model's parameters."""

    takes_groups_later: bool | None = None
    """Whether upstream's own ``add_param_group`` adds a group as ``construct`` would have; None: where that is not
    overridden."""

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        """Build the upstream optimizer on ``param_groups``; ``arguments`` are its constructor's keywords."""
        return optimizer_class(param_groups, **arguments)

    def undescribed(self, optimizer: Optimizer) -> dict[str, Optimizer]:
        """The objects that may keep state of their own, by name; asked only of classes that nobody described."""
        return {"": optimizer}

    def runs_on_slices(self, values: Mapping[str, Any], device: torch.device) -> bool:
        """Whether, with these hyperparameters and on this device, any slice of a tensor may be stepped on its own.

        Asked only of optimizers with ``Trait.ELEMENTWISE``. ``values`` are the constructor's arguments, and over them
        the param group's own: GaLore's plain groups are elementwise, its low-rank ones are not.
        """
        return "rank" not in values

    def runs_on_rows(self, shape: torch.Size, fewest: int, values: Mapping[str, Any]) -> bool:
        """Whether parts of such a tensor that are whole rows, ``fewest`` or more, may each be stepped on their own.

        Asked of optimizers without ``Trait.ELEMENTWISE``: state in blocks is cut where no block is. All of a
        parameter's encoded state that is not alike on all ranks then has its rows.
        """
        return False

    def why_refused(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, values: Mapping[str, Any]
    ) -> str:
        """Why upstream cannot step a tensor like this one, and what to do; empty when it can. Asked before step 1."""
        return ""

    def why_not_divided(self, dtype: torch.dtype, values: Mapping[str, Any]) -> str:
        """Why tensors of this dtype cannot be stepped on different ranks, and what to do; empty where they can."""
        return ""

    def keeps_precision(self, values: Mapping[str, Any]) -> bool:
        """Whether, with these hyperparameters, it keeps what an update of a half-precision weight rounds away."""
        return False

    def couples(self, values: Mapping[str, Any]) -> bool:
        """Whether, with these constructor arguments, the step of one tensor depends on others.

        Asked only of optimizers with ``Trait.COUPLED``: a bound on the norm of all gradients may be left out.
        """
        return True

    def values_by_parameter(self, model: nn.Module, names: Mapping[int, str]) -> dict[int, dict[str, Any]]:
        """Hyperparameters of single parameters, by ``id(parameter)``: given by upstream's own means, or by their names.

        ``names`` are the logical ones, the same under every engine, by id.
        """
        return {}

    def step(self, optimizer: Optimizer, parameters: list[Tensor]) -> None:
        """One upstream step. ``parameters`` are those that are really stepped here (no ghosts)."""
        optimizer.step()

    def take_places(self, optimizer: Optimizer, places: list[list[int]]) -> None:
        """Receive, right before the step, the places of what is stepped, group by group: see ``counts_places``."""

    def needs_total_norm(self, values: Mapping[str, Any]) -> bool:
        """Whether a step with these constructor arguments needs the norm of all gradients together."""
        return False

    def take_total_norm(self, optimizer: Optimizer, total: Tensor) -> None:
        """Receive that norm, a 0-D fp32 tensor, right before the step. Called only where it is needed."""

    def step_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        """Estimated cost of one step of a tensor, in units of an elementwise pass over one element."""
        return float(shape.numel())

    def refresh_cost(self, shape: torch.Size, values: Mapping[str, Any]) -> float:
        """Of it, what is made anew every so many steps (an SVD), shared out over the steps in between."""
        return 0.0

    def built_with(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor's arguments that upstream's group tells under other names: for who has the groups alone."""
        return {}

    # State as logical tensors -------------------------------------------------------------------------------------

    def read_state(self, optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
        """Upstream's own state of one parameter; empty before its first step."""
        return optimizer.state.get(parameter, {})

    def write_state(self, optimizer: Optimizer, parameter: Tensor, state: dict[str, Any]) -> None:
        """Install state as upstream keeps it.

        It goes around ``Optimizer.load_state_dict``, which casts fp32 state of a bf16 parameter to bf16.
        """
        optimizer.state[parameter] = state

    def clear_state(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """Leave the parameter without state, as before its first step."""
        optimizer.state.pop(parameter, None)

    def state_classes(self) -> tuple[type, ...]:
        """Classes of objects that upstream keeps in its state, which a file of its state dict names."""
        return ()

    def encode_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Upstream's state of one parameter as a flat dict of plain tensors, numbers, strings and None.

        Lists, dicts and objects become tensors of their own, and one text that says how they belong together.

        Raises:
            StateDictError: There is something in it that is no data.
        """
        nested = {key: value for key, value in state.items() if not (isinstance(key, str) and is_plain(value))}
        if not nested:
            return dict(state)
        leaves: Leaves = {}
        tree = encode(nested, "nested", leaves)
        plain = {key: value for key, value in state.items() if key not in nested}
        return {**plain, **leaves, STRUCTURE: json.dumps(tree)}

    def decode_state(self, encoded: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of ``encode_state``; ``group`` is the parameter's upstream group."""
        if STRUCTURE not in encoded:
            return dict(encoded)
        tree = json.loads(encoded[STRUCTURE])
        leaves = {key: value for key, value in encoded.items() if key.startswith("nested.")}
        plain = {key: value for key, value in encoded.items() if key != STRUCTURE and key not in leaves}
        return {**plain, **decode(tree, leaves)}

    def as_upstream_has_it(self, encoded: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
        """Encoded state with its tensors in upstream's own shapes, for who loads it into upstream's class."""
        return dict(encoded)


class NamedDriver(UpstreamDriver):
    """For classes whose constructor takes named parameters, and decides by the names what to do with each."""

    wants_names = True

    def construct(
        self, optimizer_class: type[Optimizer], param_groups: list[ParamGroup], arguments: Mapping[str, Any]
    ) -> Optimizer:
        build: Any = optimizer_class
        given: list[Any] = param_groups
        if given and isinstance(given[0], tuple):  # as a user gives one group without values
            return build(given, **arguments)
        named = [pair for group in given for pair in zip(group["param_names"], group["params"], strict=True)]
        return build(named, **arguments)


def as_given(groups: list[ParamGroup]) -> list[Any]:
    """One group without values is what a user gives as a plain list; some classes take nothing else."""
    (first, *others) = groups
    if others or not first["params"] or first.keys() - {"params", "param_names"}:
        return groups
    return list(zip(first["param_names"], first["params"], strict=True)) if "param_names" in first else first["params"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor reachable from upstream state: through dicts, sequences, tensor subclasses and plain objects."""
    if isinstance(value, Tensor):
        inner_names = getattr(value, "__tensor_flatten__", None)
        if inner_names is not None:
            for name in inner_names()[0]:
                yield from tensors_in(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))
