"""The weights in the Trainer's checkpoints: written, averaged where the optimizer averages; read by any strategy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from dist_optim.checkpoint import exported_weights
from dist_optim.checkpoint.directory import attempt
from dist_optim.checkpoint.engine_view import is_ours
from dist_optim.checkpoint.model_weights import StoredWeights, copied_weights, find_weights, load_weights, save_weights
from dist_optim.checkpoint.plain_loads import plain_loads
from dist_optim.integrations.transformers.adapters import is_peft_model, stored_adapters
from dist_optim.integrations.transformers.beside_training import DeferredWrites, is_deferrable, writer_of_weights

__all__ = ["WeightsMixin"]


class WeightsMixin:
    """The Trainer's methods that write and read weights. Those of a checkpoint are collective."""

    # transformers' own attributes that are used here; mypy does not follow transformers.
    args: Any
    accelerator: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    state: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _deferred: DeferredWrites | None = None
    """While a save is made that is to be written beside the training."""

    def _saves_logically(self) -> bool:
        """Whether a checkpoint is ours, for every strategy: not with ``add_adapter`` under DeepSpeed."""
        return is_ours(self.optimizer) and not (self.is_deepspeed_enabled and self._has_adapters_inside())

    def _has_adapters_inside(self) -> bool:
        return hasattr(self.model, "peft_config") and not is_peft_model(self.model)

    def save_model(self, *positional: Any, **named: Any) -> None:
        """As in transformers; the averaged weights of an optimizer that averages, then on all ranks together."""
        if self._saves_logically():
            with exported_weights(self.optimizer):
                self._save_weights(*positional, **named)
            return
        if self.is_deepspeed_enabled and self.optimizer is not None:
            self.optimizer.eval()
        self._save_weights(*positional, **named)

    def _save_weights(self, *positional: Any, **named: Any) -> None:
        save = functools.partial(super().save_model, *positional, **named)  # type: ignore[misc]
        if not named.get("_internal_call"):  # scripts call it on rank 0 alone
            save()
            return
        # Of a checkpoint: other ranks go on to its collectives.
        folder = Path((positional[0] if positional else named.get("output_dir")) or self.args.output_dir)
        if self._saves_logically() and self._leaves_weights_in_slices():
            attempt(lambda: self._save_all_but_weights(folder), folder, None)
            self._save_slices(folder, self.model_wrapped)
        else:
            attempt(save, folder, None)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in transformers; of a save beside the training, a copy of the weights is written later."""
        write: Callable[..., None] = super()._save  # type: ignore[misc]
        if self._deferred is None or not is_deferrable(self, state_dict):
            write(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        self._save_all_but_weights(folder)  # a tokenizer is not to be used by two threads
        if self.args.should_save:
            self._deferred.alone.append(writer_of_weights(self, state_dict, folder))

    def _save_slices(self, folder: Path, model: nn.Module) -> None:
        """Weights that nobody is to gather, now or later. Collective."""
        if self._deferred is None:
            save_weights(folder, model, self.optimizer)
        else:
            self._deferred.together.append(copied_weights(folder, model, self.optimizer))

    def _leaves_weights_in_slices(self) -> bool:
        """Whether the engine would save its own way instead, since nobody allowed it to gather; adapters are small."""
        engine = self.model_wrapped
        if not self.is_deepspeed_enabled or engine.zero_optimization_stage() < 3 or is_peft_model(self.model):
            return False
        return not engine.zero_gather_16bit_weights_on_model_save()

    def _save_all_but_weights(self, folder: Path) -> None:
        """Configuration, tokenizer, arguments."""
        self._save(str(folder), state_dict={})
        if self.args.should_save:  # it has made a file of no weights
            for path in (folder / "model.safetensors", folder / "pytorch_model.bin"):
                path.unlink(missing_ok=True)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """As in transformers; FSDP and ZeRO also take whole tensors, and all take what those have saved in pieces."""
        if (stored := self._read_here(checkpoint)) is not None:
            optimizer = self.optimizer if self._is_our_engine() else None
            load_weights(stored, self._model_to_load_into(model), optimizer)
            return
        with plain_loads():
            super()._load_from_checkpoint(checkpoint, model)  # type: ignore[misc]

    def _read_here(self, checkpoint: str) -> StoredWeights | None:
        """Its weights, where transformers would not read them under this strategy."""
        stored = find_weights(checkpoint) or (
            stored_adapters(checkpoint, self.model) if self._is_our_engine() else None
        )
        is_foreign = self.is_fsdp_enabled or self._is_our_engine() or (stored is not None and stored.folder is not None)
        return stored if is_foreign else None

    def _model_to_load_into(self, model: nn.Module | None) -> nn.Module:
        if self._is_our_engine():
            engine: nn.Module = self.model_wrapped
            return engine
        return self.model if model is None or self.is_fsdp_enabled else model

    def _is_our_engine(self) -> bool:
        return self.is_deepspeed_enabled and self._saves_logically()

    def _save_fsdp_weights(self, folder: Path) -> None:
        """In accelerate's format, where `save_model` has not written whole tensors: those load under any strategy."""
        from accelerate.utils import save_fsdp_model
        from transformers.trainer import get_fsdp_ckpt_kwargs

        plugin = self.accelerator.state.fsdp_plugin
        if "FULL_STATE_DICT" in str(plugin.state_dict_type):
            return
        if self._deferred is not None:  # a format that is written from a copy
            self._save_slices(folder, self.model)
            return
        save = functools.partial(save_fsdp_model, plugin, self.accelerator, self.model, str(folder))
        attempt(functools.partial(save, **get_fsdp_ckpt_kwargs()), folder, None)
