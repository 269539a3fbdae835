"""What `launch/train.py` leaves behind: metrics, plots, model and summary, never a half-written one.

Everything is written to `OUTPUT_DIR/.unfinished`. Its `summary.json`, written last, says that the results are whole;
then they are moved into place, the summary last again. A run that is interrupted leaves an earlier run in the same
folder as it was, and a kill between two moves costs nothing: the next start makes the others. Only rank 0 has a
`RunDirectory`.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from tqdm import tqdm
from transformers import TrainerCallback

from dist_optim.errors import CheckpointError
from dist_optim.schedulers import metric_scheduler_in
from train_arguments import LAST, UsageError

LOG_NAME, SUMMARY = "lr_decisions.jsonl", "summary.json"
FINISHED_NAMES = ("model", "metrics.jsonl", "loss.png", "lr.png", SUMMARY)
MARKERS = {"raised": "^", "lowered": "v", "reset": "s", "changed": "D", "skipped": "x"}
ROW_KEYS = ("loss", "eval_loss", "learning_rate", "tokens_per_second", "grad_norm")


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, the latest last."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in Path(output_dir).glob("checkpoint-*")]
    return [path for _, path in sorted((int(number), path) for number, path in found if number.isdigit())]


def find_checkpoint(asked: str | None, output_dir: str) -> Path | None:
    """The checkpoint to resume from; ``last`` without any starts from the beginning, for jobs that restart themselves.

    Raises:
        UsageError: The folder does not exist, or is no checkpoint.
    """
    saved = checkpoints_in(output_dir)
    if asked is None or asked == LAST:
        return saved[-1] if asked and saved else None
    if not Path(asked).is_dir():
        listed = ", ".join(map(str, saved)) or f"the checkpoints of a run (there are none in {output_dir!r})"
        raise UsageError(f"--resume_from_checkpoint {asked!r} is not a folder. Give one of {listed}, or: {LAST}.")
    if not (Path(asked) / "trainer_state.json").is_file():
        raise UsageError(f"--resume_from_checkpoint {asked!r} was not saved by launch/train.py: no trainer_state.json.")
    return Path(asked)


class RunDirectory:
    """One run's folder: `claim` it, `write_rows` as they come, then `finish`."""

    def __init__(self, output_dir: str) -> None:
        self.path = Path(output_dir)
        self.unfinished = self.path / ".unfinished"
        self._was_there = self.path.exists()
        self._stale: list[Path] = []

    def claim(self, overwrite: bool, resume: str | None) -> bool:
        """Make room for a run; False where this very run has finished and was only started again.

        Args:
            overwrite: Whether a run that the folder holds may be replaced.
            resume: `--resume_from_checkpoint`.

        Raises:
            UsageError: The folder holds what would be replaced unasked, or cannot be written.
        """
        try:
            self._move_into_place()
            if not overwrite and resume == LAST and (self.path / SUMMARY).exists():
                return False
            if not overwrite:
                self._refuse_to_replace(resume)
            elif resume is None:
                self._stale = checkpoints_in(self.path)
            self.discard()
            self.unfinished.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                f"--output_dir {str(self.path)!r} cannot be written: {error}. Choose another folder."
            ) from error
        return True

    def _refuse_to_replace(self, resume: str | None) -> None:
        held = [name for name in FINISHED_NAMES if (self.path / name).exists()]
        if SUMMARY in held or (held and resume is None):
            raise UsageError(
                f"--output_dir {str(self.path)!r} already holds a run ({', '.join(held)}). Choose another folder, or "
                "add --overwrite_output_dir to replace that run once the new one has finished."
            )
        saved = checkpoints_in(self.path)
        if saved and resume is None:
            raise UsageError(
                f"--output_dir {str(self.path)!r} holds checkpoints of a run ({saved[-1].name} is the last). Go on "
                f"from it with --resume_from_checkpoint {LAST}, choose another folder, or add --overwrite_output_dir."
            )

    def write_rows(self, rows: list[dict[str, Any]], mode: str = "a") -> None:
        """Add lines to the metrics, or with mode "w" begin them anew; they are on disk when this returns."""
        with open(self.unfinished / "metrics.jsonl", mode, encoding="utf-8") as file:
            file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)

    def drop_stale_checkpoints(self, kept: str = "") -> None:
        """Remove the checkpoints of the run that this one replaces."""
        for path in self._stale:
            if path.name != kept:
                shutil.rmtree(path, ignore_errors=True)
        self._stale = []

    def finish(
        self, model: Any, weights: dict[str, Any], tokenizer: Any, rows: list[dict[str, Any]], summary: dict[str, Any]
    ) -> None:
        """Write the rest, and move everything into place."""
        model.save_pretrained(self.unfinished / "model", state_dict=weights)
        tokenizer.save_pretrained(self.unfinished / "model")
        plot_losses(rows, self.unfinished / "loss.png")
        plot_rates(rows, self.unfinished / LOG_NAME, self.unfinished / "lr.png")
        self.drop_stale_checkpoints()
        draft = self.unfinished / f".{SUMMARY}"
        draft.write_text(json.dumps(_finite(summary), indent=2) + "\n", encoding="utf-8")
        draft.replace(self.unfinished / SUMMARY)
        self._move_into_place()

    def _move_into_place(self) -> None:
        """Move whole results, if there are any; what a kill leaves undone here, the next call does."""
        mark = self.unfinished / SUMMARY
        if not mark.exists():
            return
        (self.path / SUMMARY).unlink(missing_ok=True)
        if "lr_decisions" not in json.loads(mark.read_text(encoding="utf-8")):
            (self.path / LOG_NAME).unlink(missing_ok=True)
        for name in ("model", "metrics.jsonl", "loss.png", "lr.png", LOG_NAME):
            new, old = self.unfinished / name, self.path / name
            if new.exists() and old.is_dir():
                old.rename(self.unfinished / f"old_{name}")
            if new.exists():
                new.replace(old)
        mark.replace(self.path / SUMMARY)
        self.discard()

    def discard(self) -> None:
        """Remove what is unfinished; whole results wait to be moved."""
        if self.unfinished.exists() and not (self.unfinished / SUMMARY).exists():
            shutil.rmtree(self.unfinished)

    def give_up(self) -> None:
        """Leave the disk as it was before `claim`."""
        self.discard()
        if not self._was_there and self.path.is_dir() and not list(self.path.iterdir()):
            self.path.rmdir()


