"""The model's weights as accelerate and transformers save them under any strategy, into a model under any other.

A folder holds one of these::

    model*.safetensors          whole tensors by name: one process, DDP, ZeRO, FSDP where it was asked for whole ones
    pytorch_model*.bin          the same, where safetensors are not wanted; pytorch_model_fsdp.bin of accelerate
    pytorch_model_fsdp_0/       what accelerate writes under FSDP, by torch.distributed.checkpoint
    dist_optim_weights/         the same without its prefix: what is written here for ZeRO engines
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_optim.checkpoint.beside_training import own_copies
from dist_optim.checkpoint.blocks import Pieces, read_pieces, write_pieces
from dist_optim.checkpoint.directory import attempt
from dist_optim.checkpoint.engine_view import EngineView, view_of
from dist_optim.checkpoint.index import stored_tensors
from dist_optim.checkpoint.seals import check_files
from dist_optim.errors import CheckpointError
from dist_optim.layouts.detect import PlacedParameter, clean_name, detect
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.ranks.together import together

__all__ = [
    "FSDP_FOLDER",
    "OWN_FOLDER",
    "StoredWeights",
    "copied_weights",
    "find_weights",
    "load_weights",
    "pieces_of_model",
    "remove_weights",
    "save_weights",
]

OWN_FOLDER = "dist_optim_weights"
WHOLE_FILES = ("model*.safetensors", "pytorch_model*.bin")
FSDP_FOLDER, FSDP_PREFIX = "pytorch_model_fsdp_0", "model."


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Where a folder holds weights."""

    files: tuple[Path, ...] = ()
    """Of whole tensors."""
    folder: Path | None = None
    """Of tensors in blocks."""
    prefix: str = ""
    """Of their names in it."""
    names: Mapping[Path, Mapping[str, str]] | None = None
    """By file, what each name in it is in the model: of adapters, beside which the rest of the model is as it was."""


def find_weights(directory: str | Path) -> StoredWeights | None:
    """What a folder holds of weights in one of the formats that are read here; None where it holds none."""
    directory = Path(directory)
    for folder, prefix in ((OWN_FOLDER, ""), (FSDP_FOLDER, FSDP_PREFIX)):
        if (directory / folder).is_dir():
            return StoredWeights(folder=directory / folder, prefix=prefix)
    files = next((found for kind in WHOLE_FILES if (found := sorted(directory.glob(kind)))), [])
    return StoredWeights(files=tuple(files)) if files else None


def remove_weights(directory: Path) -> None:
    """Of all these formats, whatever lies there: of two, nobody knows which is the newer."""
    for folder in (OWN_FOLDER, FSDP_FOLDER):
        if (directory / folder).is_dir():
            shutil.rmtree(directory / folder)
    for kind in WHOLE_FILES:
        for path in directory.glob(kind):
            path.unlink()


def save_weights(directory: Path, model: nn.Module, optimizer: Any) -> None:
    """Write the model's weights and buffers into ``OWN_FOLDER``, which is not yet there. Collective.

    Raises:
        CheckpointError: On all ranks; what is there of it is not whole.
    """
    view = view_of(optimizer)
    write_pieces(directory / OWN_FOLDER, _weights(directory, model, view), view.ranks)


def copied_weights(directory: Path, model: nn.Module, optimizer: Any) -> Callable[[dist.ProcessGroup | None], None]:
    """A copy of what ``save_weights`` would write now; what is returned writes it. Both are collective.

    Returns:
        To be called on all ranks with a group of them, when nothing else is to use that.

    Raises:
        CheckpointError: On all ranks: one has no room for the copy.
    """
    view = view_of(optimizer)
    copied = own_copies(_weights(directory, model, view), directory, view.ranks)
    return lambda ranks: write_pieces(directory / OWN_FOLDER, copied, ranks)


def _weights(directory: Path, model: nn.Module, view: EngineView) -> dict[str, Pieces]:
    """What this rank holds of them. Collective."""

    def look() -> dict[str, Pieces]:
        view.look()
        return pieces_of_model(model, view.model_parameters(model))

    return attempt(look, directory, view.ranks)


