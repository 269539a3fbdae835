"""The training loop of `launch/train.py`: steps, evaluation, and what they measure."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import train_checkpoints as checkpoints
import train_schedule as schedule
from dist_optim.ranks.agreement import gather_objects
from train_arguments import TrainArguments
from train_checkpoints import endless_batches
from train_report import RunDirectory, peak_memory_bytes

__all__ = ["TrainingRun", "evaluate", "num_training_steps", "train"]

SIGNAL_GRACE_S = 2.0


@dataclass(kw_only=True, slots=True)
class TrainingRun:
    """Everything one job holds, placed and wrapped, and how far it has come."""

    accelerator: Accelerator
    arguments: TrainArguments
    block_size: int
    directory: RunDirectory | None
    """Rank 0's only."""
    tokenizer: Any
    model: nn.Module
    optimizer: Any
    scheduler: Any
    train_loader: DataLoader[dict[str, Tensor]]
    eval_loader: DataLoader[dict[str, Tensor]]
    num_steps: int
    step: int = 0
    window: list[Tensor] = field(default_factory=list)
    """Losses of the steps since the last line of metrics."""
    random_state: dict[str, Any] | None = None
    """Where the random generators of a resumed run stood."""
    train_s: float = 0.0
    """Time in training steps, without evaluation."""
    train_losses: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> int:
        """Tokens all ranks together consume in one optimizer step."""
        arguments = self.arguments
        samples = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        return samples * self.block_size * self.accelerator.num_processes

    def progress(self) -> dict[str, Any]:
        """How far this rank has come, as plain values."""
        return {
            "step": self.step,
            "train_s": self.train_s,
            "train_losses": self.train_losses,
            "eval_losses": self.eval_losses,
            "window": [loss.item() for loss in self.window],
            "rows": self.directory.rows if self.directory is not None else [],
        }

    def continue_from(self, progress: dict[str, Any]) -> None:
        """Take over what ``progress`` returned."""
        self.step, self.train_s = progress["step"], progress["train_s"]
        self.train_losses, self.eval_losses = list(progress["train_losses"]), list(progress["eval_losses"])
        self.window = [torch.tensor(loss, device=self.accelerator.device) for loss in progress["window"]]
        if self.directory is not None:
            self.directory.restore(progress["rows"])

    def discard(self) -> None:
        """Remove what an unfinished run has written."""
        if self.directory is not None:
            self.directory.discard()


class StepResult(NamedTuple):
    """What one optimizer step saw on this rank."""

    loss: Tensor
    """Mean over the step's micro-batches, on the rank's device."""
    learning_rate: float
    grad_norm: float | None
    """Global norm before clipping; None where clipping is off."""


