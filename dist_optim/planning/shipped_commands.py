"""``dist-optim ls | cp``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dist_optim.errors import DistOptimError
from dist_optim.planning import shipped

__all__ = ["add_to", "console", "one_line_errors"]


def add_to(app: typer.Typer) -> None:
    """Give the command line these commands."""
    app.command("ls")(list_files)
    app.command("cp")(copy_file)


def list_files(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="models, accelerate, deepspeed, ...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the files that come with the package: configurations, model shapes, examples, train.py.

    Examples: dist-optim ls | dist-optim ls accelerate
    """
    with one_line_errors():
        found = shipped.listed(kind)
    if as_json:
        typer.echo(json.dumps({one: [str(path) for path in paths] for one, paths in found.items()}, indent=2))
        return
    said = console()
    for one, paths in found.items():
        said.print(f"{one}  ({shipped.KINDS[one][1]})", style="bold")
        for path in paths:
            said.print(f"  {one}/{path.name}  {_first_words(path)}".rstrip(), no_wrap=True, overflow="ellipsis")
    said.print("To start from one: dist-optim cp NAME DIRECTORY")


def copy_file(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As dist-optim ls shows it, or the file's name alone.")],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Made where it is not there.")],
) -> None:
    """Copy one of the files that come with the package, to start from; train.py with what it imports.

    Nothing is ever replaced.

    Examples: dist-optim cp train.py . | dist-optim cp accelerate/fsdp2.yaml mine
    """
    with one_line_errors():
        for path in shipped.copy(name, directory):
            typer.echo(str(path))


def _first_words(path: Path) -> str:
    """What the file says of itself, in its first comment or docstring."""
    line = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    if line.startswith("#!"):
        line = path.read_text(encoding="utf-8").splitlines()[1].strip()
    words = line.lstrip('#"').rstrip('"').strip() if line[:1] in ("#", '"') else ""
    return words.partition(". ")[0].rstrip(".")[:90]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A mistake of the user's is one line on stderr, and exit code 2."""
    try:
        yield
    except DistOptimError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def console() -> Console:
    """Without markup: a name in brackets is text."""
    return Console(markup=False, highlight=False)
