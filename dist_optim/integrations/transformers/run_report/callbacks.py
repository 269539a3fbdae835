"""Two callbacks of a Trainer: ``RunReport`` keeps what a run leaves behind, ``Progress`` says how far it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from dist_optim.errors import CheckpointError, UsageError
from dist_optim.integrations.signals import is_rank_0
from dist_optim.integrations.transformers.run_report.about import about
from dist_optim.integrations.transformers.run_report.directory import LAST, RunDirectory
from dist_optim.integrations.transformers.run_report.measures import optimizer_of_ours, print_summary, summarize
from dist_optim.ranks.agreement import gather_objects
from dist_optim.ranks.together import together
from dist_optim.reporting.files import TELEMETRY
from dist_optim.schedulers import metric_scheduler_in
from dist_optim.telemetry.observer import Observer

__all__ = ["Progress", "RunReport"]

ROW_KEYS = ("loss", "eval_loss", "learning_rate", "tokens_per_second", "samples_per_second", "grad_norm")


class RunReport(TrainerCallback):
    """The rows of the metrics, the time in training steps, and a folder of results; it outlives a resumed run's break.

    A line is logged with each checkpoint and at the last step. Trackers see the speed, too, where this callback stands
    before them: ``trainer.callback_handler.callbacks.insert(1, report)``, after the Trainer's own flow of steps.

    Args:
        tokens_per_sample: Speed is counted in tokens of all ranks; in samples where None.
        telemetry: Whether lines of the metrics also say what the optimizer did in that step (``dist_optim.telemetry``):
            ``optim_update_ratio_group_0``, ``optim_step_seconds``, ... Other steps are as without it.
        settings: What else the run was asked for, beside the Trainer's arguments in ``run.json``; None where nothing.

    Attributes:
        rows: The metrics, in order: what ``metrics.jsonl`` holds.
        train_s: Seconds in training steps, without evaluation and saving.
        has_begun: Whether training has.
    """

    def __init__(
        self,
        tokens_per_sample: int | None = None,
        telemetry: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self.train_s = 0.0
        self.has_begun = False
        self._directory: RunDirectory | None = None
        self._is_claimed = False
        self._units, self._each = ("samples", 1) if tokens_per_sample is None else ("tokens", tokens_per_sample)
        self._per_step = 1
        self._since: float | None = None
        self._has_telemetry = telemetry
        self._settings = dict(settings or {})
        self._observer: Observer | None = None
        self._is_observed = False

    def claim(self, output_dir: str, *, overwrite: bool = False, resume: str | None = None) -> bool:
        """Make room for the run, before anything costly; ``train()`` does it where nobody has. Collective.

        Args:
            output_dir: That of the arguments.
            overwrite: Whether a run that the folder holds may be replaced, once this one has finished.
            resume: A checkpoint to go on from, or ``last``; None for a run from its beginning.

        Returns:
            False where this very run has finished and was only started again.

        Raises:
            UsageError: The folder holds what would be replaced unasked, or cannot be written.
        """
        directory = self._directory = RunDirectory(output_dir) if is_rank_0() else None
        is_new = together(lambda: directory is None or directory.claim(overwrite, resume), otherwise=UsageError)
        self._is_claimed = True
        return bool(gather_objects(is_new)[0])

    def discard(self) -> None:
        """Remove what this rank has written and not finished: for a run that is broken off."""
        if self._directory is not None and self._is_claimed:
            self._directory.discard()

    def give_up(self) -> None:
        """As ``discard``, and the folder with it where it was not there before."""
        if self._directory is not None and self._is_claimed:
            self._directory.give_up()

    def speed(self, step: int) -> float:
        """Tokens (or samples) per second so far, over all ranks."""
        return step * self._per_step / max(self.train_s, 1e-9)

    def finish(self, trainer: Any) -> dict[str, Any]:
        """Evaluate where the last step was not, write model and summary, and move all into place. Collective.

        Returns:
            The summary; ``print_summary`` shows it.
        """
        evaluated = [row["step"] for row in self.rows if "eval_loss" in row]
        if trainer.eval_dataset is not None and evaluated[-1:] != [trainer.state.global_step]:
            trainer.evaluate()
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        speed = {f"{self._units}_per_second": self.speed(trainer.state.global_step), "train_seconds": self.train_s}
        summary = {**summarize(trainer, self.rows), **speed}
        if self._directory is not None:
            model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            self._directory.finish(model, weights, trainer.processing_class, self.rows, summary)
        trainer.accelerator.wait_for_everyone()
        return summary

    def print_summary(self, summary: dict[str, Any]) -> None:
        """As a table, on rank 0."""
        if self._directory is not None:
            print_summary(summary, str(self._directory.path))

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Take over what a resumed run has logged, or refuse to go on.

        Raises:
            CheckpointError: The checkpoint is beyond the run's end.
        """
        if state.global_step > state.max_steps:
            raise CheckpointError(
                f"The checkpoint was saved at step {state.global_step}, and this run has {state.max_steps}. Give more "
                "--max_steps or --num_train_epochs, or an earlier checkpoint."
            )
        if not self._is_claimed:
            self.claim(args.output_dir, overwrite=state.global_step > 0, resume=LAST if state.global_step else None)
        state.compute_steps(args, state.max_steps)  # or a resumed run keeps those of the run before
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._per_step = samples * self._each
        self.rows = [row for entry in state.log_history if (row := _row(entry))]
        rates = [row[f"{self._units}_per_second"] for row in self.rows if f"{self._units}_per_second" in row]
        self.train_s = state.global_step * self._per_step / rates[-1] if rates else 0.0
        if self._directory is not None:
            self._directory.write_rows(self.rows, "w")
            self._directory.write_about(about(args, state, self._settings, model, optimizer))
        ours = optimizer_of_ours(optimizer) if self._has_telemetry else None
        if ours is not None:
            self._observer = Observer(ours)
            self._observer.watch_clipping()
        self.has_begun = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._observer is not None:
            self._observer.close()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._observer is not None and not self._observer.steps_in_engine:
            self._observe(self._observer, args, state)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._observer is not None:
            self._observer.note_engine_clipping()
            if self._is_observed:
                self._is_observed = False
                self._observer.end()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = self._since or time.perf_counter()
        if self._observer is not None and self._observer.steps_in_engine:
            self._observe(self._observer, args, state)

    def _observe(self, observer: Observer, args: Any, state: Any) -> None:
        """Measure the step to come where its line will be logged; where it renews projections, take its time."""
        is_logged = _is_logged(args, state, state.global_step + 1)
        self._is_observed = is_logged or observer.is_refresh_due
        if self._is_observed:
            observer.begin(copies=is_logged)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.train_s += now - (self._since or now)
        self._since = now
        is_last = state.global_step >= state.max_steps
        if is_last and args.save_strategy == "steps" and state.global_step % state.save_steps:
            control.should_save = False  # `finish` saves the model anyhow
        # With each checkpoint a line, so that no losses wait in memory.
        control.should_log = control.should_log or control.should_save or is_last

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            logs[f"{self._units}_per_second"] = self.speed(state.global_step)
            logs.update({f"{TELEMETRY}{key}": value for key, value in self._figures().items()})
            state.log_history[-1].update(logs)
        row = _row({**logs, "step": state.global_step})
        if row:
            self.rows.append(row)
            if self._directory is not None:
                self._directory.write_rows([row])

    def _figures(self) -> dict[str, float]:
        """Of the step that was just measured, once."""
        if self._observer is None:
            return {}
        figures, self._observer.latest = self._observer.latest, {}
        return figures

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = None
        if self._directory is not None:
            self._directory.drop_stale_checkpoints(kept=f"checkpoint-{state.global_step}")


