"""Run a Hugging Face script as it is, with every registered optimizer in its ``--optim``::

    accelerate launch -m dist_optim.run train.py --optim flash_adamw --output_dir out
    torchrun --nproc_per_node 8 -m dist_optim.run train.py arguments.json
    dist-optim run train.py --optim galore_adamw --optim_target_modules all-linear

The script imports ``Trainer`` and ``TrainingArguments`` from transformers, defines its own dataclasses, subclasses what
it likes. Nothing in it changes: before it starts, the names in ``REPLACED`` are given another meaning. An error of
dist_optim's that leaves the script is one line, ``error: ...``, and exit code 2 on every rank; Ctrl-C is exit code 130.
"""

from __future__ import annotations

import importlib
import logging
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_optim.errors import (
    DistOptimError,
    RankFailedError,
    RankLostError,
    RanksDisagreeError,
    UnsupportedError,
    UsageError,
)
from dist_optim.integrations.environment import refuse_lone_process
from dist_optim.integrations.refusals import refuse
from dist_optim.integrations.signals import interrupt_as_usual, is_rank_0
from dist_optim.ranks.gloo import use_one_worker_each

__all__ = ["REPLACED", "Replacement", "main", "replace_names"]

WHILE_IT_RAN = (RankFailedError, RankLostError, RanksDisagreeError)
"""Where the way that led there matters: these keep their traceback. Any other error of ours is a mistake to correct."""

USAGE = """usage: python -m dist_optim.run [-m] SCRIPT [ARGUMENTS ...]

Run a Hugging Face script (or, after -m, a module) unmodified, with every name of `dist-optim list` in its --optim.
Under a launcher: accelerate launch -m dist_optim.run SCRIPT ..., or torchrun ... -m dist_optim.run SCRIPT ...
"""


@dataclass(frozen=True, slots=True)
class Replacement:
    """One name that the script, and the libraries that it imports, find changed."""

    module: str
    name: str
    by: str
    """Module of the class of the same name that takes its place: a subclass of it."""
    why: str

    def apply(self) -> None:
        """Put it in place, for everyone who imports the name from now on."""
        setattr(importlib.import_module(self.module), self.name, self.replacement())

    def replacement(self) -> Any:
        """The class that takes the place."""
        return getattr(importlib.import_module(self.by), self.name)


_OURS = "dist_optim.integrations.transformers"
REPLACED = (
    Replacement("transformers", "Trainer", _OURS, "builds the optimizer of --optim once the model is in place"),
    Replacement("transformers.trainer", "Trainer", _OURS, "the same, for those that extend it: Seq2SeqTrainer, trl"),
    Replacement("transformers", "TrainingArguments", _OURS, "takes every name of `dist-optim list` in --optim"),
    Replacement("transformers.training_args", "TrainingArguments", _OURS, "the same, for those that extend it"),
    Replacement("transformers.trainer", "TrainingArguments", _OURS, "the same, for a Trainer without arguments"),
)
"""All that is replaced; each by a subclass of the original."""


def replace_names() -> None:
    """Replace the names of ``REPLACED``, and say so on rank 0. Calling it again does nothing.

    Raises:
        MissingPackageError: transformers is not installed.
        UnsupportedError: Something has extended the originals already, and would keep them.
    """
    ours = importlib.import_module(_OURS)
    import transformers

    if transformers.Trainer is ours.Trainer:
        return
    for original in (transformers.Trainer, transformers.TrainingArguments):
        early = [known for known in original.__subclasses__() if not known.__module__.startswith("dist_optim.")]
        if early:
            raise UnsupportedError(
                f"{early[0].__module__}.{early[0].__qualname__} was made of transformers' own {original.__name__} "
                "before dist_optim.run could replace it. Import that module in the script, not before."
            )
    for replacement in REPLACED:
        replacement.apply()
    if is_rank_0():
        print(description(), file=sys.stderr, flush=True)


def description() -> str:
    """What is replaced, for the user to read."""
    width = max(len(f"{one.module}.{one.name}") for one in REPLACED)
    lines = [f"  {f'{one.module}.{one.name}':{width}}  {one.why}" for one in REPLACED]
    return "\n".join([f"dist_optim.run: the script finds these replaced by subclasses of {_OURS}:", *lines])


def main(arguments: Sequence[str]) -> None:
    """Run ``[-m] SCRIPT [ARGUMENTS ...]`` as ``python`` would, with the names replaced. Exits on bad usage."""
    rest = list(arguments)
    is_module = rest[:1] == ["-m"]
    rest = rest[1:] if is_module else rest
    if not rest or rest[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if rest else sys.stderr, end="")
        raise SystemExit(0 if rest else 2)
    script = rest[0]
    if not is_module and not Path(script).is_file():
        refuse(UsageError(f"{script!r} is not a file. Give the script to run: {USAGE.splitlines()[0]}"))
    interrupt_as_usual()
    use_one_worker_each()  # before the script makes a process group
    sys.argv = rest
    sys.path[0] = os.getcwd() if is_module else str(Path(script).resolve().parent)
    try:
        refuse_lone_process()
        with _quiet_imports():
            replace_names()
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except WHILE_IT_RAN:
        raise
    except DistOptimError as mistake:
        refuse(mistake, _line_of(script, mistake))
    except KeyboardInterrupt:
        if is_rank_0():
            print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)


@contextmanager
def _quiet_imports() -> Iterator[None]:
    """Without warnings of kernels and accelerators that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _line_of(script: str, error: BaseException) -> str:
    """Where in the script the error came from; the script's name where that is elsewhere."""
    stack = [at for at in traceback.extract_tb(error.__traceback__) if Path(at.filename) == Path(script)]
    return f"{script}, line {stack[-1].lineno}" if stack else script


if __name__ == "__main__":
    main(sys.argv[1:])
