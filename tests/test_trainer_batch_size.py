"""``auto_find_batch_size``: where memory ends, in the forward pass or inside backward, a smaller batch is found."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from end_to_end import BATCH, make_llama
from sessions import leave_imports_to_live
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from trainers import Blocks, Job, arguments_of, fresh_accelerate, gap_between, train

from dist_optim.errors import CheckpointError, StepFailedError, UnsupportedError
from dist_optim.integrations.transformers import Trainer
from dist_optim.testing import RankPool

FITS = BATCH // 4
"""Rows of a batch for which there is memory; two ranks start with twice as many."""
FOUND = {"auto_find_batch_size": True}


class Costly(torch.autograd.Function):
    """Leaves its input as it is; there is no memory for a large batch, in one of the passes."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, fails_in_backward: bool) -> Tensor:
        ctx.fails = fails_in_backward and len(inputs) > FITS
        if not fails_in_backward and len(inputs) > FITS:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return gradient, None


def costly(is_last: bool, fails_in_backward: bool) -> nn.Module:
    """At the output of the head, whose gradient comes first; or at the first layer, after most gradients."""
    model: Any = make_llama()
    layer = model.lm_head if is_last else model.model.embed_tokens
    layer.register_forward_hook(lambda _, given, output: Costly.apply(output, fails_in_backward))
    return model


def costly_forward() -> nn.Module:
    return costly(True, False)


def costly_backward() -> nn.Module:
    return costly(True, True)


def costly_late_in_backward() -> nn.Module:
    return costly(False, True)


class SeesWrappers(Trainer):
    """Counts the wrappers that are alive in each step."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        self.seen: list[weakref.ref[nn.Module]] = []

    def training_step(self, model: nn.Module, *others: Any, **named: Any) -> Any:
        if all(one() is not model for one in self.seen):
            self.seen.append(weakref.ref(model))
        gc.collect()
        alive = [one for one in self.seen if one() is not None]
        assert len(alive) == 1, f"{len(alive)} wrappers are alive"
        if self._steps_inside_backward() and isinstance(model, DistributedDataParallel):
            assert not isinstance(model.reducer, dist.Reducer), "each gradient is reduced twice"
        return super().training_step(model, *others, **named)


def ends_as_with_the_batch_that_fits(name: str, make_model: Any, directory: str) -> None:
    leave_imports_to_live()
    job = Job(name, {**FOUND, "per_device_train_batch_size": FITS}, kind=SeesWrappers)
    fits = train(job, "ddp", Path(directory) / "fits")
    more = replace(job, make_model=make_model, settings={**FOUND, "per_device_train_batch_size": FITS + 1})
    found = train(more, "ddp", Path(directory) / "found")
    assert found.all("loss") == fits.all("loss") and gap_between(found, fits) == 0


@pytest.mark.parametrize(
    ("name", "make_model"),
    [("adamw_torch", costly_backward), ("galore_adamw", costly_late_in_backward), ("adalomo", costly_forward)],
)
def test_a_smaller_batch_is_found_where_memory_ends(
    name: str, make_model: Any, two_ranks: RankPool, tmp_path: Path
) -> None:
    two_ranks.run(ends_as_with_the_batch_that_fits, name, make_model, str(tmp_path))


def refused_under_fsdp(directory: str) -> list[str]:
    found = []
    for strategy, make_model in (("fsdp1", costly_forward), ("fsdp2", costly_late_in_backward)):
        with pytest.raises(UnsupportedError) as caught:
            train(Job("adamw_torch", FOUND, make_model=make_model), strategy, directory)
        found.append(str(caught.value))
    return found


def test_fsdp_cannot_begin_anew_and_says_so(two_ranks: RankPool, tmp_path: Path) -> None:
    for found in two_ranks.run(refused_under_fsdp, str(tmp_path)):
        assert all(f"memory ended with {2 * FITS} rows a rank" in text for text in found)
        assert all("smaller per_device_train_batch_size" in text for text in found)


def test_it_is_the_batch_that_transformers_own_trainer_finds(tmp_path: Path) -> None:
    job = Job("adamw_torch", FOUND, make_model=costly_backward)
    ours = train(job, "alone", tmp_path / "ours")
    stock = replace(job, kind=transformers.Trainer)
    theirs = train(stock, "alone", tmp_path / "stock", transformers.TrainingArguments)
    assert gap_between(ours, theirs) == 0 and ours.all("loss") == theirs.all("loss")


def test_memory_that_ends_after_updates_inside_backward_is_refused(tmp_path: Path) -> None:
    """Half of the weights are those of the next step: no smaller batch repeats that."""
    with fresh_accelerate():
        arguments = arguments_of(Job("adalomo", FOUND), "alone", tmp_path)
        trainer = Trainer(costly_late_in_backward(), arguments, train_dataset=Blocks())
        with pytest.raises(StepFailedError, match="backward failed with OutOfMemoryError after a part"):
            trainer.train()
        with pytest.raises(CheckpointError, match="Step 1 failed"):
            trainer._save_checkpoint(trainer.model, None)


def test_memory_that_ends_before_the_first_update_inside_backward_is_found_out(tmp_path: Path) -> None:
    settings = {**FOUND, "per_device_train_batch_size": FITS}
    fits = train(Job("adalomo", settings), "alone", tmp_path / "fits")
    more = {**settings, "per_device_train_batch_size": FITS + 1}
    found = train(Job("adalomo", more, make_model=costly_backward), "alone", tmp_path / "found")
    assert gap_between(found, fits) == 0
