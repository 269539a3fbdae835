"""``dist-optim export | import | inspect``: what does the work is imported on use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dist_optim.errors import DistOptimError, UsageError
from dist_optim.specs.command_options import OptimArgs, choice_of, targets_of
from dist_optim.specs.hyperparameters import parse_optim_args

if TYPE_CHECKING:
    from dist_optim.checkpoint.in_and_out.export import Export

__all__ = ["add_to"]

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A folder that dist_optim, or its Trainer, saved.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

MOST_LINES = 50
"""Of differences that are printed; --json has all."""


def add_to(app: typer.Typer) -> None:
    """Give the command line these commands."""
    app.command("export")(export_checkpoint)
    app.command("import")(import_checkpoint)
    app.command("inspect")(inspect_checkpoint)


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Annotated[Path | None, typer.Argument(metavar="[OUTPUT]", help="Default: CHECKPOINT-export.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="weights, or optimizer; default: both.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the weights to use: bfloat16, say.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Folder of config.json and the tokenizer.")] = None,
    optim: Annotated[str | None, typer.Option("--optim", help="package.module:Class, for one without a name.")] = None,
    optim_args: OptimArgs = None,
    as_json: AsJson = False,
) -> None:
    """Write what the unmodified upstream optimizer loads, and the weights as safetensors.

    optimizer.pt is for torch.load(weights_only=True) and load_state_dict of upstream's own class, built on the groups
    that export.json names. In one process, without a model. Nothing is changed in CHECKPOINT. Where upstream's class
    loads no state, the weights are written, it says why, and the exit code is 1.

    Example: dist-optim export runs/mine/checkpoint-500 exported --dtype bfloat16
    """
    with _one_line_errors():
        from dist_optim.checkpoint.in_and_out.export import export

        done = export(
            checkpoint,
            output,
            only=only,
            dtype=_dtype_of(dtype),
            config=config,
            optimizer=None if optim is None else choice_of(optim),
            optim_args=parse_optim_args(optim_args),
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done), indent=2, default=str))
    else:
        _show_export(done)
    if done.left_out:
        raise typer.Exit(1)


def _show_export(done: Export) -> None:
    console = _console()
    console.print(
        f"{done.optimizer} after {done.steps} steps: {len(done.files)} files in {done.directory}", style="bold"
    )
    for file, text in done.loading.items():
        console.print(f"  {file}: {text}")
    for note in done.notes:
        console.print(f"  Note: {note}")
    if done.left_out:
        console.print(f"  Without the optimizer: {done.left_out}", style="red")


def import_checkpoint(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="What upstream or others wrote.")],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The folder to write.")],
    optim: Annotated[str | None, typer.Option("--optim", help="The name of what upstream's class is.")] = None,
    optim_args: OptimArgs = None,
    target_modules: Annotated[
        str | None, typer.Option("--optim_target_modules", help="As in training: all-linear, or attn,mlp.")
    ] = None,
    model: Annotated[Path | None, typer.Option("--model", help="Weights, where SOURCE has none.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="Folder of the model's config.json.")] = None,
    names: Annotated[Path | None, typer.Option("--names", help="JSON: the parameters, group by group.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Taken, where SOURCE does not count.", min=0)] = None,
    master_weights: Annotated[
        bool, typer.Option("--master_weights", help="DeepSpeed's masters as such, beside weights in half precision.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of dist_optim of what others wrote; it loads under any strategy.

    SOURCE is a file of torch.save(optimizer.state_dict()), a folder of transformers' own Trainer or of accelerate's
    save_state, or what DeepSpeed's engine.save_checkpoint wrote with an optimizer of dist_optim. No code in it is run.

    Example: dist-optim import runs/stock/checkpoint-500 runs/mine/checkpoint-500 --optim adamw_torch
    """
    with _one_line_errors():
        from dist_optim.checkpoint.in_and_out.imports import import_

        done = import_(
            source,
            checkpoint,
            optim=optim,
            optim_args=parse_optim_args(optim_args),
            target_modules=targets_of(target_modules),
            model=model,
            config=config,
            names=_names_in(names),
            steps=steps,
            master_weights=master_weights,
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done), indent=2, default=str))
        return
    console = _console()
    console.print(f"{done.optimizer} after {done.steps} steps: {done.tensors} values of state, in {done.directory}")
    for note in done.notes:
        console.print(f"  Note: {note}")


