"""The schedules of `launch/train.py`: how their options are read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import fresh_accelerate

from dist_optim.errors import DistOptimError
from dist_optim.integrations.transformers.schedule_arguments import read_schedule_options
from dist_optim.integrations.transformers.schedules import scheduler_for_trainer
from train_arguments import TrainArguments, make_arguments, read_arguments


@pytest.mark.parametrize(
    "text", ["patience=2, min_lr=1e-6", '{"patience": 2, "min_lr": 1e-6}', "{'patience': 2, 'min_lr': 1e-06}"]
)
def test_options_are_read_as_pairs_as_json_and_from_a_file(text: str) -> None:
    assert read_schedule_options(text) == {"patience": 2, "min_lr": 1e-6}


def test_a_mapping_of_an_arguments_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "output_dir: out\nlr_scheduler_type: greedy\nlr_scheduler_kwargs:\n  patience: 2\n  mode: min\n"
    )
    with fresh_accelerate():
        _, _, arguments = make_arguments(read_arguments([str(tmp_path / "run.yaml")]))
    assert arguments.lr_scheduler_kwargs == {"patience": 2, "mode": "min"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_scheduler_kwargs": "patince=2"}, "Did you mean patience"),
        ({"lr_scheduler_kwargs": "{patience: 2"}, "cannot be read"),
        ({"lr_scheduler_kwargs": "patience"}, "key=value"),
        ({"lr_scheduler_type": "cosin"}, "Did you mean cosine"),
        ({"eval_steps": 100}, "Set eval_steps"),
    ],
)
def test_what_could_not_decide_is_refused(settings: dict[str, Any], said: str) -> None:
    with fresh_accelerate(), pytest.raises(DistOptimError, match=said):
        settings = {"lr_scheduler_type": "greedy", "eval_steps": 10, **settings}
        made = TrainArguments(output_dir="out", **settings)
        scheduler_for_trainer(made, torch.optim.SGD([torch.zeros(1)], lr=0.1), 50)


def test_a_class_of_torch_is_a_schedule() -> None:
    with fresh_accelerate():
        made = TrainArguments(output_dir="out", lr_scheduler_type="StepLR", lr_scheduler_kwargs="step_size=3")
    assert (made.lr_scheduler_type, made.lr_scheduler_kwargs) == ("StepLR", {"step_size": 3})
