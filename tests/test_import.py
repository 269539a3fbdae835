"""``import_``: what upstream wrote goes on under dist_optim to the same bits; what cannot be known is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import all_cases
from end_to_end import batch, make_llama
from parity import (
    Case,
    Gap,
    build_subject,
    gaps_between,
    gradients,
    make_model,
    param_groups,
    reference_history,
    set_learning_rates,
    take_step,
)
from torch import nn
from typer.testing import CliRunner

import dist_optim
from dist_optim.checkpoint import export, import_, load_optimizer
from dist_optim.cli import app
from dist_optim.errors import CheckpointError, DistOptimError, StateDictError, UnknownOptimizerError, UsageError

BREAK = 5
CASES = {case.name: case for case in reversed(all_cases())}
NAMES = (
    "adafactor",
    "adamw_bnb_8bit",
    "adamw_torch",
    "apollo_adamw",
    "flash_adamw",
    "galore_adamw",
    "prodigy",
    "schedule_free_adamw",
    "sgd",
    "soap",
    "stable_adamw",
)


def written_by_upstream(case: Case, directory: Path) -> list[list[str]]:
    """Its state dict and the weights after some steps of the class alone; the names of its groups."""
    model = make_model(case)
    named = dict(model.named_parameters())
    name_of = {id(parameter): name for name, parameter in named.items()}
    reference: Any = case.make_reference(param_groups(case, named))
    if hasattr(reference, "train"):
        reference.train()
    for step in range(BREAK):
        for name, gradient in gradients(case, model, step).items():
            named[name].grad = gradient
        set_learning_rates(reference, case, step)
        reference.step()
    directory.mkdir(exist_ok=True)
    torch.save(reference.state_dict(), directory / "optimizer.pt")
    torch.save(model.state_dict(), directory / "weights.pt")
    return [[name_of[id(one)] for one in group["params"]] for group in reference.param_groups]


def goes_on(case: Case, directory: Path) -> list[Gap]:
    expected = reference_history(case)
    model = make_model(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    optimizer = build_subject(case, model)
    dist_optim.load_checkpoint(directory, model, optimizer, allow_changed=["lr"])  # moved by hand, without a schedule
    held = {name: one.detach() for name, one in model.named_parameters()}
    gaps = gaps_between(expected[BREAK - 1], held, "after loading")
    for step in range(BREAK, case.steps):
        take_step(case, model, optimizer, step)
        gaps += gaps_between(expected[step], held, f"after step {step}")
    return gaps


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_of_upstreams_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    names = written_by_upstream(case, tmp_path / "theirs")
    done = import_(
        tmp_path / "theirs" / "optimizer.pt",
        tmp_path / "ours",
        optim=name,
        optim_args=case.constructor,
        model=tmp_path / "theirs" / "weights.pt",
        names=names,
        steps=BREAK,
    )
    assert (done.optimizer, done.steps) == (name, BREAK)
    assert [str(gap) for gap in goes_on(case, tmp_path / "ours") if not gap.relative <= case.tolerance] == []


@pytest.mark.parametrize("name", ["adafactor", "adamw_torch"])
def test_state_that_is_finer_than_the_weights_is_not_cast(name: str, tmp_path: Path) -> None:
    case = next(one for one in all_cases() if one.name == name and one.dtype == torch.bfloat16)
    names = written_by_upstream(case, tmp_path / "theirs")
    files = {"source": tmp_path / "theirs" / "optimizer.pt", "model": tmp_path / "theirs" / "weights.pt"}
    import_(directory=tmp_path / "ours", optim=name, optim_args=case.constructor, names=names, **files)  # type: ignore[arg-type]
    assert [str(gap) for gap in goes_on(case, tmp_path / "ours") if not gap.relative <= case.tolerance] == []


def test_what_was_exported_is_imported_again(tmp_path: Path) -> None:
    """With the names that lie beside it, and to the same bytes of state."""
    case = CASES["galore_adamw"]
    model = make_model(case)
    optimizer = build_subject(case, model)
    for step in range(BREAK):
        take_step(case, model, optimizer, step)
    dist_optim.save_checkpoint(tmp_path / "run", model, optimizer)
    export(tmp_path / "run", tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    import_(tmp_path / "out" / "optimizer.pt", tmp_path / "again", optim="galore_adamw", model=weights)
    assert all(gap.relative == 0 for gap in goes_on(case, tmp_path / "again"))


def swapped(names: list[list[str]]) -> list[list[str]]:
    return [[own[1], own[0], *own[2:]] for own in names]


def misnamed(case: Case, directory: Path) -> None:
    names = written_by_upstream(case, directory)
    files = {"source": directory / "optimizer.pt", "model": directory / "weights.pt"}
    import_(directory=directory / "ours", optim=case.name, names=swapped(names), **files)  # type: ignore[arg-type]


def test_names_in_another_order_are_seen_by_their_shapes(tmp_path: Path) -> None:
    with pytest.raises(StateDictError, match="in another order"):
        misnamed(CASES["adamw_torch"], tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "ours").exists()


def test_equal_shapes_in_another_order_part_the_runs(tmp_path: Path) -> None:
    """The control: why an order is never guessed."""
    alike = replace(CASES["adamw_torch"], linear=((12, 12),) * 3, extra=((5,), (5,)), frozen=(), without_gradient=())
    names = written_by_upstream(alike, tmp_path)
    content = torch.load(tmp_path / "optimizer.pt")
    content["state"][0], content["state"][1] = content["state"][1], content["state"][0]
    torch.save(content, tmp_path / "optimizer.pt")
    files = {"source": tmp_path / "optimizer.pt", "model": tmp_path / "weights.pt"}
    import_(directory=tmp_path / "ours", optim=alike.name, names=names, **files)  # type: ignore[arg-type]
    assert any(gap.relative > 0 for gap in goes_on(alike, tmp_path / "ours"))


# The Trainer's folders, and accelerate's ------------------------------------------------------------------------------


def trainers_folder(directory: Path, *, is_accelerates: bool = False, decay: float = 0.01) -> tuple[nn.Module, Any]:
    """As transformers' own Trainer writes it, grouped by its own code; the model and optimizer that go on."""
    from safetensors.torch import save_file
    from transformers import Trainer

    model: Any = make_llama()
    decays = set(Trainer.get_decay_parameter_names(None, model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decays) is wanted], "weight_decay": own}
        for wanted, own in ((True, decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        stock_step(model, optimizer, schedule, step)
    directory.mkdir()
    optimizer_file, schedule_file = (
        ("optimizer.bin", "scheduler.bin") if is_accelerates else ("optimizer.pt", "scheduler.pt")
    )
    torch.save(optimizer.state_dict(), directory / optimizer_file)
    torch.save(schedule.state_dict(), directory / schedule_file)
    save_file({name: one.contiguous() for name, one in model.state_dict().items()}, directory / "model.safetensors")
    if is_accelerates:
        (directory / "random_states_0.pkl").write_bytes(pickle.dumps(Tripwire()))
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        (directory / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
        (directory / "training_args.bin").write_bytes(pickle.dumps(Tripwire()))
    return model, (optimizer, schedule)


class Tripwire:
    """Whoever unpickles it raises."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, ("raise SystemExit('code was run')",)


def stock_step(model: Any, optimizer: Any, schedule: Any, step: int) -> None:
    tokens = batch(step)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def resumed(directory: Path, groups: Any = None) -> tuple[nn.Module, Any]:
    """Loaded by load_checkpoint, into the groups that our Trainer makes."""
    from transformers import Trainer

    from dist_optim.integrations.transformers.grouping import groups_for_trainer

    model: Any = make_llama()
    decays = set(Trainer.get_decay_parameter_names(None, model))
    params = groups_for_trainer(model, decays, 0.01, None)
    optimizer = dist_optim.build_optimizer(model, "adamw_torch", params=params, lr=1e-2, print_audit=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    dist_optim.load_checkpoint(directory, model, optimizer, schedule)
    return model, (optimizer, schedule)


@pytest.mark.parametrize("kind", ["trainer", "accelerate"])
def test_a_folder_of_the_stock_trainer_or_accelerate_goes_on(kind: str, tmp_path: Path) -> None:
    model, (optimizer, schedule) = trainers_folder(tmp_path / "theirs", is_accelerates=kind == "accelerate")
    known = make_llama() if kind == "accelerate" else None
    done = import_(tmp_path / "theirs", tmp_path / "ours", optim="adamw_torch", config=known)
    assert done.steps == 3
    ours, (subject, its_schedule) = resumed(tmp_path / "ours")
    for step in range(3, 5):
        stock_step(model, optimizer, schedule, step)
        stock_step(ours, subject, its_schedule, step)
    assert all(torch.equal(one, ours.get_parameter(name)) for name, one in model.named_parameters())
    if kind == "trainer":
        assert {"config.json", "trainer_state.json", "model.safetensors"} <= {
            one.name for one in done.directory.iterdir()
        }


def test_what_cannot_be_known_is_refused(tmp_path: Path) -> None:
    trainers_folder(tmp_path / "theirs", is_accelerates=True)
    with pytest.raises(StateDictError, match="nothing says which parameters"):
        import_(tmp_path / "theirs", tmp_path / "ours", optim="adamw_torch")
    with pytest.raises(UsageError, match="--optim"):
        import_(tmp_path / "theirs", tmp_path / "ours")
    frozen: Any = make_llama()
    frozen.model.norm.weight.requires_grad_(False)
    with pytest.raises(StateDictError, match="other parameters were trained"):
        import_(tmp_path / "theirs", tmp_path / "ours", optim="adamw_torch", config=frozen)
    with pytest.raises(CheckpointError, match="nothing that can be taken over"):
        import_(tmp_path, tmp_path / "ours", optim="adamw_torch")
    assert [one.name for one in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_no_code_is_run(name: str, tmp_path: Path) -> None:
    trainers_folder(tmp_path / "theirs")
    torch.save({"state": {}, "param_groups": [Tripwire()]}, tmp_path / "theirs" / name)
    with pytest.raises(CheckpointError, match="weights_only=True"):
        import_(tmp_path / "theirs", tmp_path / "ours", optim="adamw_torch")
    assert not (tmp_path / "ours").exists()


def test_a_tripwire_is_one() -> None:
    """The control: opened in the usual way, it raises."""
    with pytest.raises(SystemExit, match="code was run"):
        pickle.loads(pickle.dumps(Tripwire()))


@pytest.mark.parametrize(
    "content", [{}, [], {"state": {}, "param_groups": []}, {"state": [], "param_groups": [{"params": [0]}]}, 7]
)
def test_what_is_no_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(StateDictError, match="no optimizer's state dict"):
        import_(tmp_path / "optimizer.pt", tmp_path / "ours", optim="adamw_torch", names=[["a"]])


def test_a_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    names = written_by_upstream(CASES["adafactor"], tmp_path / "theirs")
    files = {"source": tmp_path / "theirs" / "optimizer.pt", "model": tmp_path / "theirs" / "weights.pt"}
    with pytest.raises(DistOptimError):
        import_(directory=tmp_path / "ours", optim="adamw_torch", names=names, **files)  # type: ignore[arg-type]
    assert not (tmp_path / "ours").exists()


def test_the_command_and_an_optimizer_without_weights(tmp_path: Path) -> None:
    model, (optimizer, _) = trainers_folder(tmp_path / "theirs")
    result = CliRunner().invoke(
        app,
        [
            "import",
            str(tmp_path / "theirs" / "optimizer.pt"),
            str(tmp_path / "ours"),
            *("--optim", "adamw_torch", "--config", str(tmp_path / "theirs"), "--steps", "3"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "without weights" in result.output or "no weights" in result.output
    fresh: Any = make_llama()
    from transformers import Trainer

    from dist_optim.integrations.transformers.grouping import groups_for_trainer

    decays = set(Trainer.get_decay_parameter_names(None, fresh))
    params = groups_for_trainer(fresh, decays, 0.01, None)
    ours = dist_optim.build_optimizer(fresh, "adamw_torch", params=params, lr=1e-2, print_audit=False)
    load_optimizer(tmp_path / "ours", ours)
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], ours.state[other]["exp_avg"])
    refused = CliRunner().invoke(app, ["import", str(tmp_path / "theirs"), str(tmp_path / "more")])
    assert refused.exit_code == 2 and "--optim" in refused.output


def test_a_name_that_is_not_registered_is_answered_with_near_ones(tmp_path: Path) -> None:
    torch.save({"state": {}, "param_groups": [{"params": []}]}, tmp_path / "optimizer.pt")
    with pytest.raises(UnknownOptimizerError, match="adamw_torch"):
        import_(tmp_path / "optimizer.pt", tmp_path / "ours", optim="adamw_torhc")
    with pytest.raises(UsageError, match="several optimizers"):
        import_(tmp_path / "optimizer.pt", tmp_path / "ours", optim="muon+adamw_torch")


@pytest.mark.parametrize("value", [None, 7.0], ids=["gone", "a number"])
def test_state_that_one_parameter_lacks_is_refused(value: Any, tmp_path: Path) -> None:
    names = written_by_upstream(CASES["adamw_torch"], tmp_path)
    content = torch.load(tmp_path / "optimizer.pt")
    content["state"][0].update(exp_avg_sq=value) if value else content["state"][0].pop("exp_avg_sq")
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(StateDictError, match="has no 'exp_avg_sq' like the others"):
        import_(
            tmp_path / "optimizer.pt",
            tmp_path / "ours",
            optim="adamw_torch",
            names=names,
            model=tmp_path / "weights.pt",
        )