def load_weights(stored: StoredWeights, model: nn.Module, optimizer: Any = None) -> None:
    """Each rank takes what it holds of every tensor. Collective.

    Args:
        stored: What ``find_weights`` found.
        model: Plain, or under DDP, FSDP or DeepSpeed.
        optimizer: Under DeepSpeed its optimizer, whose masters are what is trained.

    Raises:
        CheckpointError: On all ranks: a file is damaged, or of another model.
    """
    view = None if optimizer is None else view_of(optimizer)
    where = stored.folder or stored.files[0].parent
    ranks = None if view is None else view.ranks
    targets = attempt(lambda: _targets(model, view), where, ranks, is_reading=True)
    if stored.folder is None:
        together(
            lambda: _install_whole(stored, model, targets),
            ranks,
            doing=f"Reading the weights in {str(where)!r}",
            remedy="They are damaged, or of another model: resume from another checkpoint.",
            otherwise=CheckpointError,
        )
    else:
        _install_blocks(stored.folder, stored.prefix, model, targets, ranks)
    if view is not None:
        view.refresh()


def pieces_of_model(model: nn.Module, parameters: Mapping[str, PlacedParameter]) -> dict[str, Pieces]:
    """Parameters as this rank holds them, and the buffers that belong to a state dict; tied tensors once."""
    parts = {name: Pieces.of(one.local(), one) for name, one in parameters.items()}
    return parts | {name: Pieces.whole(buffer) for name, buffer in saved_buffers(model).items()}


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a state dict, by their names in the user's own model."""
    return {
        clean_name(model, f"{path}.{name}" if path else name): buffer
        for path, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def _targets(model: nn.Module, view: EngineView | None) -> dict[str, PlacedParameter]:
    """By name, what a parameter is read into: what is trained, which the model itself may only follow."""
    if view is None:
        return dict(detect(model))
    view.look()
    return {**view.model_parameters(model), **{one.fqn: one for one in view.training_weights()}}


def _install_blocks(
    folder: Path,
    prefix: str,
    model: nn.Module,
    targets: Mapping[str, PlacedParameter],
    ranks: dist.ProcessGroup | None,
) -> None:
    pieces = {prefix + name: piece for name, piece in pieces_of_model(model, targets).items()}
    needed = {prefix + name for name in targets}

    def look() -> dict[str, Pieces]:
        found = stored_tensors(folder)
        check_files(folder, own_rank(ranks), num_ranks(ranks))
        wanted = {name: piece for name, piece in pieces.items() if name in found or name in needed}
        for name, piece in wanted.items():
            if name not in found or found[name].shape != piece.shape:
                there = f"has shape {tuple(found[name].shape)} in it" if name in found else "is not in it"
                raise CheckpointError(
                    f"{str(folder)!r} is of another model: {name.removeprefix(prefix)!r} {there}, and has shape "
                    f"{tuple(piece.shape)} in the model. Build the model that was saved."
                )
        return {name: piece.room(found[name].dtype) for name, piece in wanted.items()}

    rooms = attempt(look, folder, ranks, is_reading=True)
    read_pieces(folder, rooms, ranks)
    with torch.no_grad():
        for name, room in rooms.items():
            pieces[name].fill(room)


def _install_whole(stored: StoredWeights, model: nn.Module, placed: Mapping[str, PlacedParameter]) -> None:
    """One tensor at a time is whole in memory."""
    takers = _takers(model, placed)
    with torch.no_grad():
        for path in stored.files:
            names = {name: name for name in takers} if stored.names is None else stored.names[path]
            for name, tensor in _tensors_in(path, names):
                takers.pop(names[name])(tensor)
    needed = [name for name, one in placed.items() if stored.names is None or one.is_trained]
    missing = sorted(name for name in takers if name in needed)
    if missing:
        raise KeyError(f"no {missing[0]!r} ({len(missing)} such)")


def _tensors_in(path: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        yield from ((name, content[name]) for name in content if name in wanted)
        return
    from safetensors import safe_open

    with safe_open(path, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - it is no mapping
            if name in wanted:
                yield name, stored.get_tensor(name)


def _takers(model: nn.Module, placed: Mapping[str, PlacedParameter]) -> dict[str, Callable[[Tensor], object]]:
    """By name, what to do with the whole tensor: keep this rank's part of a parameter, or all of a buffer."""
    takers: dict[str, Callable[[Tensor], object]] = {}
    for name, buffer in model.named_buffers():
        takers[clean_name(model, name)] = buffer.copy_
    for name, one in placed.items():

        def take(full: Tensor, one: PlacedParameter = one) -> None:
            if full.shape != one.shape:
                raise ValueError(f"{one.fqn!r} has shape {tuple(full.shape)} in it, {tuple(one.shape)} in the model")
            one.local().copy_(one.layout.view_of(full, own_rank(one.process_group)))

        takers[name] = take
    return takers