def inspect_checkpoint(
    checkpoint: Checkpoint,
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="One to compare it with.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in a checkpoint, verify it, and compare it with another one.

    Exit code 0: it is whole, and equal to OTHER in all that decides how it goes on. 1: it is not; what is wrong, or
    what differs and by how much, is listed. Nothing is changed, and no code in it is run.

    Example: dist-optim inspect runs/mine/checkpoint-500 runs/other/checkpoint-500
    """
    with _one_line_errors():
        from dist_optim.checkpoint.in_and_out.inspection import inspect

        found = inspect(checkpoint, other)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(found), "is_sound": found.is_sound}, indent=2, default=str))
    else:
        _print_inspection(_console(), found)
    raise typer.Exit(0 if found.is_sound else 1)


def _print_inspection(console: Console, found: Any) -> None:
    ranks = "" if found.world_size is None else f", saved by {found.world_size} rank{'s' * (found.world_size != 1)}"
    if found.optimizer:
        console.print(f"{found.optimizer} after {found.steps} steps{ranks}; {found.mode} weights", style="bold")
        console.print(_groups_table(found.groups))
        console.print(_tally_table("state", found.state))
        console.print(_tally_table("weights", found.weights))
    total = sum(found.files.values())
    console.print(f"{len(found.files)} files, {_size(total)}: {', '.join(_folders(found.files))}")
    for problem in found.problems:
        console.print(f"WRONG: {problem}", style="bold red")
    if found.other and not found.problems:
        _print_differences(console, found)
    if found.is_sound:
        console.print(f"Whole{f', and equal to {found.other}' if found.other else ''}.", style="green")


def _print_differences(console: Console, found: Any) -> None:
    if not found.differences:
        return
    table = _table("differs", found.directory, found.other, "largest difference")
    for one in found.differences[:MOST_LINES]:
        table.add_row(one.what, one.here, one.there, "" if one.largest is None else f"{one.largest:.3g}")
    console.print(table)
    console.print(f"{len(found.differences)} differences.", style="bold red")


def _groups_table(groups: list[dict[str, Any]]) -> Table:
    """One column a group: hyperparameters of each, row by row."""
    table = _table("group", *map(str, range(len(groups))))
    for key in dict.fromkeys(key for group in groups for key in group):
        table.add_row(key, *(str(group.get(key, "")) for group in groups))
    return table


def _tally_table(title: str, tallies: Mapping[str, Any]) -> Table:
    table = _table(title, "tensors", "elements", "size")
    for label, one in tallies.items():
        table.add_row(label, f"{one.tensors:,}", f"{one.elements:,}", _size(one.bytes))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, style="bold")
    for title in others:
        table.add_column(title)
    return table


def _folders(files: Mapping[str, int]) -> list[str]:
    return list(dict.fromkeys(f"{name.partition('/')[0]}{'/' if '/' in name else ''}" for name in files))


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def _names_in(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--names {str(path)!r} cannot be read: {error}.") from error
    is_listed = isinstance(found, list) and all(
        isinstance(own, list) and all(isinstance(one, str) for one in own) for own in found
    )
    if not is_listed:
        raise UsageError(f'--names {str(path)!r} is no list of lists of names, as in [["a.weight"], ["a.bias"]].')
    return found


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except DistOptimError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def _dtype_of(text: str | None) -> Any:
    import torch

    if text is None:
        return None
    found = getattr(torch, {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(text, text), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"--dtype {text!r} is no dtype of weights. Give float32, bfloat16 or float16.")
    return found


def _console() -> Console:
    return Console(markup=False, highlight=False, soft_wrap=True)
