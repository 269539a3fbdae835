"""``export``: the unmodified upstream class goes on from it to the same bits; or it is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import all_cases
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
from torch import Tensor, nn
from typer.testing import CliRunner

import dist_optim
from dist_optim.checkpoint import export, save_optimizer
from dist_optim.checkpoint.in_and_out import upstream_state
from dist_optim.checkpoint.in_and_out.safetensors_file import write_safetensors
from dist_optim.checkpoint.in_and_out.upstream_file import state_classes_of
from dist_optim.checkpoint.in_and_out.weights import HeldWeights
from dist_optim.cli import app
from dist_optim.errors import CheckpointError, UnsupportedError, UsageError

BREAK = 5
CASES = {case.name: case for case in reversed(all_cases())}
REFUSED = {
    "lomo": "no upstream optimizer",
    "adalomo": "no upstream optimizer",
    "grokadamw": "upstream itself cannot resume",
}
CASES["adam_mini"] = replace(CASES["adam_mini"], frozen=())
"""Upstream makes a group of each parameter that is trained, and the record does not say which were frozen."""


def saved(case: Case, directory: Path, **options: Any) -> tuple[nn.Module, Any]:
    model = make_model(case)
    optimizer = build_subject(case, model, **options)
    optimizer.train()
    for step in range(BREAK):
        take_step(case, model, optimizer, step)
    dist_optim.save_checkpoint(directory, model, optimizer)
    return model, optimizer


def tensors_in(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = load_file(path)
    return found


def loaded(path: Path, name: str) -> Any:
    """As the export says: with ``weights_only``, and the classes that upstream keeps in its state."""
    specs = [dist_optim.get_spec(part) for part in name.split("+")]
    with torch.serialization.safe_globals([*state_classes_of(specs)]):
        return torch.load(path, weights_only=True)


def upstream_goes_on(case: Case, directory: Path) -> list[Gap]:
    """Load upstream's own class from the export, train to the end, compare with the run that was never interrupted."""
    expected = reference_history(case)
    model = make_model(case)
    model.load_state_dict(tensors_in(directory / "model.safetensors"))
    named = dict(model.named_parameters())
    reference: Any = case.make_reference(param_groups(case, named))
    files = sorted(directory.glob("optimizer*.pt"), reverse=True)
    for one, file in zip(getattr(reference, "optimizers", [reference]), files, strict=True):
        one.load_state_dict(loaded(file, file.stem.partition("-")[2] or case.name))
    if hasattr(reference, "optimizers"):
        reference.param_groups = [group for one in reference.optimizers for group in one.param_groups]
    gaps = gaps_between(expected[BREAK - 1], {n: p.detach() for n, p in named.items()}, "after loading")
    for step in range(BREAK, case.steps):
        for name, gradient in gradients(case, model, step).items():
            named[name].grad = gradient
        set_learning_rates(reference, case, step)
        reference.step()
        gaps += gaps_between(expected[step], {n: p.detach() for n, p in named.items()}, f"after step {step}")
    return gaps


