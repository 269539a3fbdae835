"""``dist-optim verify``: equal is said where all is equal, and of every defect that is put in, that it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from mesh_doors import make_moe
from test_negative_controls import one_owner_lacks_the_others_gradients, updates_do_not_travel_back
from typer.testing import CliRunner

from dist_optim.cli import app
from dist_optim.stepping.group_values import GroupValues
from dist_optim.stepping.upstream_instance import UpstreamInstance
from dist_optim.testing import RankPool
from dist_optim.testing.verify import Verdict, verification, verify
from dist_optim.testing.verify.job import Job
from dist_optim.testing.verify.on_rank import Outcome, verify_on_rank
from dist_optim.testing.verify.registering import snippet_of
from dist_optim.testing.verify.verification import Report

GALORE = {"lr": 1e-2, "update_proj_gap": 3, "rank": 8, "target_modules": "all-linear"}


class Scaled(torch.optim.Optimizer):
    """A class without a name: each tensor by its own norm."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's has overloads
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad / (1e-8 + parameter.grad.norm()))


class OfNorm(Scaled):
    """Needs the loss."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()


@pytest.mark.parametrize(
    ("strategy", "name", "options"),
    [
        ("ddp", "galore_adamw", GALORE),
        ("fsdp1", "adamw_torch", {"lr": 1e-2}),
        ("fsdp2", "muon", {"lr": 1e-2}),
        ("fsdp2", "galore_adamw_layerwise", GALORE),
        ("fsdp2", "galore_adamw", {**GALORE, "reduce_to_owner": True}),
        ("ddp", "galore_adamw", {**GALORE, "reduce_to_owner": True}),
        ("fsdp2", "lion", {"lr": 1e-3, "master_weights": True, "dtype": "bfloat16"}),
        ("zero2", "galore_adamw", GALORE),
        ("zero3", "lomo", {"lr": 1e-2, "clip_grad_norm": 0.5}),
    ],
)
def test_equal_is_said_of_what_is_equal(strategy: str, name: str, options: dict[str, Any], two_ranks: RankPool) -> None:
    report = verify(name, strategy=strategy, pool=two_ranks, **options)
    assert (report.verdict, report.figure) == (Verdict.EQUAL, 0.0), report.reason
    assert report.as_json()["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("strategy", "name", "options"), [("fsdp2", "galore_adamw", GALORE), ("zero2", "muon", {"lr": 1e-2})]
)
def test_experts_are_verified_as_the_engine_has_them(
    strategy: str, name: str, options: dict[str, Any], two_ranks: RankPool, tmp_path: Path
) -> None:
    """Each a matrix, to the reference as well."""
    model: Any = make_moe()
    model.config.save_pretrained(tmp_path)
    report = verify(name, strategy=strategy, model=str(tmp_path), steps=3, pool=two_ranks, **options)
    assert (report.verdict, report.figure) == (Verdict.EQUAL, 0.0), report.reason


@pytest.mark.parametrize(
    ("name", "options"), [("adafactor", {}), ("adafactor", {"relative_step": True}), ("galore_adamw", {}), ("soap", {})]
)
def test_a_name_alone_is_enough(name: str, options: dict[str, Any], two_ranks: RankPool) -> None:
    report = verify(name, strategy="ddp", steps=2, pool=two_ranks, **options)
    assert report.verdict is Verdict.EQUAL, report.reason


def test_a_class_without_a_name_is_described_and_can_be_made_one(two_ranks: RankPool) -> None:
    report = verify(Scaled, strategy="fsdp2", pool=two_ranks)
    assert report.verdict is Verdict.EQUAL and report.spec is not None
    assert report.as_json()["proof"]["independent"] is True
    registered: list[Any] = []
    with mock.patch("dist_optim.register", registered.append):
        exec(snippet_of(report.spec))
    assert registered[0].load_class() is Scaled and registered[0].traits == report.spec.traits


# Negative controls -------------------------------------------------------------------------------------------------


def rates_are_not_pushed(self: GroupValues, groups: Any, keys: Any) -> None:
    pass


def gradients_are_halved(self: UpstreamInstance, gradients: Any) -> None:
    for index, gradient in gradients.items():
        self.shadows[index].grad = gradient * 0.5


def weights_are_rounded(updated: Any, parameters: Any) -> None:
    for index, tensor in updated.items():
        parameters[index].copy_(tensor.bfloat16())


STEP = "dist_optim.stepping.step"
INSTANCE = "dist_optim.stepping.upstream_instance.UpstreamInstance"
DEFECTS = [
    ("fsdp2", "dist_optim.stepping.at_owner.gather_to_owner", one_owner_lacks_the_others_gradients),
    ("fsdp2", f"{STEP}.scatter_from_owner", updates_do_not_travel_back),
    ("ddp", f"{STEP}.scatter_from_owner", updates_do_not_travel_back),
    ("fsdp1", "dist_optim.stepping.group_values.GroupValues.push", rates_are_not_pushed),
    ("fsdp2", f"{INSTANCE}.give", gradients_are_halved),
    ("ddp", f"{STEP}.write_back", weights_are_rounded),
    ("zero2", f"{STEP}.scatter_from_owner", updates_do_not_travel_back),
]


def with_defect(job: Job, where: str, defect: Callable[..., Any]) -> Outcome:
    with mock.patch(where, defect):
        return verify_on_rank(job)


@pytest.mark.parametrize(("strategy", "where", "defect"), DEFECTS, ids=lambda one: getattr(one, "__name__", one))
def test_every_defect_is_found(strategy: str, where: str, defect: Callable[..., Any], two_ranks: RankPool) -> None:
    job = Job(optimizer="galore_adamw", options=GALORE, strategy=strategy)
    first = two_ranks.run(with_defect, job, where, defect)[0]
    assert not first.refusal and first.differences
    report = Report(job=job, verdict=Verdict.DIFFERENT, differences=first.differences, outcome=first)
    assert report.figure is not None and report.figure > 0 and report.verdict.exit_code == 1


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "strategy", "options", "message"),
    [
        ("no_such", "ddp", {}, "There is no optimizer named 'no_such'"),
        ("sgd", "fsdp3", {}, "There is no strategy 'fsdp3'"),
        ("sgd", "hsdp", {}, "Take 4 ranks"),
        ("sgd", "zero1", {"dtype": "bfloat16"}, "Verify in float32"),
        ("sgd", "ddp", {"momentun": 1}, "momentun"),
        ("sgd", "ddp", {"lr": 0.0}, "No weight moved"),
        ("galore_adamw_layerwise", "fsdp1", {}, "fsdp_version: 2"),
        ("sgd", "ddp", {"model": "/nowhere/config.json"}, "describes no model"),
        (OfNorm, "ddp", {}, "evaluates the loss itself"),
    ],
)
def test_what_cannot_be_verified_is_refused(
    name: Any, strategy: str, options: dict[str, Any], message: str, two_ranks: RankPool
) -> None:
    report = verify(name, strategy=strategy, pool=two_ranks, **options)
    assert report.verdict is Verdict.REFUSED and report.verdict.exit_code == 2 and report.figure is None
    assert message in report.reason


# The command -------------------------------------------------------------------------------------------------------


def test_the_command_says_writes_and_exits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_ranks: RankPool
) -> None:
    monkeypatch.chdir(tmp_path)
    pool = mock.MagicMock()
    pool.__enter__.return_value = two_ranks
    monkeypatch.setattr(verification, "RankPool", lambda *_, **__: pool)
    run = CliRunner().invoke(app, ["verify", "--optim", "test_verify.Scaled", "--strategy", "fsdp2", "--steps", "3"])
    assert run.exit_code == 0, run.output
    assert run.stdout.startswith("equal: Scaled, fsdp2 on 2 ranks (cpu), 3 steps")
    assert "independent: yes" in run.stdout and "dist_optim.register(" in run.stdout
    written = json.loads((tmp_path / "verify.json").read_text())
    assert (written["verdict"], written["largest_difference"], written["strategy"]) == ("equal", "0.0", "fsdp2")
    refused = CliRunner().invoke(app, ["verify", "--optim", "flash_adamw"])
    assert refused.exit_code == 2 and "quantize=False" in refused.stderr
    missing = CliRunner().invoke(app, ["verify", "--optim", "no.such.Class"])
    assert missing.exit_code == 2 and "cannot be imported" in missing.stderr
