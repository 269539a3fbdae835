"""Whether a checkpoint is whole, and its parts are of one save and of the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dist_optim.checkpoint.folder_seal import MARK, differences_in
from dist_optim.checkpoint.identity import check_part, check_same_save
from dist_optim.checkpoint.in_and_out.folder import MASTER_KEY, MODEL, Folder
from dist_optim.checkpoint.in_and_out.upstream_file import load_plain
from dist_optim.checkpoint.seals import check_files
from dist_optim.errors import CheckpointError, DistOptimError

__all__ = ["assert_consistent", "problems_in"]

Check = Callable[[Folder], Iterable[str]]


def problems_in(folder: Folder) -> list[str]:
    """All that is wrong, every tensor's checksum included."""
    return _found_by([_in_tensors, _in_weights, *_OF_RECORDS, _in_plain_files, _in_folder], folder)


def assert_consistent(folder: Folder) -> None:
    """Refuse records that do not fit each other or the tensors; no tensor is read.

    Raises:
        CheckpointError: With all that is wrong.
    """
    if problems := _found_by(_OF_RECORDS, folder):
        raise CheckpointError(f"{str(folder.path)!r} does not hold together: {' '.join(problems)}")


def _found_by(checks: Iterable[Check], folder: Folder) -> list[str]:
    """Every check by itself, so that one that fails hides none."""
    found: list[str] = []
    for check in checks:
        try:
            found += check(folder)
        except DistOptimError as error:
            found.append(str(error))
        except Exception as error:  # a damaged index raises almost anything
            found.append(f"{str(folder.path)!r} is damaged: {type(error).__name__}: {error}.")
    return list(dict.fromkeys(found))


def _in_tensors(folder: Folder) -> Iterator[str]:
    yield from _strays(folder.optimizer / "tensors", folder.record["tensors"])
    check_files(folder.optimizer / "tensors", 0, 1, folder.record["tensors"])


def _in_weights(folder: Folder) -> Iterator[str]:
    if folder.about:
        yield from _strays(folder.path / MODEL, folder.about["model"])
    if folder.weights is not None:
        folder.weights.check()


def _strays(directory: Path, sealed: dict[str, Any]) -> Iterator[str]:
    found = {one.name for one in directory.glob("*.distcp") if one.stat().st_size}  # a rank may have nothing
    for name in sorted(found - set(sealed["files"])):
        yield f"{str(directory / name)!r} is not of this save: its record does not name it."


def _in_record(folder: Folder) -> Iterator[str]:
    record, shapes = folder.record, folder.record["shapes"]
    grouped = [name for group in record["param_groups"] for name in group["params"]]
    yield from _listed("The param groups name twice", {name for name in grouped if grouped.count(name) > 1})
    yield from _listed("The param groups name parameters without a shape", set(grouped) - set(shapes))
    yield from _listed("Parameters are in no param group", set(shapes) - set(grouped))
    yield from _listed("Numbers are recorded of unknown parameters", set(record["scalars"]) - set(shapes))
    of_state = {name.partition("/")[2].rpartition("/")[0] for name in folder.stored if name.startswith("state/")}
    yield from _listed("State is stored of unknown parameters", of_state - set(shapes))
    for name, one in folder.stored.items():
        parameter = name[len("state/") : -len(MASTER_KEY)] if name.endswith(MASTER_KEY) else name.partition("/")[2]
        is_weight = name.startswith("weights/") or name.endswith(MASTER_KEY)
        if is_weight and list(one.shape) != shapes.get(parameter):
            yield f"The weight {name!r} has the shape {tuple(one.shape)}, and is recorded as {shapes.get(parameter)}."
    for name, order in record["memory_orders"].items():
        if name not in folder.stored or sorted(order) != list(range(len(folder.stored[name].shape))):
            yield f"The recorded order in memory of {name!r} is {order}, which fits no stored tensor."


def _between_records(folder: Folder) -> Iterator[str]:
    """Of one save, or of several."""
    if folder.about:
        check_same_save(folder.path, folder.about, folder.record)
    for name in folder.about.get("parts", ()):
        try:
            check_part(folder.path, name, folder.about)
        except CheckpointError as error:
            yield str(error)


def _between_weights(folder: Folder) -> Iterator[str]:
    if folder.weights is None:
        return
    stored, shapes = folder.weights.stored, folder.record["shapes"]
    missing = set(shapes) - set(stored)
    if missing and missing != set(shapes):
        yield from _listed("There are no weights of", missing)
    for name in sorted(set(shapes) & set(stored)):
        if list(stored[name].shape) != shapes[name]:
            own = tuple(stored[name].shape)
            yield f"The weight {name!r} has the shape {own}, and the optimizer's is {tuple(shapes[name])}."


def _in_plain_files(folder: Folder) -> Iterator[str]:
    for name in ("scheduler.pt", "scheduler.bin"):
        if (folder.path / name).is_file():
            load_plain(folder.path / name)
    world_size = folder.about.get("world_size")
    for rank in range(world_size) if isinstance(world_size, int) else ():
        path = folder.path / "ranks" / f"{rank}.pt"
        try:
            load_plain(path)
        except CheckpointError as error:
            yield str(error)


def _in_folder(folder: Folder) -> Iterator[str]:
    """Files of transformers and accelerate, which are of one save by the folder's own record."""
    if (folder.path / MARK).is_file():
        yield from (f"{str(folder.path)!r}: {text}." for _, text in differences_in(folder.path))


def _listed(what: str, names: Iterable[str]) -> Iterator[str]:
    found = sorted(names)
    if found:
        yield f"{what}: {', '.join(found[:5])}{f' and {len(found) - 5} more' if len(found) > 5 else ''}."


_OF_RECORDS: list[Check] = [_in_record, _between_records, _between_weights]