def num_training_steps(arguments: TrainArguments, num_batches: int) -> int:
    """Optimizer steps of the job, given one rank's batches an epoch."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return math.ceil(arguments.num_train_epochs * num_batches / arguments.gradient_accumulation_steps)


def train(run: TrainingRun) -> dict[str, Any]:
    """Train to the last step, leave everything in the output folder, and return the summary.

    Collective over all ranks.
    """
    try:
        if run.step == 0:
            _evaluate_and_record(run)
        _train_steps(run)
        if not run.eval_losses or run.step % run.arguments.eval_steps:
            _evaluate_and_record(run)
        return _finish(run)
    except Exception:
        # When a signal ends the job, a rank that got it first breaks the others' collectives. Theirs is then on its
        # way, and turns this failure into the interruption that it is.
        time.sleep(SIGNAL_GRACE_S)
        raise


def _train_steps(run: TrainingRun) -> None:
    arguments, accelerator = run.arguments, run.accelerator
    bar = tqdm(
        total=run.num_steps,
        initial=run.step,
        desc="train",
        unit="step",
        dynamic_ncols=True,
        disable=arguments.disable_tqdm or not accelerator.is_main_process,
    )
    num_consumed = run.step * arguments.gradient_accumulation_steps
    batches = endless_batches(accelerator, run.train_loader, num_consumed, run.random_state)
    window = run.window
    with bar:
        while run.step < run.num_steps:
            started = time.perf_counter()
            result = _train_step(run, batches)
            window.append(result.loss)
            run.step += 1
            if run.step == 1 or run.step % arguments.logging_steps == 0 or run.step == run.num_steps:
                loss_value = accelerator.reduce(torch.stack(window).mean(), reduction="mean").item()
                run.train_losses.append(loss_value)
                window.clear()
                bar.set_postfix(loss=f"{loss_value:.3f}", refresh=False)
            run.train_s += time.perf_counter() - started
            if not window:
                _record_step(run, result)
            bar.update()
            if run.step % arguments.eval_steps == 0:
                _evaluate_and_record(run)
                schedule.decide(run)
            if arguments.save_steps and run.step % arguments.save_steps == 0:
                checkpoints.save(run)


def _train_step(run: TrainingRun, batches: Iterator[dict[str, Tensor]]) -> StepResult:
    """One optimizer step over its micro-batches."""
    accelerator, arguments = run.accelerator, run.arguments
    losses: list[Tensor] = []
    learning_rate, grad_norm = run.optimizer.param_groups[0]["lr"], None
    for _ in range(arguments.gradient_accumulation_steps):
        with accelerator.accumulate(run.model):
            loss = run.model(**next(batches)).loss
            accelerator.backward(loss)
            losses.append(loss.detach().float())
            if accelerator.sync_gradients:
                if arguments.max_grad_norm > 0:
                    norm = accelerator.clip_grad_norm_(run.model.parameters(), arguments.max_grad_norm)
                    grad_norm = None if norm is None else float(norm)  # ZeRO-0 in fp32 does not tell it
                run.optimizer.step()
                schedule.step(run.scheduler)
                run.optimizer.zero_grad()
    return StepResult(torch.stack(losses).mean(), learning_rate, grad_norm)


@torch.no_grad()
def evaluate(run: TrainingRun) -> float:
    """Mean loss a token over the validation blocks, the same number on every rank. Collective over all ranks."""
    run.model.eval()
    run.optimizer.eval()
    losses = []
    for batch in run.eval_loader:
        logits = run.model(input_ids=batch["input_ids"]).logits[:, :-1]  # [blocks, block_size - 1, vocabulary]
        token_losses = F.cross_entropy(logits.float().transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        # Blocks are equally long, so that the mean of block means is the mean over tokens.
        losses.append(run.accelerator.gather_for_metrics(token_losses.mean(dim=1)))
    run.optimizer.train()
    run.model.train()
    return torch.cat(losses).mean().item()


def _evaluate_and_record(run: TrainingRun) -> None:
    loss = evaluate(run)
    run.eval_losses.append(loss)
    if run.directory is not None:
        run.directory.add({"step": run.step, "eval_loss": loss})
        tqdm.write(f"step {run.step}/{run.num_steps}: validation loss {loss:.4f}")


def _record_step(run: TrainingRun, result: StepResult) -> None:
    if run.directory is None:
        return
    row = {
        "step": run.step,
        "loss": run.train_losses[-1],
        "learning_rate": result.learning_rate,
        "tokens_per_second": run.step * run.tokens_per_step / run.train_s,
    }
    run.directory.add(row if result.grad_norm is None else {**row, "grad_norm": result.grad_norm})


def _finish(run: TrainingRun) -> dict[str, Any]:
    """Gather what ranks measured, and have rank 0 write the results."""
    accelerator = run.accelerator
    run.optimizer.eval()  # optimizers that train on other weights than they deliver swap here
    state_dict = accelerator.get_state_dict(run.model)
    optimizer = run.optimizer
    while not hasattr(optimizer, "optimizer_state_bytes"):  # accelerate wraps it, and DeepSpeed once more
        optimizer = optimizer.optimizer
    summary = {
        "optim": run.arguments.optim,
        "strategy": strategy_name(accelerator),
        "world_size": accelerator.num_processes,
        "steps": run.step,
        "train_loss_first": run.train_losses[0],
        "train_loss_last": run.train_losses[-1],
        "eval_loss_first": run.eval_losses[0],
        "eval_loss_last": run.eval_losses[-1],
        **schedule.summarize(run),
        "tokens_per_second": run.step * run.tokens_per_step / run.train_s,
        "train_seconds": run.train_s,
        "optimizer_state_bytes_per_rank": gather_objects(optimizer.optimizer_state_bytes()),
        "peak_memory_bytes_per_rank": gather_objects(peak_memory_bytes(accelerator.device)),
    }
    if run.directory is not None:
        run.directory.finish(accelerator.unwrap_model(run.model), state_dict, run.tokenizer, summary)
    accelerator.wait_for_everyone()
    return summary


def strategy_name(accelerator: Accelerator) -> str:
    """How the model is spread, in the words of the summary."""
    kind = accelerator.distributed_type
    if kind is DistributedType.NO:
        return "none"
    if kind is DistributedType.DEEPSPEED:
        return f"zero{accelerator.deepspeed_config['zero_optimization']['stage']}"
    if kind is not DistributedType.FSDP:
        return "ddp" if kind.value.startswith("MULTI_") else kind.value.lower()
    replicates = accelerator.parallelism_config is not None and accelerator.parallelism_config.dp_replicate_size > 1
    return "hsdp" if replicates else f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
