"""transformers: a ``Trainer`` and ``TrainingArguments`` with every registered optimizer under every strategy.

A drop-in for transformers' own::

    from dist_optim.integrations.transformers import Trainer, TrainingArguments

    arguments = TrainingArguments("out", optim="galore_adamw", optim_target_modules=["attn", "mlp"],
                                  optim_args={"rank": 64, "update_proj_gap": 200}, fsdp=True)
    Trainer(model, arguments, train_dataset=data).train()

``Seq2SeqTrainer`` and ``Seq2SeqTrainingArguments`` are there too.

Other Trainers take the same: ``class MyTrainer(DistOptimTrainerMixin, SFTTrainer)``, with ``optim`` set as their
arguments allow. For a script that shall stay as it is, there is ``dist_optim.run``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dist_optim.errors import MissingPackageError
from dist_optim.overrides import check

try:
    import transformers

    check("transformers")
    check("accelerate")
    from dist_optim.integrations.transformers.arguments import TrainingArguments
    from dist_optim.integrations.transformers.mixin import DistOptimTrainerMixin
except ImportError as error:
    raise MissingPackageError(
        f"dist_optim.integrations.transformers needs transformers and accelerate ({error}). Install them with: "
        "pip install 'dist-optim[train]'"
    ) from error

if TYPE_CHECKING:
    from dist_optim.integrations.transformers.seq2seq import Seq2SeqTrainer, Seq2SeqTrainingArguments

__all__ = ["DistOptimTrainerMixin", "Seq2SeqTrainer", "Seq2SeqTrainingArguments", "Trainer", "TrainingArguments"]


class Trainer(DistOptimTrainerMixin, transformers.Trainer):
    """transformers' Trainer; see ``DistOptimTrainerMixin`` for what differs."""


def __getattr__(name: str) -> Any:
    """The Seq2Seq ones on use: their module extends transformers' Trainer, which ``dist_optim.run`` may yet replace."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.seq2seq"), name)
