"""transformers' Seq2SeqTrainer and its arguments, with every registered optimizer under every strategy."""

from __future__ import annotations

from dataclasses import dataclass

import transformers

from dist_optim.integrations.transformers.arguments import TrainingArguments
from dist_optim.integrations.transformers.mixin import DistOptimTrainerMixin

__all__ = ["Seq2SeqTrainer", "Seq2SeqTrainingArguments"]

if issubclass(transformers.Seq2SeqTrainer, DistOptimTrainerMixin):  # dist_optim.run has replaced what it extends
    Seq2SeqTrainer, Seq2SeqTrainingArguments = transformers.Seq2SeqTrainer, transformers.Seq2SeqTrainingArguments
else:

    class Seq2SeqTrainer(DistOptimTrainerMixin, transformers.Seq2SeqTrainer):  # type: ignore[no-redef]
        """transformers' Seq2SeqTrainer; see ``DistOptimTrainerMixin`` for what differs."""

    @dataclass
    class Seq2SeqTrainingArguments(transformers.Seq2SeqTrainingArguments, TrainingArguments):  # type: ignore[no-redef]
        """transformers' Seq2SeqTrainingArguments, with every registered name in ``optim``."""