class Progress(TrainerCallback):
    """Rank 0's bar, and a line for each evaluation and each change of the learning rate by a decision.

    Beside transformers' own bar it is the second: ``trainer.remove_callback(transformers.ProgressCallback)``.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._num_announced = -1
        is_hidden = args.disable_tqdm or not state.is_world_process_zero
        options = {"total": state.max_steps, "initial": state.global_step, "disable": is_hidden}
        self._bar = tqdm(desc="train", unit="step", dynamic_ncols=True, **options)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if state.is_world_process_zero and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        if state.is_world_process_zero and "eval_loss" in logs:
            tqdm.write(f"step {state.global_step}/{state.max_steps}: validation loss {logs['eval_loss']:.4f}")

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        scheduler = metric_scheduler_in(lr_scheduler)
        made = [] if scheduler is None else scheduler.decisions
        for row in made[self._num_announced :] if self._num_announced >= 0 and state.is_world_process_zero else []:
            if row["old_lr"] != row["new_lr"]:
                rates = f"{row['old_lr'][0]:.3g} to {row['new_lr'][0]:.3g}"
                tqdm.write(f"step {row['step']}/{state.max_steps}: learning rate {row['decision']} from {rates}")
        self._num_announced = len(made)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
        self.on_step_begin(args, state, control, **kwargs)


def _is_logged(args: Any, state: Any, step: int) -> bool:
    """Whether the Trainer's flow logs after this step, as far as that is known before it."""
    is_first = step == 1 and args.logging_first_step
    every = state.logging_steps if str(getattr(args.logging_strategy, "value", args.logging_strategy)) == "steps" else 0
    return is_first or step >= state.max_steps or bool(every and step % every == 0)


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of the metrics from what the Trainer logs; empty where it is another kind of line."""
    kept = {key: entry[key] for key in ROW_KEYS if key in entry}
    kept |= {key: value for key, value in entry.items() if key.startswith(TELEMETRY)}
    return {"step": entry["step"], **kept} if "loss" in kept or "eval_loss" in kept else {}
