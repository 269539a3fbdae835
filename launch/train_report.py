"""What `launch/train.py` leaves behind: metrics, plot, model and summary, never a half-written one.

Everything is written to `OUTPUT_DIR/.unfinished` and renamed into place at the end, the summary last. A run that is
interrupted therefore leaves an earlier run in the same folder as it was. Only rank 0 uses this module's classes.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from train_arguments import UsageError
from train_checkpoints import checkpoints_in
from train_plot import plot_over_steps
from train_schedule import LOG_NAME, PLOT_NAME, plot_rates

__all__ = ["RunDirectory", "peak_memory_bytes", "print_summary"]

FINISHED_NAMES = ("model", "metrics.jsonl", "loss.png", PLOT_NAME, "summary.json")
OPTIONAL_NAMES = (LOG_NAME,)


class RunDirectory:
    """One run's folder: `open` it, `add` lines of metrics as they come, then `finish`."""

    def __init__(self, output_dir: str, overwrite: bool, resumes: bool = False) -> None:
        """Name the folder; nothing is written yet.

        Args:
            output_dir: The folder.
            overwrite: Whether a run that it holds may be replaced.
            resumes: Whether the run goes on from a checkpoint, or would if there were one.

        Raises:
            UsageError: It holds a run, or checkpoints of one, that would be replaced unasked.
        """
        self.path = Path(output_dir)
        self.unfinished = self.unfinished_in(output_dir)
        self.rows: list[dict[str, Any]] = []
        held = [name for name in FINISHED_NAMES if (self.path / name).exists()]
        if held and not overwrite:
            raise UsageError(
                f"--output_dir {output_dir!r} already holds a run ({', '.join(held)}). Choose another folder, or add "
                "--overwrite_output_dir to replace that run once the new one has finished."
            )
        saved = checkpoints_in(output_dir)
        if saved and not overwrite and not resumes:
            raise UsageError(
                f"--output_dir {output_dir!r} holds checkpoints of a run ({saved[-1].name} is the last). Go on from it "
                "with --resume_from_checkpoint last, choose another folder, or add --overwrite_output_dir."
            )
        self.stale = [] if resumes else saved
        """Checkpoints of the run to be replaced."""

    @staticmethod
    def unfinished_in(output_dir: str) -> Path:
        """Where a run writes until it has finished."""
        return Path(output_dir) / ".unfinished"

    def open(self) -> UsageError | None:
        """Make room for the results, or say why that cannot be done; an earlier unfinished run is dropped."""
        try:
            self.discard()
            self.unfinished.mkdir(parents=True)
        except OSError as error:
            return UsageError(f"--output_dir {str(self.path)!r} cannot be written: {error}. Choose another folder.")
        return None

    def add(self, row: dict[str, Any]) -> None:
        """Append one line to the metrics; it is on disk when this returns."""
        self.rows.append(row)
        with open(self.unfinished / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(row)) + "\n")

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Take over the metrics of a run that goes on."""
        self.rows = []
        (self.unfinished / "metrics.jsonl").unlink(missing_ok=True)
        for row in rows:
            self.add(row)

    def drop_stale_checkpoints(self) -> None:
        """Remove the checkpoints of the run that this one replaces."""
        for path in self.stale:
            shutil.rmtree(path, ignore_errors=True)
        self.stale = []

    def finish(self, model: Any, state_dict: dict[str, Any], tokenizer: Any, summary: dict[str, Any]) -> None:
        """Write the rest and move everything into place."""
        model.save_pretrained(self.unfinished / "model", state_dict=state_dict)
        tokenizer.save_pretrained(self.unfinished / "model")
        _plot(self.rows, self.unfinished / "loss.png")
        plot_rates(self.rows, self.unfinished / LOG_NAME, self.unfinished / PLOT_NAME)
        text = json.dumps(_finite(summary), indent=2) + "\n"
        (self.unfinished / "summary.json").write_text(text, encoding="utf-8")
        (self.path / "summary.json").unlink(missing_ok=True)
        for name in FINISHED_NAMES:
            old = self.path / name
            if old.is_dir():
                old.rename(self.unfinished / f"old_{name}")
            (self.unfinished / name).replace(old)
        for name in OPTIONAL_NAMES:
            (self.path / name).unlink(missing_ok=True)
            if (self.unfinished / name).exists():
                (self.unfinished / name).replace(self.path / name)
        self.drop_stale_checkpoints()
        self.discard()

    def discard(self) -> None:
        """Remove what is unfinished."""
        if self.unfinished.exists():
            shutil.rmtree(self.unfinished)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row as strict JSON can hold it: NaN and infinity become null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _plot(rows: Iterable[dict[str, Any]], path: Path) -> None:
    rows = list(rows)
    with plot_over_steps("nats per token", path) as axes:
        for key, style in (("loss", "-"), ("eval_loss", "o--")):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot([step for step, _ in points], [value for _, value in points], style, label=key)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on its GPU, or resident in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def print_summary(summary: dict[str, Any], output_dir: str) -> None:
    """Show the run's result as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary['optim']} on {summary['world_size']} rank(s), {summary['strategy']}", show_header=False
    )
    table.add_row("steps", f"{summary['steps']}")
    table.add_row("training loss", f"{summary['train_loss_first']:.4f} → {summary['train_loss_last']:.4f}")
    table.add_row("validation loss", f"{summary['eval_loss_first']:.4f} → {summary['eval_loss_last']:.4f}")
    table.add_row("last learning rate", _rate_and_decisions(summary))
    table.add_row("tokens per second", f"{summary['tokens_per_second']:,.0f}")
    table.add_row("optimizer state, by rank", _in_mib(summary["optimizer_state_bytes_per_rank"]))
    table.add_row("peak memory, by rank", _in_mib(summary["peak_memory_bytes_per_rank"]))
    table.add_row("output", output_dir)
    Console().print(table)


def _rate_and_decisions(summary: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {decision}" for decision, count in summary.get("lr_decisions", {}).items())
    rate = f"{summary['learning_rate_last']:.3g}, {summary['lr_scheduler_type']}"
    return f"{rate}: {counts}" if counts else rate


def _in_mib(sizes: list[int]) -> str:
    return ", ".join(f"{size / 2**20:.1f} MiB" for size in sizes)
