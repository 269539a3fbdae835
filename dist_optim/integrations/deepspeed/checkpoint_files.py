"""DeepSpeed's own checkpoint files: what one rank fails to write or to read, all ranks raise.

DeepSpeed raises on that rank alone, and the others wait for it in the next barrier. Inside ``save_checkpoint`` a
failure is noted instead, and raised on all ranks before the checkpoint is declared whole (``latest`` still names the
one before); inside ``load_checkpoint`` ranks read each file together, and nothing that a file names is run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dist_optim.checkpoint.plain_loads import plain_loads
from dist_optim.errors import CheckpointError
from dist_optim.ranks.agreement import assert_ranks_equal, own_rank
from dist_optim.ranks.meeting import meet
from dist_optim.ranks.together import together

__all__ = ["fail_together"]

_HOW_TO_LEAVE = (
    "dist_optim: engine.save_checkpoint() writes DeepSpeed's own files, for this ZeRO stage and number of ranks alone; "
    "dist_optim.save_checkpoint(folder, engine, engine.optimizer) writes what every strategy loads."
)


def fail_together(engine: Any) -> None:
    """Let this engine's ``save_checkpoint`` and ``load_checkpoint`` fail on all ranks, with a ``CheckpointError``.

    An engine that writes its files in the background is left as it is.
    """
    save, load, is_said = engine.save_checkpoint, engine.load_checkpoint, [own_rank() != 0]

    @functools.wraps(save)
    def save_checkpoint(*args: Any, **options: Any) -> Any:
        meet("engine.save_checkpoint()")
        if reason := engine.basic_optimizer.why_not_saved():  # on all ranks alike
            raise CheckpointError(reason)
        if not is_said[0]:
            is_said[0] = True
            print(_HOW_TO_LEAVE, flush=True)
        with nullcontext() if engine.checkpoint_engine.is_decoupled() else _noted(engine):
            return save(*args, **options)

    @functools.wraps(load)
    def load_checkpoint(load_dir: str, tag: str | None = None, *args: Any, **options: Any) -> Any:
        meet("engine.load_checkpoint()")
        if engine.basic_optimizer.why_not_saved():
            raise CheckpointError(
                "A step of this engine failed half way, and DeepSpeed keeps gradients of it. Call deepspeed.initialize "
                "anew, and load into the new engine."
            )
        if not engine.load_universal_checkpoint():
            tag = _found_together(engine, load_dir, tag)
        with _read_together(engine), plain_loads(_classes()):  # what is read together, and what DeepSpeed reads itself
            return load(load_dir, tag, *args, **options)

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def _classes() -> list[type]:
    """What DeepSpeed's own files hold besides plain values and tensors; it would load any pickle."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _found_together(engine: Any, load_dir: str, tag: str | None) -> str | None:
    """The tag to load, the same on every rank, when every rank sees its files; None where no rank finds any tag."""
    latest = Path(load_dir) / "latest"

    def find() -> str | None:
        found = latest.read_text().strip() if tag is None and latest.is_file() else tag
        if found is not None and not engine._get_all_ckpt_names(load_dir, found):
            raise CheckpointError(
                f"Rank {own_rank()} sees no files of DeepSpeed's checkpoint {found!r} in {load_dir!r}. Give a folder "
                "that all ranks see, and a tag that was saved in it."
            )
        return found

    remedy = "Load from a disk that all ranks share and can read."
    found = together(find, doing="Looking for DeepSpeed's checkpoint", remedy=remedy, otherwise=CheckpointError)
    assert_ranks_equal("Ranks would load different checkpoints", [("the tag", found)], remedy)
    return found


@contextmanager
def _noted(engine: Any) -> Iterator[None]:
    files, failures = engine.checkpoint_engine, list[Exception]()

    def noting(write: Callable[..., Any]) -> Callable[..., Any]:
        def write_or_note(*args: Any, **options: Any) -> None:
            try:
                write(*args, **options)
            except Exception as error:
                failures.append(error)

        return write_or_note

    def finish(commit: Callable[..., Any], about: Any) -> Any:
        if failures:
            raise failures[0]
        return commit(about)

    def commit_together(commit: Callable[..., Any], about: Any) -> Any:
        return together(
            lambda: finish(commit, about),
            doing=f"Writing DeepSpeed's checkpoint {about.tag!r}",
            remedy='Its files are not complete, and "latest" was left alone. Check that the folder is on a disk that '
            "all ranks share and that it is not full, and save again.",
            otherwise=CheckpointError,
        )

    with (
        _replaced(files, "makedirs", noting),
        _replaced(files, "save", noting),
        _replaced(engine, "_copy_recovery_script", noting),
        _replaced(files, "commit", lambda commit: functools.partial(commit_together, commit)),
    ):
        yield


@contextmanager
def _read_together(engine: Any) -> Iterator[None]:
    def reading(read: Callable[..., Any]) -> Callable[..., Any]:
        def read_together(path: Any, *args: Any, **options: Any) -> Any:
            def read_plainly() -> Any:
                with plain_loads(_classes()):
                    return _fitting(engine, read(path, *args, **options))

            return together(
                read_plainly,
                doing="Reading DeepSpeed's checkpoint",
                remedy="Model and optimizer are partly loaded: load again, or load another checkpoint.",
                otherwise=CheckpointError,
            )

        return read_together

    with _replaced(engine.checkpoint_engine, "load", reading):
        yield


def _fitting(engine: Any, content: Any) -> Any:
    """What was read of a file, when it has the frozen weights that DeepSpeed will look for in it.

    Raises:
        CheckpointError: More is frozen than when it was saved: DeepSpeed would end with a KeyError in the middle.
    """
    saved = content.get("frozen_param_fragments") if isinstance(content, dict) else None
    if saved is None:
        return content
    frozen = [name for name, parameter in engine.module.named_parameters() if not parameter.requires_grad]
    if missing := [name for name in frozen if name not in saved]:
        raise CheckpointError(
            f"{missing[0]!r} is frozen now, and was not when DeepSpeed's checkpoint was saved. Freeze what was frozen "
            "then before you load, and freeze the rest after it. Nothing was changed."
        )
    return content


@contextmanager
def _replaced(owner: Any, name: str, extend: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """For as long as the block takes, the object's own attribute in front of its class's method."""
    setattr(owner, name, extend(getattr(owner, name)))
    try:
        yield
    finally:
        delattr(owner, name)
