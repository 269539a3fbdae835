"""What binds the parts of one save: a random word in both records, and digests of everything written beside them.

::

    checkpoint.json ── word, digests of ──> model/ (index, tensors), optimizer/optimizer.json, scheduler.pt, ranks/*.pt
    optimizer.json  ── word, digests of ──> tensors/ (index, tensors)

A record holds a digest of itself too, so that a number in it is as safe as a tensor (``seals``). So parts of two saves
load together only where they are equal to the bit; the word tells people which save a part is of.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_optim.checkpoint.directory import contents, read_json, write_json
from dist_optim.checkpoint.schema import Kind, problem_in
from dist_optim.errors import CheckpointError
from dist_optim.ranks.agreement import gather_objects, own_rank

__all__ = ["FORMAT", "check_part", "check_same_save", "digest_of", "new_word", "read_record", "write_record"]

FORMAT = 2
DIGEST = "digest"


def new_word(ranks: dist.ProcessGroup | None) -> str:
    """A word that no other save has, the same on all ranks. Collective."""
    word: str = gather_objects(uuid.uuid4().hex if own_rank(ranks) == 0 else "", ranks)[0]
    return word


def digest_of(path: Path) -> str:
    """SHA-256 of a small file.

    Raises:
        CheckpointError: It is missing, or no file.
    """
    return hashlib.sha256(contents(path)).hexdigest()


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record with its own digest, and wait until the disk has it."""
    plain = json.loads(json.dumps(record))
    write_json(path, {**plain, DIGEST: digest_of_record(plain)})


def read_record(path: Path, schema: Kind) -> dict[str, Any]:
    """A record that is as it was written, and holds what the schema asks for.

    Raises:
        CheckpointError: It is missing, of another format, changed since it was written, or nonsense.
    """
    record = read_json(path)
    if not isinstance(record, dict) or type(record.get("format")) is not int or record["format"] != FORMAT:
        raise CheckpointError(
            f"{str(path)!r} has a format that this version of dist_optim does not know. Load it with the version that "
            "wrote it."
        )
    plain = {key: value for key, value in record.items() if key != DIGEST}
    if record.get(DIGEST) != digest_of_record(plain):
        raise CheckpointError(
            f"{str(path)!r} is damaged, or was changed after it was saved: its digest is of another content. Resume "
            "from another checkpoint; for other hyperparameters build with them, and name them in allow_changed."
        )
    if problem := problem_in(plain, schema):
        raise CheckpointError(f"{str(path)!r} is damaged: {problem}. Resume from another checkpoint.")
    return plain


def digest_of_record(plain: dict[str, Any]) -> str:
    """Of its content, whatever the order and the spaces."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_part(directory: Path, name: str, about: dict[str, Any]) -> None:
    """Prove that a small file is the one that was written with ``checkpoint.json``.

    Args:
        directory: The checkpoint.
        name: The file, in it.
        about: The content of ``checkpoint.json``.

    Raises:
        CheckpointError: It is another one, with what is known of where that is from.
    """
    path = directory / name
    if digest_of(path) != about["parts"].get(name):
        raise CheckpointError(
            f"{str(path)!r} is not the file that was saved with checkpoint.json ({_words(about)}): "
            f"{_origin(path) or 'it is damaged, or of another checkpoint'}. Resume from a folder that holds one save, "
            "whole."
        )


def check_same_save(directory: Path, about: dict[str, Any], record: dict[str, Any]) -> None:
    """Prove that both records tell of one save.

    Args:
        directory: The checkpoint.
        about: The content of ``checkpoint.json``.
        record: The content of ``optimizer.json``.

    Raises:
        CheckpointError: With both.
    """
    pairs = (("identity", "identity"), ("steps", "num_steps"), ("optimizer", "optimizer"))
    num_own = sum(name.startswith("ranks/") for name in about["parts"])
    if any(about[mine] != record[theirs] for mine, theirs in pairs) or num_own != about["world_size"]:
        raise CheckpointError(
            f"{str(directory)!r} is put together from parts of several checkpoints: checkpoint.json is of "
            f"{_words(about)}, optimizer.json of {_words(record)}. Resume from a folder that holds one save, whole."
        )


def _origin(path: Path) -> str:
    """Of a record, which save it is of; empty where that is not known."""
    if path.suffix != ".json":
        return ""
    try:
        return f"it is damaged, or of {_words(read_json(path))}"
    except (CheckpointError, LookupError, TypeError):
        return ""


def _words(record: dict[str, Any]) -> str:
    steps = record["steps"] if "steps" in record else record["num_steps"]
    return f"step {steps!r} of {record['optimizer']!r}, save {str(record['identity'])[:8]}"
