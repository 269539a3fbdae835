"""``import_`` of what DeepSpeed's engine saved: one process goes on to the bits of the engine, and no code is run."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import zero
from safetensors.torch import load_file
from test_import import Tripwire
from test_zero import BF16, FP16, OPTIMIZERS
from torch import Tensor, nn
from zero import Recorder, ZeroRun

import dist_optim
from dist_optim.checkpoint import export, import_, inspect
from dist_optim.errors import CheckpointError, UnsupportedError
from dist_optim.testing import RankPool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

BREAK = 3


@dataclass
class Saved:
    """What the run did after it was saved: gradients of each step, and the weights at the end."""

    before: list[Tensor]
    gradients: list[dict[str, Tensor | None]]
    after: list[Tensor]
    steps: int


def saved_and_gone_on(run: ZeroRun, directory: str) -> Saved:
    engine = zero.engine_of(run)
    zero.train_engine(engine, run, range(BREAK))
    engine.save_checkpoint(directory, tag="half")
    dist_optim.save_checkpoint(f"{directory}-ours", engine, engine.optimizer)
    taken, before, recorder = engine.basic_optimizer.num_steps, zero.weights_of(engine, run), Recorder(engine)
    seen = []
    for step in range(BREAK, zero.STEPS):
        zero.train_engine(engine, run, range(step, step + 1))
        seen.append(dict(recorder.gradients))
    after = zero.weights_of(engine, run)
    return Saved(before, seen, after, taken)


def gone_on_alone(run: ZeroRun, saved: Saved, directory: Path) -> list[float]:
    """Distances of one process in fp32 that loads the import: right after loading, and after the same gradients."""
    model: nn.Module = run.make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    optimizer = dist_optim.build_optimizer(model, run.name, print_audit=False, fused_backward=False, **run.options)
    dist_optim.load_checkpoint(directory, model, optimizer)
    optimizer.train()
    assert optimizer.num_steps == saved.steps
    found = [distance_of(model, run, saved.before)]
    for gradients in saved.gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
        optimizer.step()
    return [*found, distance_of(model, run, saved.after)]


def distance_of(model: nn.Module, run: ZeroRun, expected: list[Tensor]) -> float:
    """As the engine delivers weights: in its own dtype."""
    weights = [p.detach().to(run.dtype).float() for p in model.parameters()]
    return zero.relative_distance(weights, expected, zero.start_of(run))


RUNS: list[tuple[str, int, dict[str, Any]]] = [
    *(("adamw_torch", stage, {}) for stage in (1, 2, 3)),
    *(("galore_adamw", stage, {}) for stage in (2, 3)),
    *(("schedule_free_adamw", stage, {}) for stage in (2, 3)),
    ("adafactor", 3, {}),
    ("sgd", 2, {}),
    ("adamw_torch", 2, BF16),
    ("galore_adamw", 3, BF16),
]


def run_of(name: str, stage: int, config: dict[str, Any], **more: Any) -> ZeroRun:
    return ZeroRun(name, OPTIMIZERS[name], stage, config=config, real_batches=True, **more)


@pytest.mark.parametrize(("name", "stage", "config"), RUNS)
def test_one_process_goes_on_from_the_engines_checkpoint(
    name: str, stage: int, config: dict[str, Any], two_ranks: RankPool, tmp_path: Path
) -> None:
    run = run_of(name, stage, config)
    saved, _ = two_ranks.run(saved_and_gone_on, run, str(tmp_path / "engine"))
    assert import_(tmp_path / "engine", tmp_path / "ours").optimizer == name
    assert gone_on_alone(run, saved, tmp_path / "ours") == [0.0, 0.0]
    if run.dtype == torch.float32:  # else a model in fp32 stands against one in half precision, with masters
        compared = inspect(tmp_path / "ours", tmp_path / "engine-ours")
        assert compared.is_sound, (compared.problems, compared.differences)


@pytest.mark.parametrize("name", ["adamw_torch", "schedule_free_adamw"])
def test_upstream_goes_on_from_an_engines_masters(name: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """The export of what an engine in half precision saved: weights to use in bf16, and to train in fp32."""
    run = run_of(name, 2, BF16)
    saved, _ = two_ranks.run(saved_and_gone_on, run, str(tmp_path / "engine"))
    export(tmp_path / "engine-ours", tmp_path / "out")
    used, kept = (load_file(tmp_path / "out" / at / "model.safetensors") for at in ("", "training"))
    assert {one.dtype for one in used.values()} == {torch.bfloat16} and {one.dtype for one in kept.values()} == {
        torch.float32
    }
    model: nn.Module = run.make_model()
    model.load_state_dict(kept)
    named = dict(model.named_parameters())
    groups = json.loads((tmp_path / "out" / "export.json").read_text())["param_groups"][name]
    upstream: Any = dist_optim.get_spec(name).load_class()
    optimizer = upstream([{"params": [named[one] for one in own]} for own in groups], lr=0.5)
    optimizer.load_state_dict(torch.load(tmp_path / "out" / "training" / "optimizer.pt", weights_only=True))
    for gradients in saved.gradients:
        for one, parameter in named.items():
            parameter.grad = gradients.get(one)
        optimizer.step()
    assert distance_of(model, run, saved.after) == 0.0


@pytest.mark.parametrize(("stage", "config"), [(2, BF16), (3, BF16), (2, FP16)])
def test_masters_are_found_again(stage: int, config: dict[str, Any], two_ranks: RankPool, tmp_path: Path) -> None:
    """The fp32 weights of a model in half precision; gradients that DeepSpeed keeps in fp32 are given as they are."""
    run = run_of("adamw_torch", stage, config)
    saved, _ = two_ranks.run(saved_and_gone_on, run, str(tmp_path / "engine"))
    done = import_(tmp_path / "engine", tmp_path / "ours", master_weights=True)
    model = run.make_model().to(run.dtype)
    optimizer = dist_optim.build_optimizer(model, run.name, print_audit=False, master_weights=True, **run.options)
    dist_optim.load_checkpoint(tmp_path / "ours", model, optimizer)
    assert all(torch.equal(p.detach().float(), own) for p, own in zip(model.parameters(), saved.before, strict=True))
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    theirs = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "engine"), tag="half")
    for name, parameter in model.named_parameters():
        master = optimizer.state[parameter]["(master)"]
        assert master.dtype == torch.float32 and torch.equal(master, theirs[name].float())
    assert any("loss scale" in note for note in done.notes) == (config is FP16)


def saved_with(run: ZeroRun, directory: str, tag: str, steps: int) -> None:
    engine = zero.engine_of(run)
    zero.train_engine(engine, run, range(steps))
    engine.save_checkpoint(directory, tag=tag)


def test_files_of_two_saves_are_not_put_together(two_ranks: RankPool, tmp_path: Path) -> None:
    run = run_of("adamw_torch", 2, {})
    for tag, steps in (("one", 1), ("two", 2)):
        two_ranks.run(saved_with, run, str(tmp_path), tag, steps)
    (first,) = (tmp_path / "one").glob("*zero_pp_rank_1*optim_states.pt")
    (tmp_path / "two" / first.name).write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="the file of rank 1"):
        import_(tmp_path / "two", tmp_path / "ours")
    (tmp_path / "two" / first.name).unlink()
    with pytest.raises(CheckpointError, match="A file is missing"):
        import_(tmp_path, tmp_path / "ours")  # by its "latest"
    torch.save({"optimizer_state_dict": Tripwire()}, tmp_path / "two" / first.name)
    with pytest.raises(CheckpointError, match="weights_only=True"):
        import_(tmp_path / "two", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_stage_0_holds_the_share_of_rank_0_alone(two_ranks: RankPool, tmp_path: Path) -> None:
    two_ranks.run(saved_with, run_of("galore_adamw", 0, {}), str(tmp_path / "engine"), "half", 1)
    with pytest.raises(UnsupportedError, match="rank 0 alone"):
        import_(tmp_path / "engine", tmp_path / "ours")