def trained(directory: Path) -> Path:
    """Where the weights lie that the state belongs to."""
    return directory / "training" if (directory / "training").exists() else directory


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_upstream_goes_on_to_the_same_bits(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    with torch.compiler.set_stance("force_eager"):  # torchao compiles a kernel for each shape otherwise
        saved(case, tmp_path / "run")
        done = export(tmp_path / "run", tmp_path / "out", optim_args=case.constructor)
        assert done.steps == BREAK and done.optimizer.split("+")[0] == name
        gaps = upstream_goes_on(case, trained(tmp_path / "out"))
    assert [str(gap) for gap in gaps if not gap.relative <= case.tolerance] == []


BF16 = [case for case in all_cases() if case.dtype == torch.bfloat16 and case.name in ("adamw_torch", "muon", "lion")]


@pytest.mark.parametrize("case", BF16, ids=str)
def test_half_precision_keeps_its_dtypes(case: Case, tmp_path: Path) -> None:
    saved(case, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", optim_args=case.constructor)
    assert all(gap.relative == 0 for gap in upstream_goes_on(case, tmp_path / "out"))


def test_masters_are_what_upstream_goes_on_from(tmp_path: Path) -> None:
    """The weights to use are in half precision, and the ones to train are the fp32 masters."""
    half = replace(CASES["adamw_torch"], dtype=torch.bfloat16)
    model, optimizer = saved(half, tmp_path / "run", master_weights=True)
    export(tmp_path / "run", tmp_path / "out")
    used, kept = (tensors_in(tmp_path / "out" / at / "model.safetensors") for at in ("", "training"))
    assert all(torch.equal(used[name], one) for name, one in model.named_parameters())
    full = make_model(half).float()
    full.load_state_dict(kept)
    assert any(not torch.equal(one.float(), kept[name]) for name, one in used.items())
    reference = torch.optim.AdamW(param_groups(half, dict(full.named_parameters())))
    reference.load_state_dict(loaded(tmp_path / "out" / "training" / "optimizer.pt", "adamw_torch"))
    drawn = gradients(half, model, BREAK)
    for name, one in full.named_parameters():
        one.grad = None if drawn[name] is None else drawn[name].float()  # type: ignore[union-attr]
    for name, own in model.named_parameters():
        own.grad = drawn[name]
    optimizer.step()
    reference.step()
    assert all(
        torch.equal(one.detach(), full.get_parameter(n).detach().bfloat16()) for n, one in model.named_parameters()
    )


def test_averages_are_to_be_used_and_training_weights_lie_apart(tmp_path: Path) -> None:
    case = CASES["schedule_free_adamw"]
    model, optimizer = saved(case, tmp_path / "run")
    done = export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out" / "optimizer.pt").exists() and any("training/" in note for note in done.notes)
    kept = tensors_in(tmp_path / "out" / "training" / "model.safetensors")
    assert all(torch.equal(kept[name], one) for name, one in model.named_parameters())
    optimizer.eval()
    used = tensors_in(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(used[name], one) for name, one in model.named_parameters())


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_upstream_cannot_load_is_left_out_and_said(name: str, tmp_path: Path) -> None:
    run, out, constructor = tmp_path / "run", tmp_path / "out", CASES[name].constructor
    saved(CASES[name], run)
    for source in (run, run / "optimizer"):  # asked for alone, and there alone
        with pytest.raises(UnsupportedError, match=REFUSED[name]) as caught:
            export(source, out, only="optimizer" if source == run else None, optim_args=constructor)
        assert "on the exported weights" in str(caught.value)
        assert sorted(one.name for one in tmp_path.iterdir()) == ["run"]
    done = export(run, out, optim_args=constructor)
    assert done.left_out == str(caught.value) and done.files == ["export.json", "model.safetensors"]
    assert json.loads((out / "export.json").read_text())["left_out"] == done.left_out
    alone = export(run, tmp_path / "alone", only="weights")
    assert (
        not alone.left_out
        and (out / "model.safetensors").read_bytes() == (tmp_path / "alone" / "model.safetensors").read_bytes()
    )
    result = CliRunner().invoke(app, ["export", str(run), str(out)])
    assert result.exit_code == 1 and "Without the optimizer" in result.output
    assert CliRunner().invoke(app, ["export", str(run), str(out), "--only", "weights"]).exit_code == 0


def test_upstreams_lomo_goes_on_from_the_weights_alone(tmp_path: Path) -> None:
    lomo_optim = pytest.importorskip("lomo_optim")
    torch.manual_seed(0)
    ours = nn.Linear(3, 4)
    optimizer = dist_optim.build_optimizer(ours, "lomo", lr=0.1, print_audit=False)
    rows = torch.randn(5, 3)

    def loss_of(layer: nn.Module) -> Tensor:
        loss: Tensor = layer(rows).square().sum()
        return loss

    def step() -> None:
        loss_of(ours).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    dist_optim.save_checkpoint(tmp_path / "run", ours, optimizer)
    export(tmp_path / "run", tmp_path / "out")
    upstreams = nn.Linear(3, 4)
    upstreams.load_state_dict(tensors_in(tmp_path / "out" / "model.safetensors"))
    with mock.patch.object(Tensor, "cuda", lambda tensor: tensor):
        theirs = lomo_optim.Lomo(upstreams, lr=0.1)
    for _ in range(3):
        step()
        theirs.fused_backward(loss_of(upstreams), 0.1)
    assert all(torch.equal(one, other) for one, other in zip(ours.parameters(), upstreams.parameters(), strict=True))


def test_a_schedule_is_not_left_beside_no_optimizer(tmp_path: Path) -> None:
    """transformers would begin both anew without a word."""
    saved(CASES["lomo"], tmp_path / "run")
    (tmp_path / "run" / "scheduler.pt").write_bytes(b"")
    assert "scheduler.pt" not in export(tmp_path / "run", tmp_path / "out").files


original = upstream_state.UpstreamInstance.write_encoded_state


def losing_scalars(self: Any, index: int, state: dict[str, Any]) -> None:
    original(self, index, {key: value + 1 if key == "step" else value for key, value in state.items()})


def test_one_step_more_in_the_state_is_seen(tmp_path: Path) -> None:
    """The control: a count that is off by one parts the runs."""
    case = CASES["adamw_torch"]
    saved(case, tmp_path / "run")
    with mock.patch.object(upstream_state.UpstreamInstance, "write_encoded_state", losing_scalars):
        export(tmp_path / "run", tmp_path / "out")
    assert any(gap.relative > 0 for gap in upstream_goes_on(case, tmp_path / "out"))


class Trailing(torch.optim.Optimizer):
    """A class that nobody registered; its count is an attribute, which its state dict leaves out."""

    def __init__(self, params: Any, lr: float = 1e-2, counts: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        self.counts, self.taken = counts, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.taken += self.counts
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    trail = self.state[one].setdefault("trail", torch.zeros_like(one))
                    one.sub_(trail.lerp_(one.grad, 0.5), alpha=group["lr"])


@pytest.fixture
def small() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    yield nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def stepped(model: nn.Module, optimizer: Any) -> None:
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_class_without_a_name_is_exported_by_its_class(small: nn.Module, tmp_path: Path) -> None:
    optimizer = dist_optim.build_optimizer(small, Trailing, print_audit=False)
    stepped(small, optimizer)
    dist_optim.save_checkpoint(tmp_path / "run", small, optimizer)
    with pytest.raises(UsageError, match="--optim package.module:TheClass"):
        export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "run", tmp_path / "out", optimizer=Trailing)
    state = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)["state"]
    for number, one in enumerate(small.parameters()):
        assert torch.equal(state[number]["trail"], optimizer.state[one]["trail"])


def test_what_a_class_keeps_in_attributes_is_refused(small: nn.Module, tmp_path: Path) -> None:
    optimizer = dist_optim.build_optimizer(small, Trailing, counts=True, print_audit=False)
    stepped(small, optimizer)
    dist_optim.save_checkpoint(tmp_path / "run", small, optimizer)
    given: dict[str, Any] = {"optimizer": Trailing, "optim_args": {"counts": True}}
    with pytest.raises(UnsupportedError, match="in attributes that its own"):
        export(tmp_path / "run", tmp_path / "out", only="optimizer", **given)
    assert "in attributes that its own" in export(tmp_path / "run", tmp_path / "out", **given).left_out


def test_a_folder_of_an_optimizer_alone(small: nn.Module, tmp_path: Path) -> None:
    optimizer = dist_optim.build_optimizer(small, "adamw_torch", lr=0.1, print_audit=False)
    stepped(small, optimizer)
    save_optimizer(tmp_path / "optimizer", optimizer)
    assert export(tmp_path / "optimizer", tmp_path / "out").files == ["export.json", "optimizer.pt"]
    with pytest.raises(UsageError, match="without weights"):
        export(tmp_path / "optimizer", tmp_path / "more", only="weights")


def test_weights_in_another_dtype_are_not_those_to_train(small: nn.Module, tmp_path: Path) -> None:
    optimizer = dist_optim.build_optimizer(small, "adamw_torch", lr=0.1, print_audit=False)
    stepped(small, optimizer)
    dist_optim.save_checkpoint(tmp_path / "run", small, optimizer)
    export(tmp_path / "run", tmp_path / "out", dtype=torch.bfloat16)
    used, kept = (tensors_in(tmp_path / "out" / at / "model.safetensors") for at in ("", "training"))
    assert used["0.weight"].dtype == torch.bfloat16 and used["1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(one, kept[name]) for name, one in small.state_dict().items())
    assert not (tmp_path / "out" / "optimizer.pt").exists()


def test_configuration_and_tokenizer_come_along(small: nn.Module, tmp_path: Path) -> None:
    optimizer = dist_optim.build_optimizer(small, "adamw_torch", lr=0.1, print_audit=False)
    stepped(small, optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    dist_optim.save_checkpoint(tmp_path / "run", small, optimizer, schedule)
    (tmp_path / "config").mkdir()
    for name in ("config.json", "tokenizer.json", "vocab.txt", "optimizer.pt"):
        (tmp_path / "config" / name).write_text("{}")
    files = export(tmp_path / "run", tmp_path / "out", config=tmp_path / "config").files
    listed = [
        "config.json",
        "export.json",
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "tokenizer.json",
        "vocab.txt",
    ]
    assert files == listed and (tmp_path / "out" / "optimizer.pt").read_bytes() != b"{}"
    with pytest.raises(UsageError, match="no folder"):
        export(tmp_path / "run", tmp_path / "more", config=tmp_path / "nowhere")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("part", ["model", "optimizer/tensors"])
def test_a_damaged_checkpoint_is_not_exported(part: str, small: nn.Module, tmp_path: Path) -> None:
    optimizer = dist_optim.build_optimizer(small, "adamw_torch", lr=0.1, print_audit=False)
    stepped(small, optimizer)
    dist_optim.save_checkpoint(tmp_path / "run", small, optimizer)
    (file,) = (tmp_path / "run" / part).glob("*.distcp")
    first: Any = next(small.parameters())
    held = first if part == "model" else optimizer.state[first]["exp_avg"]
    content = bytearray(file.read_bytes())
    content[content.index(held.detach().numpy().tobytes())] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(small: nn.Module, tmp_path: Path) -> None:
    optimizer = dist_optim.build_optimizer(small, "adamw_torch", lr=0.1, print_audit=False)
    stepped(small, optimizer)
    dist_optim.save_checkpoint(tmp_path / "run", small, optimizer)
    result = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["directory"] == str(tmp_path / "run-export") and told["steps"] == 1
    fresh = torch.optim.AdamW(small.parameters(), lr=0.5)
    file = tmp_path / "run-export" / "optimizer.pt"
    exec(
        told["loading"]["optimizer.pt"].replace("'optimizer.pt'", "file"),
        globals() | {"optimizer": fresh, "file": file},
    )
    assert fresh.param_groups[0]["lr"] == 0.1 and int(fresh.state[next(small.parameters())]["step"]) == 1
    assert json.loads((tmp_path / "run-export" / "export.json").read_text())["param_groups"] == {
        "adamw_torch": [[name for name, _ in small.named_parameters()]]
    }
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "run" / "model")])
    assert refused.exit_code == 2 and "no optimizer of dist_optim" in refused.output
    inside = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "run" / "model")])
    assert inside.exit_code == 2 and "in the checkpoint itself" in inside.output


