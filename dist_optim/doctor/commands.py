"""``dist-optim doctor``: what does the work is imported on use."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_optim.errors import DistOptimError

if TYPE_CHECKING:
    from dist_optim.doctor.finding import Finding

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Give the command line this command."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command("doctor", context_settings=settings)(examine_configuration)


def examine_configuration(
    context: typer.Context,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE]... [-- FLAGS]", help="Files of any kind; after --, the script's own flags."),
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Write the changes into the files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Look at a configuration and at this machine before the launch.

    FILES are, in any combination and order: accelerate's YAML, DeepSpeed's JSON, a model's config.json or its folder, a
    YAML or JSON file of the script's arguments. Each is known by its content. What follows -- are the script's flags,
    as they follow its name. For everything that would be refused, or go wrong without a word: a code, the reason, and
    the change to the nearest configuration that works, as a patch. --fix writes it.

    Exit code: 0 nothing is wrong, 1 something is (with --fix: something is left), 2 a file cannot be read.

    Examples: dist-optim doctor | dist-optim doctor fsdp1.yaml ds_config.json
    | dist-optim doctor fsdp2.yaml --fix -- --optim galore_adamw --learning_rate 1e-3
    """
    try:
        from dist_optim.integrations.quiet import libraries_silenced

        with libraries_silenced(), redirect_stderr(io.StringIO()):
            found, patch = _examined([*(files or []), *context.args], fix)
    except DistOptimError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        data = {"findings": [one.as_json() for one in found], "patch": patch, "written": fix}
        typer.echo(json.dumps(data, indent=2, default=str))
    else:
        _say(found, patch, fix)
    raise typer.Exit(1 if any(one.is_error for one in found) else 0)


def _examined(words: list[str], is_written: bool) -> tuple[list[Finding], str]:
    """What is wrong, also what only shows once something else is mended, and the patch; what is left, where written."""
    from dist_optim.doctor.examination import examine, fixed
    from dist_optim.doctor.reading import read_subject
    from dist_optim.doctor.writing import patch_of, write

    subject = read_subject(*_parted(words))
    found = examine(subject)
    mended, on_the_way = fixed(subject)
    if is_written:
        write(subject, mended)
        return examine(mended), patch_of(subject, mended)
    codes = {one.code for one in found}
    return [*found, *(one for one in on_the_way if one.code not in codes)], patch_of(subject, mended)


def _parted(words: list[str]) -> tuple[list[Path], list[str]]:
    """Files, and the script's flags: from the first word that begins with --."""
    at = next((number for number, word in enumerate(words) if word.startswith("--")), len(words))
    return [Path(word) for word in words[:at]], [word for word in words[at:] if word != "--"]


def _say(found: list[Finding], patch: str, is_written: bool) -> None:
    for one in found:
        typer.echo(f"{'error' if one.is_error else 'warning'} {one.code}: {one.reason}")
        for change in one.changes:
            typer.echo(f"    {change}")
        if one.command:
            typer.echo(f"    run: {one.command}")
    if patch:
        typer.echo(f"\n{'Written' if is_written else 'With --fix'}:\n{patch}")
    if not found:
        typer.echo("Nothing is wrong." if not patch else "Nothing is left that is wrong.")