class Recorder(TrainerCallback):
    """Keeps the rows of the metrics and the time of training steps; both outlive a resumed run's break.

    Args:
        directory: Rank 0's.
        tokens_per_step: Tokens that all ranks together consume in one optimizer step.
    """

    def __init__(self, directory: RunDirectory | None, tokens_per_step: int) -> None:
        self.directory, self.tokens_per_step = directory, tokens_per_step
        self.rows: list[dict[str, Any]] = []
        self.train_s = 0.0
        """Time in training steps, without evaluation and saving."""
        self.has_begun = False
        self._since: float | None = None

    def all(self, key: str) -> list[Any]:
        """A column of the metrics."""
        return [row[key] for row in self.rows if key in row]

    def tokens_per_second(self, step: int) -> float:
        """So far, over all ranks."""
        return step * self.tokens_per_step / max(self.train_s, 1e-9)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over what a resumed run has logged, or refuse to go on.

        Raises:
            CheckpointError: The checkpoint is beyond the run's end.
            UsageError: The schedule would never decide.
        """
        if state.global_step > state.max_steps:
            raise CheckpointError(
                f"The checkpoint was saved at step {state.global_step}, and this run has {state.max_steps}. Give more "
                "--max_steps or --num_train_epochs, or an earlier checkpoint."
            )
        refuse_without_decisions(args, state.max_steps)
        state.compute_steps(args, state.max_steps)  # or a resumed run keeps those of the run before
        self.rows = [row for entry in state.log_history if (row := _row(entry))]
        rates = self.all("tokens_per_second")
        self.train_s = state.global_step * self.tokens_per_step / rates[-1] if rates else 0.0
        if self.directory is not None:
            self.directory.write_rows(self.rows, "w")
        self.has_begun = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = self._since or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.train_s += now - (self._since or now)
        self._since = now
        is_last = state.global_step >= state.max_steps
        if is_last and args.save_strategy == "steps" and state.global_step % state.save_steps:
            control.should_save = False  # the model is saved anyhow
        # With each checkpoint a line, so that no losses wait in memory.
        control.should_log = control.should_log or control.should_save or is_last

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        row = _row({**logs, "step": state.global_step})
        if row:
            self.rows.append(row)
            if self.directory is not None:
                self.directory.write_rows([row])

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since = None
        if self.directory is not None:
            self.directory.drop_stale_checkpoints(kept=f"checkpoint-{state.global_step}")


def refuse_without_decisions(args: Any, num_steps: int) -> None:
    """Raise `UsageError` where the schedule decides after evaluations, and there would be none in time."""
    if args.follows_metric and args.eval_strategy == "steps" and args.eval_steps > num_steps:
        raise UsageError(
            f"This --lr_scheduler_type decides after every --eval_steps steps, and --eval_steps {args.eval_steps} "
            f"gives no decision in {num_steps} steps. Set --eval_steps to a small part of them."
        )


class Progress(TrainerCallback):
    """Rank 0's bar, and a line for each evaluation and each change of the learning rate by a decision."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._num_announced = -1
        options = {"total": state.max_steps, "initial": state.global_step, "disable": args.disable_tqdm}
        self._bar = tqdm(desc="train", unit="step", dynamic_ncols=True, **options)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        if "eval_loss" in logs:
            tqdm.write(f"step {state.global_step}/{state.max_steps}: validation loss {logs['eval_loss']:.4f}")

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        scheduler = metric_scheduler_in(lr_scheduler)
        made = [] if scheduler is None else scheduler.decisions
        for row in made[self._num_announced :] if self._num_announced >= 0 else []:
            if row["old_lr"] != row["new_lr"]:
                rates = f"{row['old_lr'][0]:.3g} to {row['new_lr'][0]:.3g}"
                tqdm.write(f"step {row['step']}/{state.max_steps}: learning rate {row['decision']} from {rates}")
        self._num_announced = len(made)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
        self.on_step_begin(args, state, control, **kwargs)


