"""An item of a part gives figures, is skipped with its reason, or fails with its error: none of them ends the part."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_optim.errors import UnsupportedError
from dist_optim.testing import RankFailure

__all__ = ["Items", "Log", "Row", "Settings", "Skipped", "attempt", "outcome", "read_log", "run_items"]

Row = dict[str, Any]
"""``name``, ``status`` (ok, skipped, failed), ``seconds``, ``reason`` where it is not ok, and figures where it is."""
Items = Mapping[str, Callable[[], dict[str, Any]]]
LACKS = {"ImportError", "MissingPackageError", "ModuleNotFoundError", "OutOfMemoryError"}
"""Errors, by name (some come as text, from other ranks), that say what the machine lacks."""
LONGEST_REASON = 240


class Skipped(Exception):
    """This machine cannot run the item; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where everything runs."""

    device: str = "cuda"
    is_quick: bool = False
    """A small form of each part, for machines that only show that it runs."""

    @property
    def place(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Log:
    """What a part has done so far, line by line in a file: it outlives the process that writes it."""

    path: Path

    def tell(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(slots=True)
class Told:
    """The log's content."""

    names: list[str]
    rows: dict[str, Row]
    begun: str | None


def read_log(path: Path) -> Told:
    told = Told([], {}, None)
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):  # its writer was ended in the middle of it
            break
        entry = json.loads(line)
        told.names = entry.get("names", told.names)
        told.begun = entry.get("begins", told.begun)
        if "row" in entry:
            told.rows[entry["row"]["name"]] = entry["row"]
            told.begun = None
    return told


def run_items(items: Items, log: Log) -> None:
    """Run those that have no row yet, in order.

    Raises:
        RuntimeError: The device is lost to this process: it must be left, and what remains be run in another.
    """
    log.tell(names=list(items))
    done = read_log(log.path).rows
    for name, act in items.items():
        if name in done:
            continue
        log.tell(begins=name)
        row = attempt(name, act)
        log.tell(row=row)
        print(f"  {row['status']:8} {row['seconds']:6.1f} s  {name}  {row.get('reason', '')}", flush=True)
        free_memory()


def attempt(name: str, act: Callable[[], dict[str, Any]]) -> Row:
    """The item's row, whatever it raises."""
    start = time.perf_counter()
    try:
        row: Row = {"name": name, "status": "ok", **act()}
    except Exception as error:
        row = {"name": name, **outcome(error)}
        if row["status"] == "failed":
            traceback.print_exc()
    return {**row, "seconds": round(time.perf_counter() - start, 2)}


def outcome(error: Exception) -> dict[str, str]:
    """Skipped or failed, and why in one line."""
    text = in_one_line(error)
    kind = text.partition(":")[0].rpartition(".")[2]
    if isinstance(error, Skipped):
        return {"status": "skipped", "reason": str(error)}
    is_lacking = kind in LACKS or isinstance(error, UnsupportedError)
    return {"status": "skipped" if is_lacking else "failed", "reason": text[:LONGEST_REASON]}


def in_one_line(error: Exception) -> str:
    """The error's kind and first line; of ranks that failed, those of the first."""
    if isinstance(error, RankFailure) and error.tracebacks:
        lines = next(iter(error.tracebacks.values())).splitlines()
        found = [line for line in lines if line and not line.startswith((" ", "Traceback"))]
        return found[0] if found else "RankFailure"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def free_memory() -> None:
    """Before the next item. An error that outlives its item is raised here, for nothing more can run."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
