"""Tensors read straight out of torch's archives: the bits that ``torch.load`` finds, or nothing."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import dist_optim
from dist_optim.checkpoint import archive, index
from dist_optim.checkpoint.archive import Part, Stored, look_at_tensor, read_rows
from dist_optim.checkpoint.blocks import Pieces, read_pieces, write_pieces

KNOWN = {
    **{str(dtype): torch.arange(24).to(dtype).view(4, 3, 2) for dtype in archive.DTYPES.values()},
    "a number": torch.tensor(7.0),
    "empty": torch.empty(0, 3),
    "one row": torch.arange(3.0)[None],
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "permuted": torch.arange(24.0).view(2, 3, 4).permute(1, 2, 0),
}
OTHERS = {
    "expanded": torch.arange(2.0).expand(3, 2),
    "with gaps": torch.arange(8.0)[::2],
    "a part of a storage": torch.arange(6.0)[2:],
    "float8": torch.ones(3).to(torch.float8_e4m3fn),
    "complex": torch.ones(3, dtype=torch.complex64),
    "a parameter": torch.nn.Parameter(torch.ones(3)),
}


def stored_as(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return b"before" + file.getvalue() + b"behind"


def look(content: bytes) -> Stored | None:
    part = Part(io.BytesIO(content), 6, len(content) - 12)
    with zipfile.ZipFile(part) as found:
        return look_at_tensor(found, part)


def read(content: bytes, into: Tensor, first_row: int = 0) -> bool:
    return read_rows(io.BytesIO(content), 6, len(content) - 12, first_row, into)


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_is_read_to_the_bit(name: str) -> None:
    tensor, content = KNOWN[name], stored_as(KNOWN[name])
    found = look(content)
    assert found is not None and (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
    into = torch.zeros_like(tensor)
    before = into._version
    assert read(content, into) and into.equal(tensor)
    assert into._version > before, "autograd is told that it was written to"


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_known_is_left_to_torch(name: str) -> None:
    into = torch.zeros_like(OTHERS[name], memory_format=torch.contiguous_format).detach()
    assert look(stored_as(OTHERS[name])) is None and not read(stored_as(OTHERS[name]), into) and not into.any()


def test_rows_are_read_alone_and_only_where_they_fit() -> None:
    tensor = torch.arange(24.0).view(4, 3, 2)
    content, into = stored_as(tensor), torch.zeros(2, 3, 2)
    assert read(content, into, 1) and into.equal(tensor[1:3])
    assert not read(stored_as(tensor.transpose(0, 1)), torch.zeros(3, 4, 2)), "other strides"
    for other, first_row in ((into, 3), (into.double(), 0), (into[:, :, :1], 0), (torch.zeros(2, 2, 3), 0)):
        assert not read(content, other, first_row)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_a_pickle_that_names_something_else_is_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO(b"before")
    with zipfile.ZipFile(file, "a") as made:
        made.writestr("archive/data.pkl", pickle.dumps(Evil()))
        made.writestr("archive/byteorder", "little")
        made.writestr("archive/data/0", bytes(4))
    content = file.getvalue()[6:]
    part = Part(io.BytesIO(content), 0, len(content))
    with zipfile.ZipFile(part) as found:
        assert look_at_tensor(found, part) is None
    assert capsys.readouterr().out == ""


def test_a_load_reads_rows_straight_into_place(tmp_path: Path) -> None:
    tensors = {**KNOWN, **{name: OTHERS[name].detach() for name in ("complex",)}}
    write_pieces(tmp_path / "all", {name: Pieces.whole(one) for name, one in tensors.items()}, None)
    rooms = {name: torch.zeros_like(one) for name, one in tensors.items()}
    with (
        mock.patch("torch.load", wraps=torch.load) as load,
        mock.patch.object(index, "read_rows", wraps=read_rows) as rows,
    ):
        read_pieces(tmp_path / "all", {name: Pieces.whole(one) for name, one in rooms.items()}, None)
    assert load.call_count == 1 and rows.call_count == len(tensors) - 1  # nothing is read of an empty one
    assert all(rooms[name].equal(one) for name, one in tensors.items())


def test_a_load_unpickles_each_index_once(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    optimizer = dist_optim.build_optimizer(model, "sgd", lr=0.1, print_audit=False)
    dist_optim.save_checkpoint(tmp_path / "run", model, optimizer)
    unpickler = index._IndexUnpickler
    with mock.patch.object(index, "_IndexUnpickler", wraps=unpickler) as made:
        dist_optim.load_checkpoint(tmp_path / "run", model, optimizer)
    assert made.call_count == 2 and index._kept is None
