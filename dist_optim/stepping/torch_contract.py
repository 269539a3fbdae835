"""What is expected of any ``torch.optim.Optimizer`` besides steps: state, hooks, a class's own methods."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from dist_optim.errors import UnsupportedError
from dist_optim.ranks.meeting import meet
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.stepping import rank_state
from dist_optim.stepping.holdings import Holdings, Progress
from dist_optim.stepping.own_methods import OwnMethods
from dist_optim.stepping.state_view import StateView

__all__ = ["TorchContract"]

_NEVER_COMPILED = ("step", "backward", "clip_grad_norm_", "zero_grad", "train", "eval")


class TorchContract(Optimizer):
    """The part of ``DistributedOptimizer`` that is torch's contract."""

    spec: OptimizerSpec
    holdings: Holdings
    progress: Progress
    _is_built = False
    _view: StateView | None = None

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        _leave_out_of_graphs(type(self))

    def meet(self, call: str) -> None:
        """Wait for all ranks to make this call, of which each has to: see ``ranks.meeting``. Collective.

        Raises:
            RanksDisagreeError: Some rank makes another call, or waits for something else.
        """
        meet(call, self.holdings.all_ranks)

    def _call_own_method(self, name: str, *args: Any, **keywords: Any) -> Any:
        raise NotImplementedError

    # State --------------------------------------------------------------------------------------------------------

    @property  # type: ignore[override]
    def state(self) -> StateView:
        """This rank's state by parameter, to look at: see ``StateView``. Not a collective."""
        if self._view is None:
            self._view = StateView(self.holdings)
        return self._view

    @state.setter
    def state(self, value: Any) -> None:
        if self._is_built:
            raise UnsupportedError(
                "optimizer.state cannot be replaced. Call load_state_dict with the state to install."
            )

    def state_dict(self) -> dict[str, Any]:
        """The state by parameter name: plain tensors and scalars, which load with ``torch.load(weights_only=True)``.

        Where parameters are replicated (one process, DDP), all of it, on every rank, as every rank of a stock optimizer
        has it: it loads under any strategy and number of ranks, and into upstream's own class. Collective then, once a
        step was taken. Where parameters are sharded, this rank's part, as in torch; it loads on the same rank of a
        run with the same layout. Not a collective then. For large models, and to move between layouts, use
        ``dist_optim.save_checkpoint``.

        Raises:
            RanksDisagreeError: Not all ranks called it.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        if not self.progress.is_fresh and rank_state.is_replicated(self.holdings):
            self.meet("state_dict()")
        made = rank_state.read(self.holdings, self.progress)
        for after in self._optimizer_state_dict_post_hooks.values():
            made = after(self, made) or made
        return made

    def state_share(self) -> dict[str, Any]:
        """This rank's part of the state under any layout; ``load_state_dict`` takes it back here. Not a collective."""
        return rank_state.read_share(self.holdings, self.progress)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Install what ``state_dict`` returned, of this or of upstream's own class; hyperparameters of groups included.

        All state is replaced: a parameter that had none when it was saved has none afterwards. Every rank loads; not
        a collective.

        Raises:
            StateDictError: It belongs to another optimizer, other parameters, or another rank. Nothing was changed.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, dict(state_dict)) or state_dict
        rank_state.write(self.holdings, self.progress, state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __deepcopy__(self, memo: Any) -> Any:
        raise self._why_no_copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._why_no_copy()

    def _why_no_copy(self) -> UnsupportedError:
        return UnsupportedError(
            f"{self.spec.name}: a DistributedOptimizer is bound to its model and its ranks, and cannot be copied or "
            "pickled. Keep optimizer.state_dict(), or build another one for the model's copy."
        )

    # Upstream's own methods ---------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; a class that does more in its own ``zero_grad`` does it. Not a collective."""
        super().zero_grad(set_to_none)
        OwnMethods(self.holdings).zero_grad(set_to_none)

    def __getattr__(self, name: str) -> Any:
        """Of a class that the user gave: a public method, ``swap()`` say, which is collective, or a plain value."""
        held = self.__dict__.get("holdings")
        own = None if held is None else OwnMethods(held)
        if own is not None and own.has(name):
            return functools.partial(self._call_own_method, name)
        if own is not None and own.has_value(name):
            return own.value(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """A value of the user's class goes to its instances."""
        held = self.__dict__.get("holdings")
        if held is not None and not hasattr(type(self), name) and name not in self.__dict__:
            own = OwnMethods(held)
            if own.has_value(name):
                own.set_value(name, value)
                return
        super().__setattr__(name, value)


_left_out: set[type] = set()


def _leave_out_of_graphs(kind: type[TorchContract]) -> None:
    """Let ``torch.compile`` break its graph where it meets these methods: what they do is no graph, and bits count.

    Once an optimizer is there, as torch has imported its compiler for it by then.
    """
    why = "dist_optim's steps are not compiled: call this outside of the compiled function, or without fullgraph=True."
    if kind in _left_out:
        return
    _left_out.add(kind)
    for name in _NEVER_COMPILED:
        setattr(kind, name, torch.compiler.disable(getattr(kind, name), reason=why))
