"""Logical tensors in blocks: what a rank holds of each, written and read by ``torch.distributed.checkpoint``.

The files know full tensors under logical names, cut into blocks wherever the writing ranks happened to hold them. A
reading rank asks for its own blocks; what overlaps is read. So the files do not know the sharding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dist_optim.checkpoint.index import IndexReader
from dist_optim.errors import CheckpointError
from dist_optim.layouts.detect import PlacedParameter
from dist_optim.layouts.layout import Layout, boxes_on
from dist_optim.ranks.agreement import num_ranks, own_rank
from dist_optim.ranks.at_work import at_work
from dist_optim.ranks.together import together

__all__ = ["Pieces", "read_pieces", "write_pieces"]


@dataclass(frozen=True, slots=True)
class Pieces:
    """The blocks of one logical tensor that this rank holds; the tensors are views of its storage."""

    shape: torch.Size
    dtype: torch.dtype
    blocks: Mapping[torch.Size, Tensor]
    """By where the block starts in the full tensor."""
    is_everywhere: bool = False
    """Whether every rank that trains the model holds all of it, by its layout."""

    @classmethod
    def whole(cls, tensor: Tensor) -> Pieces:
        """All of a tensor, on every rank that holds it alike."""
        return cls(tensor.shape, tensor.dtype, {torch.Size([0] * tensor.ndim): tensor.detach()})

    @classmethod
    def of(cls, local: Tensor, placed: PlacedParameter, shape: torch.Size | None = None) -> Pieces:
        """This rank's part of a tensor that is cut as the parameter is; of its shape, or of one with the same rows."""
        rank = own_rank(placed.process_group)
        return cls.part(local, placed.layout, placed.shape if shape is None else shape, rank)

    @classmethod
    def part(cls, local: Tensor, layout: Layout, shape: torch.Size, rank: int) -> Pieces:
        """What ``rank`` holds of a tensor of this shape; ``local`` is the storage of it."""
        if layout.is_replicated:
            return replace(cls.whole(local), is_everywhere=True)
        boxes = boxes_on(layout, shape, rank)
        flat = local.detach().reshape(-1) if len(boxes) > 1 else local.detach()
        sizes = [torch.Size(box.sizes).numel() for box in boxes]
        parts = flat.split(sizes) if len(boxes) > 1 else [flat] * len(boxes)
        blocks = {torch.Size(box.offsets): part.view(box.sizes) for box, part in zip(boxes, parts, strict=True)}
        return cls(shape, local.dtype, blocks)

    def room(self, dtype: torch.dtype) -> Pieces:
        """The same blocks on memory of their own, in another dtype."""
        blocks = {offsets: torch.empty_like(block, dtype=dtype) for offsets, block in self.blocks.items()}
        return Pieces(self.shape, dtype, blocks)

    def copied(self) -> Pieces:
        """The same on memory of its own, on the host."""
        blocks = {offsets: block.to("cpu", copy=True) for offsets, block in self.blocks.items()}
        return replace(self, blocks=blocks)

    def fill(self, room: Pieces) -> None:
        """Copy what was read into ``room``."""
        for offsets, block in self.blocks.items():
            block.copy_(room.blocks[offsets])


def write_pieces(directory: Path, pieces: Mapping[str, Pieces], process_group: dist.ProcessGroup | None) -> None:
    """Write every rank's blocks; one that several ranks hold is written once. Collective.

    Raises:
        CheckpointError: On all ranks: a disk is full, or ranks hold blocks that do not make up a tensor.
    """
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=True, sync_files=True)
    with _checksums_written():
        _in_files(
            lambda: dcp.save(
                dict(pieces),
                storage_writer=writer,
                planner=_WritePlanner(),
                process_group=process_group,
                no_dist=num_ranks(process_group) == 1,
            ),
            f"Writing {str(directory)!r}",
            "Check that the folder is on a disk that all ranks share and that it is not full; what was saved there "
            "before is untouched.",
            process_group,
        )


def read_pieces(directory: Path, pieces: Mapping[str, Pieces], process_group: dist.ProcessGroup | None) -> None:
    """Fill every block from the files, in place. Collective; each rank may ask for other names.

    Raises:
        CheckpointError: On all ranks: files are missing or damaged.
    """
    _in_files(
        lambda: dcp.load(
            dict(pieces),
            storage_reader=IndexReader(directory),
            planner=_ReadPlanner(),
            process_group=process_group,
            no_dist=num_ranks(process_group) == 1,
        ),
        f"Reading {str(directory)!r}",
        "A file is missing or damaged: resume from another checkpoint.",
        process_group,
    )


def _in_files(action: Callable[[], object], doing: str, remedy: str, process_group: dist.ProcessGroup | None) -> None:
    """One operation of ``torch.distributed.checkpoint``, which waits for all ranks also where one has failed."""

    def act() -> None:
        # For good, since this may be a thread: what catch_warnings puts back is the whole process's.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            action()
        except CheckpointException as error:
            raise CheckpointError(f"{doing} failed: {_first_failure(error)}. {remedy}") from error

    with at_work(doing):
        together(act, process_group, doing=doing, remedy=remedy, otherwise=CheckpointError)


@contextmanager
def _checksums_written() -> Iterator[None]:
    """``check_files`` compares them; a program may have turned them off."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _WritePlanner(dcp.DefaultSavePlanner):
    """Plans ``Pieces`` where torch's planner plans tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(offsets=offsets, sizes=block.shape),
                        properties=TensorProperties.create_from_tensor(block),
                        size=pieces.shape,
                    ),
                )
                for name, pieces in self.state_dict.items()
                for offsets, block in pieces.blocks.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return _block(self.state_dict, index)


class _ReadPlanner(dcp.DefaultLoadPlanner):
    """Reads into ``Pieces`` where torch's planner reads into tensors."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator  # type: ignore[assignment]

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, pieces in self.state_dict.items():
            stored = self.metadata.state_dict_metadata[name]
            chunks = [ChunkStorageMetadata(offsets, block.shape) for offsets, block in pieces.blocks.items()]
            items += create_read_items_for_chunk_list(name, stored, chunks)  # type: ignore[arg-type]
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _block(self.state_dict, index)


def _block(pieces: Mapping[str, Pieces], index: MetadataIndex) -> Tensor:
    assert index.offset is not None
    return pieces[index.fqn].blocks[index.offset]


def _first_failure(error: CheckpointException) -> str:
    """What went wrong, without the trace of every rank that torch puts around it."""
    if not error.failures:
        return "on some rank"
    rank, (inner, _) = next(iter(error.failures.items()))
    return f"{type(inner).__name__} on rank {rank}: {str(inner).splitlines()[0] if str(inner) else ''}"
