"""DeepSpeed's own files: a failure on one rank is noted, raised where all ranks meet, and the methods are as before."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from dist_optim.errors import CheckpointError
from dist_optim.integrations.deepspeed.checkpoint_files import fail_together


class Files:
    """DeepSpeed's checkpoint engine, as far as it is asked; what it fails at is named."""

    def __init__(self, fails_at: str) -> None:
        self.fails_at = fails_at
        self.done: list[str] = []

    def is_decoupled(self) -> bool:
        return False

    def _do(self, what: str) -> None:
        if what == self.fails_at:
            raise OSError(28, "No space left on device")
        self.done.append(what)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._do("makedirs")

    def save(self, state_dict: Any, path: str) -> None:
        self._do("save")

    def commit(self, about: Any) -> bool:
        self._do("commit")
        return True

    def load(self, path: str, map_location: Any = None) -> str:
        self._do("load")
        return "state"


class Engine:
    """The order of DeepSpeed's calls."""

    def __init__(self, fails_at: str = "") -> None:
        self.checkpoint_engine = Files(fails_at)
        self.latest = "before"
        self.basic_optimizer = mock.Mock(why_not_saved=lambda: "")

    def load_universal_checkpoint(self) -> bool:
        return False

    def _get_all_ckpt_names(self, directory: str, tag: str) -> list[str]:
        return [str(path) for path in Path(directory).glob(tag)]

    def _copy_recovery_script(self, path: str) -> None:
        self.checkpoint_engine._do("script")

    def save_checkpoint(self, directory: str, tag: str) -> bool:
        self.checkpoint_engine.makedirs(directory, exist_ok=True)
        self.checkpoint_engine.save({}, directory)
        self._copy_recovery_script(directory)
        self.checkpoint_engine.commit(SimpleNamespace(tag=tag))
        self.latest = tag
        return True

    def load_checkpoint(self, directory: str, tag: str | None = None) -> str | None:
        return None if tag is None else self.checkpoint_engine.load(directory)


@pytest.mark.parametrize("fails_at", ["makedirs", "save", "script", "commit"])
def test_a_failing_write_is_raised_at_the_end_and_latest_stays(fails_at: str) -> None:
    engine = Engine(fails_at)
    fail_together(engine)
    with pytest.raises(CheckpointError, match=r"Writing DeepSpeed's checkpoint 'now' failed with OSError: .*not full"):
        engine.save_checkpoint("folder", "now")
    assert engine.latest == "before" and "commit" not in engine.checkpoint_engine.done
    assert not {"save", "makedirs", "commit"} & vars(engine.checkpoint_engine).keys()
    with pytest.raises(OSError):
        engine.checkpoint_engine._do(fails_at)


def test_what_does_not_fail_is_as_it_was(tmp_path: Path) -> None:
    engine = Engine()
    fail_together(engine)
    assert engine.save_checkpoint("folder", "now") and engine.latest == "now"
    assert engine.checkpoint_engine.done == ["makedirs", "save", "script", "commit"]
    assert engine.load_checkpoint(str(tmp_path)) is None, "no tag: DeepSpeed says so itself"
    (tmp_path / "latest").write_text("now\n")
    (tmp_path / "now").mkdir()
    assert engine.load_checkpoint(str(tmp_path)) == "state"


def test_a_failing_read_and_a_folder_without_files_are_named(tmp_path: Path) -> None:
    engine = Engine("load")
    fail_together(engine)
    with pytest.raises(CheckpointError, match="Rank 0 sees no files of DeepSpeed's checkpoint 'now'"):
        engine.load_checkpoint(str(tmp_path), tag="now")
    (tmp_path / "now").mkdir()
    with pytest.raises(CheckpointError, match="Reading DeepSpeed's checkpoint failed with OSError.*load again"):
        engine.load_checkpoint(str(tmp_path), "now")


class Unlisted:
    """Any class; its name may be any code."""


def test_what_deepspeeds_files_name_is_made_where_it_is_known_and_else_refused(tmp_path: Path) -> None:
    scaler = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler").LossScaler(scale=8)
    engine = Engine()
    fail_together(engine)
    (tmp_path / "now").write_text("a tag")

    def load(path: str, map_location: Any = None) -> Any:  # as DeepSpeed does
        return torch.load(f"{path}/state.pt", map_location=map_location, weights_only=False)

    with mock.patch.object(Files, "load", staticmethod(load)):
        torch.save({"loss_scaler": scaler}, tmp_path / "state.pt")
        content: Any = engine.load_checkpoint(str(tmp_path), tag="now")
        assert content["loss_scaler"].loss_scale == 8
        torch.save({"client_state": Unlisted()}, tmp_path / "state.pt")
        with pytest.raises(CheckpointError, match=r"names test_zero_files\.Unlisted, .*any code.*add_safe_globals"):
            engine.load_checkpoint(str(tmp_path), tag="now")
        with torch.serialization.safe_globals([Unlisted]):
            content = engine.load_checkpoint(str(tmp_path), tag="now")
    assert isinstance(content["client_state"], Unlisted)
