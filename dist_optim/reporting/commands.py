"""``dist-optim report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_optim.errors import UsageError
from dist_optim.files import written_whole
from dist_optim.planning.shipped_commands import one_line_errors

__all__ = ["add_to"]

DEFAULT_FILE = Path("report.html")


def add_to(app: typer.Typer) -> None:
    """Give the command line this command."""
    app.command("report")(report_runs)


def report_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN]...", help="The --output_dir of a training run.")],
    out: Annotated[Path, typer.Option("--out", help="The page.")] = DEFAULT_FILE,
) -> None:
    """Show what runs did, and compare them: one HTML page, which needs no network and no other file.

    Curves over the steps: losses, learning rate with the decisions of its schedule, gradient norm; and of runs with
    --telemetry the update over the weight of each group, time in gather, step and scatter, bytes exchanged, refreshes,
    clip rate. Tables: the last figures, what differs between the runs' settings, all settings, versions. And the audit:
    which algorithm got which tensors. What a run has not left is left out, and named. A run that has not finished yet
    is shown as far as it is.

    \b
    One run:
      dist-optim report runs/demo
    \b
    Two optimizers side by side:
      accelerate launch train.py --optim galore_adamw --telemetry --output_dir runs/galore ...
      accelerate launch train.py --optim adamw_torch --telemetry --output_dir runs/adamw ...
      dist-optim report runs/galore runs/adamw --out compared.html
    \b
    All runs of a folder:
      dist-optim report runs/*/

    A RUN is the folder of launch/train.py, of a Trainer with RunReport among its callbacks, or of any Trainer with
    checkpoints (losses and learning rate alone).
    """
    with one_line_errors():
        from dist_optim.reporting.page import page
        from dist_optim.reporting.reading import read_runs

        found = read_runs(runs)
        _write(out, page(found))
    for run in found:
        for text in run.left_out:
            typer.echo(f"{run.name}: {text}", err=True)
    typer.echo(f"Written to {out}. Open it in any browser.")


def _write(out: Path, text: str) -> None:
    """The whole page or, where it cannot be written, what was there before.

    Raises:
        UsageError: It cannot be written, or the file is not a page of ours.
    """
    from dist_optim.reporting.page import GENERATOR

    try:
        if out.exists() and GENERATOR.encode() not in out.read_bytes()[:1000]:
            raise UsageError(f"--out {str(out)!r} is there, and not a page of this command. Give another file.")
        with written_whole(out) as draft:
            draft.write_bytes(text.encode("utf-8", "replace"))
    except OSError as error:
        raise UsageError(f"--out {str(out)!r} cannot be written: {error}. Give another file.") from error
