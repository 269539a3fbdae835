"""The loss on many ranks: of models that do not divide by ``num_items_in_batch``, what it is in one process.

transformers hands the number of labels of all ranks to the model, which divides its sum by it, and multiplies the loss
by the number of ranks: their mean is then the mean over all labels. But BERT, T5 and many others take the number among
their ``**kwargs``, and return the mean of their own batch as ever. Multiplied, it is too large by the number of ranks,
and so is every gradient: nothing to Adam, much to SGD, LOMO and clipping. Here such a loss is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_optim.ranks.agreement import gather_objects, num_ranks, own_rank

__all__ = ["LossOfRanksMixin"]


class LossOfRanksMixin:
    """The Trainer's ``compute_loss``. Who overrides it without ``super()`` scales as they like."""

    args: Any
    accelerator: Any
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    _ignores_count: bool | None = None
    """Whether the loss does not depend on ``num_items_in_batch``; None before it was looked at."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in transformers; a mean over a rank's own batch is not multiplied by the number of ranks."""
        count = num_items_in_batch
        if self._ignores_count is None and self._is_multiplied(count):
            return self._first_loss(model, inputs, return_outputs, count)
        return self._loss(model, inputs, None if self._ignores_count else count, return_outputs)

    def _loss(self, model: nn.Module, inputs: Any, count: Any, return_outputs: bool = False) -> Any:
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=count)  # type: ignore[misc]

    def _is_multiplied(self, count: Any) -> bool:
        takes_it = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        return num_ranks() > 1 and self.args.average_tokens_across_devices and takes_it and isinstance(count, Tensor)

    def _first_loss(self, model: nn.Module, inputs: Any, return_outputs: bool, count: Tensor) -> Any:
        """The loss of a batch, and with it whether it depends on the count. Collective, as any forward pass."""
        # Before the forward pass that backward goes through: FSDP1 frees what another one would leave behind.
        uses_it = gather_objects(self._depends_on_count(model, dict(inputs), count))
        self._settle(model, next((one for one in uses_it if one is not None), None))
        return self._loss(model, inputs, None if self._ignores_count else count, return_outputs)

    def _factor(self) -> int:
        """What transformers multiplies by; every rank of a tensor-parallel group sees the same batch."""
        get_size = getattr(self, "get_tp_size", None)
        return int(self.accelerator.num_processes // (1 if get_size is None else get_size()))

    @torch.no_grad()
    def _depends_on_count(self, model: nn.Module, inputs: dict[str, Any], count: Tensor) -> bool | None:
        """By its value, without dropout; None where the loss is zero, and would not tell."""
        was_training = model.training
        model.eval()
        try:
            one, other = (self._loss(model, dict(inputs), times * count) for times in (1.0, 2.0))
        finally:
            model.train(was_training)
        return None if not one.any() else not torch.equal(one, other)

    def _settle(self, model: nn.Module, uses_it: bool | None) -> None:
        self._ignores_count = None if uses_it is None else not uses_it
        if self._ignores_count and own_rank() == 0:
            print(
                f"{type(self.accelerator.unwrap_model(model)).__name__} returns the mean loss of its own batch, "
                f"whatever num_items_in_batch is. transformers multiplies it by the {self._factor()} ranks, and all "
                "gradients with it; here it stays the mean over ranks, as in one process."
            )
