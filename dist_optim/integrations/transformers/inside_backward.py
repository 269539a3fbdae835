"""Updates inside backward, in the Trainer: LOMO, AdaLomo and the layerwise names.

transformers' loop clips and accumulates stored gradients, of which a fused backward leaves none. So ``max_grad_norm``
becomes ``clip_grad_norm`` (a first backward for the norm, a second for the updates), LOMO that accumulates keeps its
gradients after all, and layerwise names refuse to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dist_optim.errors import HyperparameterError, UnsupportedError
from dist_optim.inside_backward.guards import why_not_fused
from dist_optim.integrations.transformers.deferred import DeferredOptimizer
from dist_optim.layouts.detect import detect
from dist_optim.ranks.agreement import own_rank
from dist_optim.specs.registry import OptimizerSpec, Trait, get_spec, spec_of_class
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["backward_of", "refuse_accumulation", "refuse_two_bounds", "settings_inside_backward"]


def settings_inside_backward(deferred: DeferredOptimizer, model: nn.Module, arguments: Any) -> dict[str, Any]:
    """More keywords for ``build_optimizer``, so that clipping and accumulation are obeyed.

    Args:
        deferred: What will be built.
        model: The placed model.
        arguments: The ``TrainingArguments``.

    Raises:
        UnsupportedError: A layerwise name, with accumulation.
        HyperparameterError: ``clip_grad_norm`` and ``max_grad_norm`` differ.
    """
    spec = get_spec(deferred.choice) if isinstance(deferred.choice, str) else spec_of_class(deferred.choice)
    if Trait.FUSED_BACKWARD not in spec.traits:
        return {}
    if spec.instead:
        refuse_accumulation(spec, arguments)
        return _clipping(spec, deferred.hyperparameters.get("clip_grad_norm"), float(arguments.max_grad_norm))
    keeps_gradients = arguments.gradient_accumulation_steps > 1 or arguments.fp16
    if keeps_gradients or deferred.hyperparameters.get("fused_backward") is False:
        return {"fused_backward": False}
    if why_not_fused(model, spec, detect(model), None):
        return {"fused_backward": False}
    return _clipping(spec, deferred.hyperparameters.get("clip_grad_norm"), float(arguments.max_grad_norm))


def refuse_accumulation(spec: OptimizerSpec, arguments: Any) -> None:
    """Refuse a layerwise name that would have to accumulate.

    Raises:
        UnsupportedError: With what to do.
    """
    if arguments.gradient_accumulation_steps > 1:
        raise UnsupportedError(
            f"{spec.name} frees each gradient inside backward: there is nothing left to accumulate. Set "
            f"gradient_accumulation_steps=1 (it is {arguments.gradient_accumulation_steps}), or use {spec.instead}, "
            "which stores its gradients."
        )


def refuse_two_bounds(spec: OptimizerSpec, own: float | None, max_grad_norm: float) -> None:
    """Refuse ``clip_grad_norm`` of the optimizer beside another ``max_grad_norm`` of the arguments.

    Raises:
        HyperparameterError: With what to do.
    """
    if own is not None and max_grad_norm not in (0, own):
        raise HyperparameterError(
            f"{spec.name}: clip_grad_norm={own} and max_grad_norm={max_grad_norm} (1.0 where it is not set) are two "
            "bounds of one norm. Set max_grad_norm=0, or the same."
        )


def _clipping(spec: OptimizerSpec, own: float | None, max_grad_norm: float) -> dict[str, Any]:
    refuse_two_bounds(spec, own, max_grad_norm)
    if own is not None or max_grad_norm == 0:
        return {}
    if own_rank() == 0:
        print(
            f"{spec.name} clips to max_grad_norm={max_grad_norm} (1.0 where it is not set): each step makes one "
            "backward pass for the norm, and one for the updates. max_grad_norm=0 saves the first."
        )
    return {"clip_grad_norm": max_grad_norm}


def backward_of(
    stock: Callable[..., None], optimizer: DistributedOptimizer | None, note_norm: Callable[[Tensor | None], None]
) -> Callable[..., None]:
    """``accelerator.backward`` for this optimizer: without LOMO's learning rate, which the optimizer has itself.

    Args:
        stock: accelerate's own.
        optimizer: What was built; None under DeepSpeed, which steps after backward.
        note_norm: Is given the norm before clipping of each fused backward; None where it was not measured.
    """

    def backward(loss: Tensor, **options: Any) -> None:
        options.pop("learning_rate", None)
        if optimizer is None or optimizer.inside_backward is None:
            stock(loss, **options)
        else:
            note_norm(optimizer.backward(loss))

    return backward
