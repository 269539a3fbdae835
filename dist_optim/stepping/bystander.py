"""In the place of an upstream instance, on the ranks that step nothing because one rank steps everything."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.stepping.group_values import GroupValues
from dist_optim.stepping.upstream_instance import UpstreamInstance

__all__ = ["Bystander"]


class _Shown(Optimizer):
    """What the owner's optimizer shows of itself; it steps nothing, and is never constructed as upstream's is."""

    def __init__(self, groups: list[ParamGroup], defaults: dict[str, Any]) -> None:
        self.param_groups, self.defaults, self.state = groups, defaults, {}  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        return None

    def train(self) -> None:
        return None

    eval = train


class Bystander(UpstreamInstance):
    """Holds the groups as the owner's upstream has them; owner and bystanders exchange them after every step."""

    def __init__(self, spec: OptimizerSpec, groups: Sequence[ParamGroup], arguments: Mapping[str, Any]) -> None:
        self.driver, self.extras = spec.driver, None
        self.shadows, self.ghosts = {}, {}
        self._group_of, self._model_dtypes, self._ghosts = {}, {}, []
        self.of_model, self._own_storage = set(), set()
        shown = [{**spec.values_in(group, arguments), "params": []} for group in groups]
        self.optimizer = _Shown(shown, dict(arguments))
        self.group_values = GroupValues(self.optimizer, [spec.is_undescribed_in(group) for group in groups])

    def add_group(self, spec: OptimizerSpec, group: ParamGroup, *_: Any) -> None:
        """Show one more group."""
        self.optimizer.param_groups.append({**spec.values_in(group, self.optimizer.defaults), "params": []})
        self.group_values.note_new_group(spec.is_undescribed_in(group))

    def step(self, *_: Any, **__: Any) -> dict[int, Any]:
        """Nothing is stepped here."""
        return {}

    def show_as(
        self,
        groups: Sequence[tuple[Collection[str], Mapping[str, Any]]],
        defaults: Mapping[str, Any],
        values: Mapping[str, Any],
    ) -> None:
        """Take over what the owner's optimizer has in its groups, and its plain attributes.

        Args:
            groups: The keys of each group, and those of its values that can be sent; others stay as they are.
            defaults: The owner's.
            values: Its attributes.
        """
        self.group_values.take_over(groups)
        self.optimizer.defaults.update(defaults)
        vars(self.optimizer).update({key: value for key, value in values.items() if key not in vars(_Shown([], {}))})