def summarize(trainer: Any, recorder: Recorder) -> dict[str, Any]:
    """The summary as far as one rank knows it."""
    args, state = trainer.args, trainer.state
    rate = float(trainer.optimizer.param_groups[0]["lr"])
    scheduler = metric_scheduler_in(trainer.lr_scheduler)
    decisions = {} if scheduler is None else {"lr_decisions": Counter(row["decision"] for row in scheduler.decisions)}
    losses, eval_losses = recorder.all("loss") or [math.nan], recorder.all("eval_loss") or [math.nan]
    return {
        "optim": str(getattr(args.optim, "value", args.optim)),
        "strategy": strategy_name(trainer.accelerator),
        "world_size": args.world_size,
        "steps": state.global_step,
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "eval_loss_first": eval_losses[0],
        "eval_loss_last": eval_losses[-1],
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "learning_rate_last": rate,
        **decisions,
        "tokens_per_second": recorder.tokens_per_second(state.global_step),
        "train_seconds": recorder.train_s,
    }


def optimizer_state_bytes(optimizer: Any) -> int:
    """What this rank holds; accelerate wraps the optimizer, and DeepSpeed once more."""
    while optimizer is not None and not hasattr(optimizer, "optimizer_state_bytes"):
        optimizer = getattr(optimizer, "optimizer", None)
    return 0 if optimizer is None else int(optimizer.optimizer_state_bytes())


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on its GPU, or resident in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def strategy_name(accelerator: Accelerator) -> str:
    """How the model is spread, in the words of the summary."""
    kind = accelerator.distributed_type
    if kind is DistributedType.NO:
        return "none"
    if kind is DistributedType.DEEPSPEED:
        return f"zero{accelerator.deepspeed_config['zero_optimization']['stage']}"
    if kind is not DistributedType.FSDP:
        return "ddp" if kind.value.startswith("MULTI_") else kind.value.lower()
    sizes = accelerator.state.parallelism_config
    replicates = sizes is not None and sizes.dp_replicate_size > 1
    return "hsdp" if replicates else f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"


def print_summary(summary: dict[str, Any], output_dir: str) -> None:
    """Show the run's result as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary['optim']} on {summary['world_size']} rank(s), {summary['strategy']}", show_header=False
    )
    counts = ", ".join(f"{count} {decision}" for decision, count in summary.get("lr_decisions", {}).items())
    rate = f"{summary['learning_rate_last']:.3g}, {summary['lr_scheduler_type']}"
    table.add_row("steps", f"{summary['steps']}")
    table.add_row("training loss", f"{summary['train_loss_first']:.4f} → {summary['train_loss_last']:.4f}")
    table.add_row("validation loss", f"{summary['eval_loss_first']:.4f} → {summary['eval_loss_last']:.4f}")
    table.add_row("last learning rate", f"{rate}: {counts}" if counts else rate)
    table.add_row("tokens per second", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("optimizer state, by rank", _in_mib(summary["optimizer_state_bytes_per_rank"]))
    table.add_row("peak memory, by rank", _in_mib(summary["peak_memory_bytes_per_rank"]))
    table.add_row("output", output_dir)
    Console().print(table)


@contextmanager
def _plot(what: str, path: Path) -> Iterator[Any]:
    """Axes to draw ``what`` over the steps on; the figure is written when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    yield axes
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """Both losses over the steps."""
    with _plot("nats per token", path) as axes:
        for key, style in (("loss", "-"), ("eval_loss", "o--")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot([step for step, _ in points], [value for _, value in points], style, label=key)


def plot_rates(rows: list[dict[str, Any]], log: Path, path: Path) -> None:
    """The learning rate over the steps, and a mark at each decision that the log holds."""
    decisions = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    points = [(row["step"], row["learning_rate"]) for row in rows if "learning_rate" in row]
    for made in decisions:  # the step before the decision used the old rate, the step after it uses the new one
        points += [(made["step"], made["old_lr"][0]), (made["step"] + 1, made["new_lr"][0])]
    points.sort(key=lambda point: point[0])
    with _plot("learning rate", path) as axes:
        axes.plot([at for at, _ in points], [rate for _, rate in points], "-", label="learning rate")
        for decision, marker in MARKERS.items():
            marked = [made for made in decisions if made["decision"] == decision]
            if marked:
                axes.plot(
                    [made["step"] for made in marked], [made["old_lr"][0] for made in marked], marker, label=decision
                )


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of the metrics from what the Trainer logs; empty where it is another kind of line."""
    kept = {key: entry[key] for key in ROW_KEYS if key in entry}
    return {"step": entry["step"], **kept} if "loss" in kept or "eval_loss" in kept else {}


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row as strict JSON can hold it: NaN and infinity become null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _in_mib(sizes: list[int]) -> str:
    return ", ".join(f"{size / 2**20:.1f} MiB" for size in sizes)