def test_galores_objects_are_named_in_how_it_is_loaded(tmp_path: Path) -> None:
    saved(CASES["galore_adamw"], tmp_path / "run")
    done = export(tmp_path / "run", tmp_path / "out")
    assert "GaLoreProjector" in done.loading["optimizer.pt"]
    with pytest.raises(Exception, match="GaLoreProjector"):
        torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)


def test_weights_that_fsdp_saved_in_shards_are_joined(small: nn.Module, tmp_path: Path) -> None:
    """accelerate's folder, as the Trainer leaves it under FSDP with SHARDED_STATE_DICT."""
    optimizer = dist_optim.build_optimizer(small, "adamw_torch", lr=0.1, print_audit=False)
    stepped(small, optimizer)
    save_optimizer(tmp_path / "run" / "optimizer", optimizer)
    dcp.save({"model": small.state_dict()}, checkpoint_id=tmp_path / "run" / "pytorch_model_fsdp_0", no_dist=True)
    assert export(tmp_path / "run", tmp_path / "out").files == ["export.json", "model.safetensors", "optimizer.pt"]
    found = tensors_in(tmp_path / "out" / "model.safetensors")
    assert found.keys() == small.state_dict().keys()
    assert all(torch.equal(found[name], one) for name, one in small.state_dict().items())


def test_the_file_is_one_of_safetensors(tmp_path: Path) -> None:
    """Every tensor begins at a multiple of its element's size, as readers that map the file need."""
    tensors = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "matrix": torch.randn(5, 3).t(),
        "none": torch.empty(0, 4),
        "one": torch.tensor(2.5, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "switch": torch.tensor([True, False]),
    }
    write_safetensors(tmp_path / "file.safetensors", HeldWeights(tensors))
    found = tensors_in(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in tensors.items())
    content = (tmp_path / "file.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert all(header[name]["data_offsets"][0] % one.element_size() == 0 for name, one in tensors.items())
    with pytest.raises(UsageError, match="safetensors does not know"):
        write_safetensors(tmp_path / "more", HeldWeights({"wave": torch.zeros(2, dtype=torch.complex64)}))
