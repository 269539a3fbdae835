"""``prove`` for anyone: what is known of a class's independence, with its evidence, before a job is started."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dist_optim.building.groups import arrange
from dist_optim.generators import generators_kept
from dist_optim.layouts.detect import detect
from dist_optim.proving.prove import prove as prove_groups
from dist_optim.specs.registry import spec_of_class
from dist_optim.specs.verdict import Verdict

__all__ = ["prove"]


def prove(cls: type[Optimizer], *, model: nn.Module | None = None, **arguments: Any) -> Verdict:
    """Whether the tensors of this class are independent of each other, so that ranks may share them.

    The verdict is the one that ``build_optimizer`` comes to. Local to the process; takes seconds.

    Args:
        cls: Any optimizer class.
        model: Whose shapes and dtypes are tried; a small one with matrices, vectors and an embedding when None.
        **arguments: As for ``build_optimizer``: ``lr``, and all else under upstream's own names.

    Raises:
        UnsupportedError: The class cannot be stepped at all.
        HyperparameterError: It refuses the arguments.
    """
    model = _small_model() if model is None else model
    spec = spec_of_class(cls)
    groups, keywords = arrange(model, spec, detect(model), arguments)
    return prove_groups(spec, groups, keywords)


def _small_model() -> nn.Module:
    with generators_kept():
        return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 11))
