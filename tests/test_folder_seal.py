"""The Trainer's and accelerate's folders hold one save, or are refused with what differs and nothing changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import transformers
from door_runs import DOORS, ByAccelerate, ByTrainer, Run, copy_over, equal
from fresh import own_libraries

from dist_optim.checkpoint import folder_seal, inspect
from dist_optim.checkpoint.folder_seal import MARK, check_folder, differences_in, seal_alone
from dist_optim.errors import CheckpointError
from dist_optim.testing import RankPool

FILES = {
    "the Trainer": {
        "model.safetensors": "model",
        "optimizer": "optimizer",
        "scheduler.pt": "scheduler",
        "trainer_state.json": "trainer_state",
        "rng_state.pth": "rng_state",
    },
    "accelerate": {
        "model.safetensors": "model",
        "dist_optim": "optimizer",
        "scheduler.bin": "scheduler",
        "random_states_0.pkl": "rng_state",
    },
}
EVERY = [(door, name) for door, names in FILES.items() for name in names]


@pytest.fixture(scope="module", autouse=True)
def accelerate_of_this_module() -> Iterator[None]:
    with own_libraries():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """By door: a save, that of the next step, and that of another run."""
    home = tmp_path_factory.mktemp("saved")
    return {
        door: {
            "this": kind(home / door / "this", 2).save(),
            "another step": kind(home / door / "step", 3).save(),
            "another run": kind(home / door / "run", 2, seed=1).save(),
        }
        for door, kind in DOORS.items()
    }


def refusal(kind: type[Run], home: Path, checkpoint: Path) -> str:
    """What a load says, which has changed nothing."""
    run = kind(home, 0)
    before = run.bits()
    with pytest.raises(CheckpointError) as caught:
        run.load(checkpoint)
    assert equal(run.bits(), before), "a refused load changes nothing"
    return str(caught.value)


@pytest.mark.parametrize(("door", "name"), EVERY)
@pytest.mark.parametrize("other", ["another step", "another run"])
def test_a_part_of_another_save_is_refused(
    door: str, name: str, other: str, saved: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    mixed = tmp_path / "checkpoint-2"
    shutil.copytree(saved[door]["this"], mixed)
    copy_over(saved[door][other] / name, mixed / name)
    if not [*differences_in(mixed)]:
        assert FILES[door][name] in ("scheduler", "rng_state") and other != "another step", "nothing was exchanged"
        return
    said = refusal(DOORS[door], tmp_path, mixed)
    assert f"{name}" in said and f"({FILES[door][name]})" in said and "allow_changed=" in said
    assert any(name in problem for problem in inspect(mixed).problems)


@pytest.mark.parametrize(("door", "name"), EVERY)
def test_a_part_that_is_missing_or_cut_is_refused(
    door: str, name: str, saved: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    damaged = tmp_path / "checkpoint-2"
    path = damaged / name / "optimizer.json" if name in ("optimizer", "dist_optim") else damaged / name
    for content in (None, b"", saved[door]["this"].joinpath(path.relative_to(damaged)).read_bytes()[:-1]):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(saved[door]["this"], damaged)
        path.unlink() if content is None else path.write_bytes(content)
        assert path.name in refusal(DOORS[door], tmp_path, damaged)


@pytest.mark.parametrize("door", DOORS)
def test_a_damaged_tensor_of_the_optimizer_is_refused_before_the_weights_are_read(
    door: str, saved: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    damaged = tmp_path / "checkpoint-2"
    shutil.copytree(saved[door]["this"], damaged)
    (path,) = (damaged / FILES_OF_TENSORS[door]).glob("*.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert path.name in refusal(DOORS[door], tmp_path, damaged)


@pytest.mark.parametrize("door", DOORS)
def test_a_folder_without_its_record_is_refused(door: str, saved: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    unfinished = tmp_path / "checkpoint-2"
    shutil.copytree(saved[door]["this"], unfinished)
    (unfinished / MARK).unlink()
    assert MARK in refusal(DOORS[door], tmp_path, unfinished)
    (unfinished / MARK).write_text((saved[door]["another step"] / MARK).read_text())
    assert "another file" in refusal(DOORS[door], tmp_path, unfinished)


@pytest.mark.parametrize("door", DOORS)
def test_weights_beside_the_saved_ones_are_refused(
    door: str, saved: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    """Of two kinds, the ones that were put there would be read."""
    more = tmp_path / "checkpoint-2"
    shutil.copytree(saved[door]["this"], more)
    shutil.copytree(saved[door]["another step"] / FILES_OF_TENSORS[door], more / "dist_optim_weights")
    assert "was not there when it was saved" in refusal(DOORS[door], tmp_path, more)


FILES_OF_TENSORS = {"the Trainer": "optimizer/tensors", "accelerate": "dist_optim/tensors"}


def test_weights_that_were_exchanged_on_purpose_are_taken(saved: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    for door, given in (("the Trainer", "model"), ("accelerate", ["model"])):
        mixed = tmp_path / door / "checkpoint-2"
        shutil.copytree(saved[door]["this"], mixed)
        copy_over(saved[door]["another run"] / "model.safetensors", mixed / "model.safetensors")
        run, other = DOORS[door](tmp_path / door, 0, allow_changed=given), DOORS[door](tmp_path / door, 0)
        run.load(mixed)
        other.load(saved[door]["this"])
        assert not equal(run.bits(), other.bits())
        weights = [name for name, _ in run.model.named_parameters()]
        assert equal({**run.bits(), **{name: 0 for name in weights}}, {**other.bits(), **{name: 0 for name in weights}})
        with pytest.raises(CheckpointError, match=r"allow_changed=\['model', 'scheduler'\]"):
            (mixed / {"the Trainer": "scheduler.pt", "accelerate": "scheduler.bin"}[door]).unlink()
            run.load(mixed)


def test_someone_elses_folder_is_left_to_who_reads_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"anything")
    check_folder(tmp_path)


def test_large_files_are_sealed_in_pieces_that_ranks_share(tmp_path: Path) -> None:
    content = bytes(range(100))
    with mock.patch.multiple(folder_seal, PIECE=16, CHUNK=8):
        (tmp_path / "model.safetensors").write_bytes(content)
        (tmp_path / "scheduler.pt").write_bytes(b"")
        seal_alone(tmp_path)
        assert not [*differences_in(tmp_path)]
        for at in (0, 15, 16, 99):
            changed = bytes(one ^ (at == number) for number, one in enumerate(content))
            (tmp_path / "model.safetensors").write_bytes(changed)
            found = [len([*differences_in(tmp_path, rank, 3)]) for rank in range(3)]
            assert sum(found) == 1 and found[at // 16 % 3] == 1


def said_of_a_mixture(mixed: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_folder(mixed)
    return str(caught.value)


def test_both_ranks_refuse_what_one_of_them_finds(
    two_ranks: RankPool, saved: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    mixed = tmp_path / "checkpoint-2"
    shutil.copytree(saved["the Trainer"]["this"], mixed)
    copy_over(saved["the Trainer"]["another step"] / "model.safetensors", mixed / "model.safetensors")
    one, other = two_ranks.run(said_of_a_mixture, mixed)
    assert one == other and "'model.safetensors' (model) is another file" in one


def test_control_unsealed_a_mixture_would_be_taken(saved: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    for module, door in (("transformers.checkpoint", "the Trainer"), ("accelerate.state", "accelerate")):
        mixed = tmp_path / door / "checkpoint-2"
        shutil.copytree(saved[door]["this"], mixed)
        copy_over(saved[door]["another step"] / "model.safetensors", mixed / "model.safetensors")
        with mock.patch(f"dist_optim.integrations.{module}.check_folder"):
            DOORS[door](tmp_path / door, 0).load(mixed)


def test_each_door_resumes_what_it_has_saved(saved: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    for door, kind in ((("the Trainer"), ByTrainer), ("accelerate", ByAccelerate)):
        run = kind(tmp_path / door, 0)
        run.load(saved[door]["this"])
        assert equal(run.bits(), kind(tmp_path / f"{door} again", 2).bits())


class KeepsAdapters(transformers.TrainerCallback):
    """As people do for PEFT: in ``on_save`` the folder is complete, and theirs."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        own = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter_model"
        own.mkdir()
        (own / "adapter_model.safetensors").write_bytes(b"theirs")


def test_what_a_callback_adds_when_the_trainer_has_saved_belongs_to_the_save(tmp_path: Path) -> None:
    run = ByTrainer(tmp_path, 0)
    run.trainer.args.save_strategy, run.trainer.args.save_steps, run.trainer.args.max_steps = "steps", 1, 1
    run.trainer.state.save_steps = 1
    run.trainer.add_callback(KeepsAdapters())
    run.trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / "adapter_model/adapter_model.safetensors").exists()
    assert not list(differences_in(checkpoint))
    (checkpoint / "adapter_model/adapter_model.safetensors").write_bytes(b"others")
    assert [part for part, _ in differences_in(checkpoint)] == ["model"]
