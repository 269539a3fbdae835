"""The command line, ``dist-optim``: which optimizers there are, what each takes and needs; checkpoints in and out.

It looks packages up and never imports them, so it answers where half of them are missing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import dist_optim
from dist_optim import run
from dist_optim.checkpoint.in_and_out import commands
from dist_optim.doctor import commands as doctor_commands
from dist_optim.errors import DistOptimError
from dist_optim.integrations.quiet import quieten_libraries
from dist_optim.integrations.signals import interrupt_as_usual
from dist_optim.planning import commands as planning_commands
from dist_optim.reporting import commands as report_commands
from dist_optim.specs.catalogue import describe, describe_hyperparameters
from dist_optim.testing.verify import commands as verify_commands

__all__ = ["app"]

STRATEGIES = {False: "all", True: "DDP FSDP2 HSDP"}
"""By whether the name steps inside backward only, so that it needs an engine that can be made to wait for it."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"dist-optim {dist_optim.__version__}")
        raise typer.Exit()


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Memory-efficient optimizers, with their one-process trajectory, under DDP, FSDP, HSDP and DeepSpeed's ZeRO.

    In Python: dist_optim.build_optimizer(model, NAME, lr=1e-3, ...). This command says which names there are and what
    each of them takes, plans a job before it is started, runs Hugging Face scripts unmodified, and shows what they did.

    To start with: dist-optim plan --help
    """
    interrupt_as_usual()
    if context.invoked_subcommand == "plan":
        with contextlib.suppress(ImportError):  # without transformers nobody is loud
            quieten_libraries()


@app.command("list")
def list_optimizers(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One optimizer, in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List all optimizers, or everything about one.

    Without NAME: one line a name, under its package, with the package's licence and whether it is installed; the bytes
    of optimizer state per parameter; the strategies; and what it needs besides its package.

    With NAME: the state's bytes by shape, the traits that decide how it is sharded, and every hyperparameter with its
    type, range, default and meaning. They are the keywords of build_optimizer and the keys of
    --optim_args "rank=64, scale=0.25".

    Examples: dist-optim list | dist-optim list galore_adamw | dist-optim list --json
    """
    if name is None:
        _list_all(as_json)
        return
    try:
        spec = dist_optim.get_spec(name)
    except DistOptimError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    described = describe(spec) | {"hyperparameters": describe_hyperparameters(spec)}
    if as_json:
        _print_json(described)
    else:
        _print_one(_console(), described)


@app.command(
    "run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def run_script(context: typer.Context) -> None:
    """Run a Hugging Face script unmodified, with every optimizer of this list in its --optim.

    In one process; on many ranks: accelerate launch -m dist_optim.run SCRIPT ARGUMENTS.

    Example: dist-optim run train.py --optim galore_adamw --optim_target_modules all-linear --output_dir out
    """
    run.main(context.args)


commands.add_to(app)
verify_commands.add_to(app)
doctor_commands.add_to(app)
planning_commands.add_to(app)
report_commands.add_to(app)


def _list_all(as_json: bool) -> None:
    described = [describe(dist_optim.get_spec(name)) for name in dist_optim.names()]
    if as_json:
        _print_json(described)
        return
    console = _console()
    described.sort(key=lambda one: (one["package"] != "torch", one["package"], one["name"]))
    width = max(len(one["name"]) for one in described)
    console.print(f"  {'name':{width}}  bytes  strategies      needs", style="dim")
    for _, members in itertools.groupby(described, key=lambda one: one["package"]):
        _print_package(console, list(members), width)
    if any(one["refusal"] for one in described):
        console.print("refused: building it raises an error. dist-optim list NAME says why, and what to use instead.")
    console.print("Bytes: of state for each parameter of a 4096 x 4096 fp32 matrix, all ranks together.")
    console.print("Strategies, besides one process: DDP, FSDP 1 and 2, HSDP, ZeRO 0 to 3.")
    console.print("One optimizer in full: dist-optim list NAME", style="bold")


def _print_package(console: Console, members: list[dict[str, Any]], name_width: int) -> None:
    """A heading with what all members share, then one line each."""
    console.print(_package_line(members[0]))
    widths = (name_width, 5, max(map(len, STRATEGIES.values())))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for width, justify in zip(widths, ("left", "right", "left"), strict=True):
        grid.add_column(width=width, no_wrap=True, justify=justify)  # type: ignore[arg-type]
    grid.add_column(width=max(8, console.width - sum(widths) - 10), no_wrap=True, overflow="ellipsis")
    for one in members:
        size = one["typical_state_bytes"]
        row = "-" if size is None else f"{round(size, 3):g}", STRATEGIES[one["inside_backward_only"]]
        grid.add_row(Text(one["name"], style="bold"), *row, _needs(one))
    console.print(Padding(grid, (0, 0, 1, 2), expand=False))


def _needs(one: dict[str, Any]) -> Text:
    """What it needs, after the mark of those that cannot be built."""
    marks = [("refused", "bold red")] if one["refusal"] else []
    parts = [Text(*mark) for mark in marks] + [Text(need) for need in one["needs"]]
    return Text(", ").join(parts) if parts else Text("-")


def _package_line(one: dict[str, Any]) -> Text:
    return Text.assemble((one["package"], "bold cyan"), " | ", _licence(one), " | ", _installed(one))


def _licence(one: dict[str, Any]) -> Text:
    if one["non_commercial"]:
        name = one["licence"].partition(" (")[0]
        return Text(f"{name}: NON-COMMERCIAL USE ONLY", style="bold red")
    return Text(one["licence"] or "licence not stated")


def _installed(one: dict[str, Any]) -> Text:
    if one["installed"]:
        return Text(f"installed {one['version'] or ''}".strip(), style="green")
    return Text.assemble(("not installed", "yellow"), f": {one['install']}")


def _print_one(console: Console, one: dict[str, Any]) -> None:
    """The facts as a two-column list, then the table of hyperparameters."""
    console.print(Text.assemble((one["name"], "bold"), f"  {one['summary']}"))
    facts: list[tuple[str, Any]] = [
        ("refused", Text(one["refusal"] or "", style="bold red")),
        ("package", _package_line(one)),
        ("paper", one["paper"]),
        ("traits", ", ".join(one["traits"])),
        ("needs", ", ".join(one["needs"])),
        ("state bytes", one["state_bytes_per_parameter"]),
        ("always passed", ", ".join(f"{key}={value!r}" for key, value in one["fixed_arguments"].items())),
    ]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for label, value in facts:
        if value:
            grid.add_row(label, value)
    console.print(Padding(grid, (0, 0, 1, 2), expand=False))
    if one["hyperparameters"]:
        console.print(_hyperparameter_table(one["hyperparameters"]))
    else:
        console.print("Its hyperparameters are read off its class: install the package to see them.")


def _hyperparameter_table(records: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("hyperparameter", no_wrap=True, style="bold")
    table.add_column("type and range", ratio=2)
    table.add_column("default", ratio=1)
    table.add_column("meaning", ratio=3)
    for record in records:
        default = "(required)" if record["required"] else repr(record["default"])
        table.add_row(record["name"], record["type"], default, _meaning(record))
    return table


def _meaning(record: dict[str, Any]) -> str:
    where = {"matrix": " (low-rank matrices only)", "constructor": " (one value for all groups)"}
    return record["meaning"] + where.get(record["scope"], "")


def _console() -> Console:
    # Without markup: a name in brackets, as in 'dist-optim[galore]', is text.
    return Console(markup=False, highlight=False)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, allow_nan=False, default=str))
