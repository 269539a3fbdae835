"""``dist-optim plan | ls | cp``: what does the work is imported on use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dist_optim.errors import UsageError
from dist_optim.planning import shipped_commands
from dist_optim.planning.shipped_commands import console, one_line_errors
from dist_optim.specs.command_options import OptimArgs, TargetModules, listed, targets_of
from dist_optim.specs.hyperparameters import parse_optim_args

__all__ = ["add_to"]

MODEL = "A packaged shape (llama_8b; dist-optim ls models), a config.json, a folder that has one, or a hub's name."
STRATEGY = (
    "one, ddp, fsdp1, fsdp2, hsdp, zero0 to zero3, fsdp2_offload, zero2_offload, zero3_offload; or several: a,b,c."
)
COMPARED = ("optimizers", "strategies")
DEFAULT_RANKS = 8


def add_to(app: typer.Typer) -> None:
    """Give the command line these commands."""
    app.command("plan")(plan_job)
    shipped_commands.add_to(app)


def plan_job(
    model: Annotated[str, typer.Option("--model", help=MODEL)],
    optim: Annotated[
        str | None, typer.Option("--optim", help="A name of dist-optim list; several for --compare and --fit: a,b,c.")
    ] = None,
    strategy: Annotated[str | None, typer.Option("--strategy", help=STRATEGY)] = None,
    ranks: Annotated[int, typer.Option("--ranks", help="GPUs of the whole job.", min=1)] = DEFAULT_RANKS,
    nodes: Annotated[int | None, typer.Option("--nodes", help="Machines; default: 8 GPUs each.", min=1)] = None,
    gpu_memory: Annotated[float, typer.Option("--gpu-memory", "--gpu_memory", help="GiB of one GPU.")] = 80.0,
    batch: Annotated[int, typer.Option("--batch", help="Sequences a GPU takes at once; 0: no activations.", min=0)] = 0,
    seq: Annotated[int, typer.Option("--seq", help="Tokens of a sequence.", min=0)] = 0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient_checkpointing", help="Layers are computed again in backward.")
    ] = False,
    precision: Annotated[
        str,
        typer.Option("--precision", help="mixed (fp32 weights, bf16 products), fp32, or bf16 (bf16 weights)."),
    ] = "mixed",
    master_weights: Annotated[bool, typer.Option("--master_weights", help="fp32 masters beside bf16 weights.")] = False,
    optim_args: OptimArgs = None,
    target_modules: TargetModules = None,
    compare: Annotated[str | None, typer.Option("--compare", help="A table of: optimizers, or strategies.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Find the names and strategies that fit, in order.")] = False,
    order: Annotated[str, typer.Option("--order", help="Of --fit: time (of a step, estimated), or headroom.")] = "time",
    top: Annotated[int, typer.Option("--top", help="So many of --fit are shown and written.", min=1)] = 10,
    write: Annotated[Path | None, typer.Option("--write", help="Folder for what launches each of --fit.")] = None,
    chart: Annotated[Path | None, typer.Option("--chart", help="A .png or .svg of --compare or --fit.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say what a job would hold, send and take on each GPU, before it is started; nothing is trained.

    \b
    Will it fit? One optimizer, one strategy:
      dist-optim plan --model llama_8b --optim galore_adamw --strategy fsdp2 --ranks 8 --batch 1 --seq 4096
    \b
    Which optimizer? Which strategy?
      dist-optim plan --model llama_8b --strategy fsdp2 --ranks 8 --compare optimizers
      dist-optim plan --model llama_8b --optim adamw_torch --ranks 8 --compare strategies --chart strategies.svg
    \b
    No idea: what fits two GPUs of 24 GB, and what launches it:
      dist-optim plan --model llama_1b --ranks 2 --gpu-memory 24 --batch 1 --seq 2048 --fit --write plans
      plans/1_*/launch.sh

    State is what upstream's own class keeps, rehearsed without data; owners, rounds and their bytes are those of the
    job. Activations, the engines' buffers, scratch and seconds are estimates. Exit code 1: it does not fit.
    """
    options: dict[str, Any] = {
        "num_nodes": nodes,
        "gpu_memory_gib": gpu_memory,
        "batch": batch,
        "length": seq,
        "gradient_checkpointing": gradient_checkpointing,
        "precision": precision,
        "master_weights": master_weights,
    }
    with one_line_errors():
        if compare not in (None, *COMPARED):
            raise UsageError(f"--compare {compare!r}: give {' or '.join(COMPARED)}.")
        if write is not None and not fit:
            raise UsageError("--write is for what --fit finds. Add --fit.")
        options["target_modules"] = targets_of(target_modules)
        options |= parse_optim_args(optim_args)
        asked = _Asked(model, listed(optim), listed(strategy), ranks, options)
        if fit:
            _fit(asked, order, top, write, chart, as_json, optim_args)
        elif compare:
            _compare(asked, compare, chart, as_json)
        else:
            _plan(asked, as_json)


class _Asked:
    """What every kind of plan needs."""

    def __init__(
        self, model: str, optimizers: list[str], strategies: list[str], ranks: int, options: dict[str, Any]
    ) -> None:
        from dist_optim.planning.model import read_model

        self.source, self.optimizers, self.strategies = model, optimizers, strategies
        self.ranks, self.options = ranks, options
        self.model = read_model(model)


