"""``dist-optim verify``: what does the work is imported on use."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_optim.errors import DistOptimError
from dist_optim.specs.command_options import OptimArgs, TargetModules, choice_of, targets_of
from dist_optim.specs.hyperparameters import parse_optim_args

if TYPE_CHECKING:
    from dist_optim.testing.verify.verification import Report

__all__ = ["add_to"]

DEFAULT_FILE = Path("verify.json")


def add_to(app: typer.Typer) -> None:
    """Give the command line this command."""
    app.command("verify")(verify_optimizer)


def verify_optimizer(
    optim: Annotated[str, typer.Option("--optim", help="A name of `dist-optim list`, or package.module:Class.")],
    strategy: Annotated[str, typer.Option("--strategy", help="ddp, fsdp1, fsdp2, hsdp, zero0 to zero3.")] = "ddp",
    ranks: Annotated[int, typer.Option("--ranks", help="Processes on this machine.")] = 2,
    model: Annotated[
        str | None, typer.Option("--model", help="A config.json, or its folder. Default: a small model of odd shapes.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the model: float32 or bfloat16.")] = "float32",
    steps: Annotated[int, typer.Option("--steps", help="Steps to take and compare.")] = 8,
    optim_args: OptimArgs = None,
    targets: TargetModules = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cuda or cpu. Default: cuda where each rank has a GPU.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="The file to attach to an issue.")] = DEFAULT_FILE,
) -> None:
    """Prove on this machine that a strategy gives the trajectory of one process, to the bit.

    Ranks are started here, and train a model by given gradients with dist_optim; rank 0 steps a copy with upstream's
    unmodified class, in one process. Every weight is compared after every step. Exit code: 0 equal, 1 different,
    2 refused (with the reason). A class that has no name here is described too: what the proof of its independence
    found, and the lines that register it.

    Examples: dist-optim verify --optim galore_adamw --strategy fsdp2 --optim_args "update_proj_gap=3"
    | dist-optim verify --optim my_package.optim:MyClass --strategy zero3 --ranks 4 --model config.json
    """
    try:
        from dist_optim.testing.verify.verification import verify

        chosen, options = choice_of(optim), parse_optim_args(optim_args)
        if targets is not None:
            options["target_modules"] = targets_of(targets)
        typer.echo(f"Starting {ranks} ranks under {strategy}; {steps} steps twice ...", err=True)
        report = verify(
            chosen, strategy=strategy, ranks=ranks, model=model, dtype=dtype, steps=steps, device=device, **options
        )
    except DistOptimError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    _write(output, report.as_json(shlex.join(["dist-optim", *sys.argv[1:]])))
    _say(report, output)
    raise typer.Exit(report.verdict.exit_code)


def _write(output: Path, data: dict[str, Any]) -> None:
    try:
        output.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"--output {str(output)!r} cannot be written: {error}") from error


def _say(report: Report, output: Path) -> None:
    job = report.job
    what = f"{job.name}, {job.strategy} on {job.ranks} ranks ({job.device}), {job.steps} steps"
    if report.reason:
        typer.echo(f"{report.verdict.value}: {what}\n{report.reason}", err=True)
    elif report.differences:
        typer.echo(f"different: {what}. First {report.differences[0]}.")
        typer.echo(f"The largest difference of any weight after any step is {report.figure:.3g}.")
    else:
        elements = report.outcome.num_compared if report.outcome else 0
        typer.echo(f"equal: {what}. All bits of {elements} weights, after each step, are those of one process.")
    _say_what_was_proven(report)
    typer.echo(f"Written to {output}: versions, command and figures. Attach it to an issue.")


def _say_what_was_proven(report: Report) -> None:
    """Of a class that has no name here."""
    from dist_optim.testing.verify.registering import evidence_of, snippet_of

    if report.spec is None or not report.spec.is_undescribed:
        return
    typer.echo(f"traits: {', '.join(sorted(one.value for one in report.spec.traits))}")
    if report.outcome is not None and report.outcome.verdict is not None:
        for line in evidence_of(report.outcome.verdict):
            typer.echo(f"  {line}")
    typer.echo(f"To make it a name of --optim:\n\n{snippet_of(report.spec)}\n")
