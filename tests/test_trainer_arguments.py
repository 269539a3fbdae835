"""`TrainingArguments` with every registered name, and what transformers' arguments mean to each optimizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import fresh_accelerate
from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

import dist_optim
from dist_optim.errors import HyperparameterError, UnknownOptimizerError
from dist_optim.integrations.transformers import TrainingArguments
from dist_optim.integrations.transformers.arguments import values_for
from dist_optim.integrations.transformers.deferred import DeferredOptimizer
from dist_optim.integrations.transformers.names import registered_name


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    with fresh_accelerate():
        yield


def arguments(tmp_path: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **settings)


def values(tmp_path: Path, optim: str, **settings: Any) -> dict[str, Any]:
    name = registered_name(optim)
    assert name is not None
    return values_for(dist_optim.get_spec(name), arguments(tmp_path, optim=optim, **settings))


def test_every_registered_name_is_taken(tmp_path: Path) -> None:
    for name in dist_optim.names():
        taken = arguments(tmp_path, optim=name)
        assert taken.optim == name and registered_name(taken.optim) == name
        assert json.loads(taken.to_json_string())["optim"] == name


def test_transformers_own_names_stay_members_of_its_enumeration(tmp_path: Path) -> None:
    for member in OptimizerNames:
        assert arguments(tmp_path, optim=member.value).optim is member
    assert registered_name("adamw_8bit") == "adamw_bnb_8bit"
    assert registered_name("ademamix") is None


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownOptimizerError, match="galore_adamw"):
        arguments(tmp_path, optim="galor_adamw")


@pytest.mark.parametrize(
    "given",
    ["rank=8, scale=0.5, proj_type=std", '{"rank": 8, "scale": 0.5, "proj_type": "std"}'],
)
def test_the_command_line_takes_names_strings_and_json(given: str, tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--optim", "apollo_mini", "--use_cpu", "--optim_args", given]
    line += ["--optim_target_modules", "attn", "mlp"]
    (parsed,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)
    wanted = {"lr": 5e-5, "rank": 8, "scale": 0.5, "proj_type": "std"}
    assert values_for(dist_optim.get_spec("apollo_mini"), parsed) == wanted
    assert parsed.optim_target_modules == ["attn", "mlp"]


def test_an_argument_file_takes_a_dict(tmp_path: Path) -> None:
    file = tmp_path / "arguments.json"
    content = {"output_dir": str(tmp_path), "use_cpu": True, "optim": "flash_adamw", "optim_args": {"fused": False}}
    file.write_text(json.dumps(content))
    (parsed,) = HfArgumentParser(TrainingArguments).parse_json_file(str(file))
    assert parsed.optim == "flash_adamw" and values_for(dist_optim.get_spec("flash_adamw"), parsed)["fused"] is False


def test_set_optimizer_takes_every_name(tmp_path: Path) -> None:
    changed = arguments(tmp_path).set_optimizer("flash_lion", learning_rate=1e-3, args={"quantize": False})
    assert (changed.optim, changed.learning_rate, changed.optim_args) == ("flash_lion", 1e-3, {"quantize": False})
    assert arguments(tmp_path).set_optimizer("sgd").optim is OptimizerNames.SGD
    with pytest.raises(UnknownOptimizerError):
        arguments(tmp_path).set_optimizer("flash_loin")


@pytest.mark.parametrize(
    ("optim", "settings", "wanted"),
    [
        ("galore_adamw", {"weight_decay": 0.1, "adam_beta1": 0.8}, {"weight_decay": 0.1, "betas": (0.8, 0.999)}),
        ("galore_adamw", {"adam_epsilon": 1e-7}, {"eps": 1e-7}),
        ("lomo", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
        ("stable_adamw", {"optim_args": "decouple_lr=False"}, {"decouple_lr": False}),
        ("adamw_torch_8bit", {"optim_args": "block_size=128"}, {"block_size": 128}),
        ("sgd", {"optim_args": "momentum=0.9, weight_decay=0.1"}, {"momentum": 0.9, "weight_decay": 0.1}),
        ("adamw_torch", {"optim_args": "lr=0.5, betas=(0.8, 0.9)"}, {"lr": 0.5, "betas": (0.8, 0.9)}),
        ("adamw_torch", {"optim_args": '{"betas": [0.8, 0.9]}'}, {"betas": [0.8, 0.9]}),
        ("schedule_free_adamw", {"warmup_steps": 0.25}, {"warmup_steps": 0.25}),
    ],
)  # fmt: skip
def test_what_transformers_drops_is_passed_on(
    optim: str, settings: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    assert values(tmp_path, optim, **settings) == {"lr": 5e-5, **wanted}


@pytest.mark.parametrize(
    ("optim", "settings", "message"),
    [
        ("sgd", {"adam_beta2": 0.95}, "sgd has no 'betas'"),
        ("adafactor", {"adam_epsilon": 1e-6}, "eps=.* in optim_args"),
        ("sgd", {"learning_rate": 0.1, "optim_args": "lr=0.2"}, "learning_rate is 0.1 and lr=0.2"),
        ("sgd", {"weight_decay": 0.1, "optim_args": {"weight_decay": 0.2}}, "Keep one of the two"),
        ("sgd", {"optim_args": "momentum"}, "Write key=value pairs"),
        ("sgd", {"optim_args": "{momentum: 1"}, "starts as JSON"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(optim: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(HyperparameterError, match=message):
        values(tmp_path, optim, **settings)


@pytest.mark.parametrize(("warmup", "steps"), [(0.25, 3), (2.0, 2), (0.0, 0)])
def test_a_share_of_warm_up_becomes_steps(warmup: float, steps: int) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    deferred = DeferredOptimizer(parameters, "schedule_free_adamw", lr=0.1, warmup_steps=warmup)
    assert deferred.settled(num_training_steps=10)["warmup_steps"] == steps