def _plan(asked: _Asked, as_json: bool) -> None:
    from dist_optim.planning.forecast import plan

    if len(asked.optimizers) != 1 or len(asked.strategies) > 1:
        raise UsageError("Give one --optim and one --strategy; or add --compare, or --fit.")
    strategy = (asked.strategies or ["one" if asked.ranks == 1 else "fsdp2"])[0]
    found = plan(asked.model, asked.optimizers[0], strategy, asked.ranks, **asked.options)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        from dist_optim.planning.tables import print_plan

        print_plan(console(), found)
    raise typer.Exit(0 if found.fits else 1)


def _compare(asked: _Asked, what: str, chart: Path | None, as_json: bool) -> None:
    from dist_optim.planning.fitting import compare, sensible
    from dist_optim.planning.placement import OFFLOADED, STRATEGIES
    from dist_optim.planning.tables import print_table
    from dist_optim.specs.registry import names

    if what == "optimizers":
        optimizers, strategies = asked.optimizers or names(), asked.strategies or ["fsdp2"]
    else:
        every = [*STRATEGIES[1:], *OFFLOADED] if asked.ranks > 1 else sensible(1, None)
        optimizers, strategies = asked.optimizers, asked.strategies or every
    if not optimizers or len(optimizers if what == "strategies" else strategies) != 1:
        raise UsageError(f"--compare {what} needs one {'--optim' if what == 'strategies' else '--strategy'}.")
    with _progress(len(optimizers) * len(strategies), as_json) as before_each:
        found, refused = compare(
            asked.model, optimizers, strategies, asked.ranks, before_each=before_each, **asked.options
        )
    labels = [one.optimizer if what == "optimizers" else one.strategy for one in found]
    if as_json:
        typer.echo(json.dumps({"plans": [one.as_json() for one in found], "refused": refused}, indent=2))
    else:
        print_table(console(), found, labels, refused)
    _draw(
        chart,
        found,
        labels,
        f"{asked.model.name} on {asked.ranks} GPUs, {(strategies if what == 'optimizers' else optimizers)[0]}",
    )


def _fit(
    asked: _Asked, order: str, top: int, write: Path | None, chart: Path | None, as_json: bool, optim_args: str | None
) -> None:
    from dist_optim.planning.fitting import ORDERS, fit, sensible
    from dist_optim.planning.tables import print_table
    from dist_optim.specs.registry import names

    strategies = asked.strategies or sensible(asked.ranks, asked.options["num_nodes"])
    with _progress(len(asked.optimizers or names()) * len(strategies), as_json) as before_each:
        found = fit(
            asked.model,
            asked.ranks,
            optimizers=asked.optimizers or None,
            strategies=asked.strategies or None,
            order=order,
            before_each=before_each,
            **asked.options,
        )
    shown = list({one.optimizer: one for one in reversed(found.fitting)}.values())[::-1]  # each name's best, once
    shown = sorted(shown, key=found.fitting.index)[:top]
    labels = [f"{one.optimizer}, {one.strategy}" for one in shown]
    written = _write(asked, shown, write, optim_args)
    if as_json:
        data = {
            "fitting": [one.as_json() for one in found.fitting],
            "too_large": [one.as_json() for one in found.too_large],
            "refused": found.refused,
            "written": [str(path) for path in written],
        }
        typer.echo(json.dumps(data, indent=2))
    else:
        said = console()
        total = len(found.fitting) + len(found.too_large)
        said.print(
            f"{len(found.fitting)} of {total} fit; {len(found.refused)} more are refused. Each name's best strategy, "
            f"{ORDERS[order]} (no plan knows how well a name trains: docs/optimizers):"
        )
        if shown:
            print_table(said, shown, labels, {})
        elif found.too_large:
            near = found.too_large[0]
            said.print(
                f"Nearest: {near.optimizer} under {near.strategy}, which lacks {-near.headroom / (1 << 30):.1f} GiB. "
                "Try --gradient_checkpointing, a smaller --batch, --precision bf16, or more --ranks."
            )
        for path in written:
            said.print(str(path))
    _draw(chart, shown, labels, f"{asked.model.name} on {asked.ranks} GPUs: what fits")
    if not found.fitting:
        raise typer.Exit(1)


def _write(asked: _Asked, shown: Sequence[Any], directory: Path | None, optim_args: str | None) -> list[Path]:
    if directory is None:
        return []
    from dist_optim.planning.writing import Launch, write_launch

    targets = asked.options["target_modules"]
    launch = Launch(
        model=asked.source,
        batch=asked.options["batch"],
        length=asked.options["length"],
        gradient_checkpointing=asked.options["gradient_checkpointing"],
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets or ()),
        optim_args=optim_args or "",
    )
    written = []
    for number, one in enumerate(shown, 1):
        written += write_launch(one, launch, directory / f"{number}_{one.optimizer}_{one.strategy}")
    return written


def _draw(chart: Path | None, found: Sequence[Any], labels: Sequence[str], title: str) -> None:
    if chart is not None:
        from dist_optim.planning.charts import draw

        draw(found, labels, chart, title)


@contextmanager
def _progress(total: int, as_json: bool) -> Iterator[Any]:
    """A line on stderr that says what is planned now, on a terminal."""
    errors = Console(stderr=True)
    if as_json or not errors.is_terminal:
        yield None
        return
    columns = (SpinnerColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("", total=total)

        def before_each(pair: str) -> None:
            done = bar.tasks[task].completed + 1
            bar.update(task, completed=done, total=max(total, done), description=pair)  # --fit may try more

        yield before_each
