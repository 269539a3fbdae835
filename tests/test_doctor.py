"""``dist-optim doctor``: every rule finds what it is for; after its patch the configuration is without, and loads."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import doctor_page
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from trainers import fresh_accelerate
from typer.testing import CliRunner

from dist_optim import overrides
from dist_optim.cli import app
from dist_optim.doctor import Subject, examine, fixed
from dist_optim.doctor.finding import Change, applied
from dist_optim.doctor.machine import machine
from dist_optim.doctor.reading import read_subject
from dist_optim.doctor.rules import RULES
from dist_optim.doctor.rules.models import LLAMA
from dist_optim.doctor.subject import Environment
from dist_optim.doctor.writing import patch_of, write
from dist_optim.integrations.deepspeed.limits import LIMITS
from dist_optim.integrations.transformers import TrainingArguments
from dist_optim.integrations.transformers.schedule_arguments import any_schedule

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_EXAMPLE = {"optimizer-refused", "optim-args-unreadable", "parts-missing"}
"""No name is refused now, what is installed has all parts, and what cannot be read has no nearest configuration."""
WITHOUT_PATCH = {"local-disk", "build-refused"}
"""Of which nobody can say what was meant."""
SHIPPED = sorted(file for file in (ROOT / "configs").rglob("*.*") if file.suffix in (".yaml", ".json"))
SHOWN = [rule for rule in RULES if rule.example]


def codes(subject: Subject) -> list[str]:
    return [one.code for one in examine(subject)]


def load(subject: Subject, folder: Path) -> None:
    """Each part by whoever will read it."""
    if subject.accelerate is not None:
        file = folder / "accelerate.yaml"
        file.write_text(yaml.safe_dump(subject.accelerate))
        kind = ClusterConfig.from_yaml_file(yaml_file=str(file)).distributed_type
        assert getattr(kind, "value", kind) == subject.accelerate["distributed_type"]
    if subject.deepspeed is not None:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        zero = subject.deepspeed.get("zero_optimization", {})
        DeepSpeedZeroConfig(**zero)
    if subject.arguments:
        with fresh_accelerate():
            given = {key: value for key, value in subject.arguments.items() if not key.startswith("lr_scheduler")}
            TrainingArguments(**{**given, "output_dir": str(folder), "use_cpu": True})
        with any_schedule(subject.namespace()):
            pass


@pytest.mark.parametrize("rule", SHOWN, ids=lambda rule: rule.code)
def test_a_rule_finds_its_example_and_the_patch_serves(rule: Any, tmp_path: Path) -> None:
    subject = Subject.of(**copy.deepcopy(dict(rule.example)))
    found = [one for one in rule.find(subject) if one.code == rule.code]
    assert found, codes(subject)
    assert len(found[0].reason) > 40
    if not found[0].changes:
        assert found[0].command or rule.code in WITHOUT_PATCH or not found[0].is_error
        return
    after = applied(subject, found[0].changes)
    assert rule.code not in codes(after)
    mended, _ = fixed(subject)
    assert not [one for one in examine(mended) if one.changes], "the nearest configuration has nothing left to change"
    load(mended, tmp_path)


def test_every_rule_has_an_example_and_a_code_of_its_own() -> None:
    assert len({rule.code for rule in RULES}) == len(RULES)
    assert {rule.code for rule in RULES if not rule.example} == WITHOUT_EXAMPLE


def test_every_limit_of_deepspeed_that_a_file_can_ask_for_is_a_rule() -> None:
    of_code_alone = {"experts", "accumulation"}  # of the model, and of a keyword of the engine
    assert {f"deepspeed-{one.code}" for one in LIMITS if one.code not in of_code_alone} <= {rule.code for rule in RULES}


def test_control_a_patch_that_changes_nothing_is_seen() -> None:
    rule = next(one for one in RULES if one.code == "deepspeed-zenflow")
    subject = Subject.of(**copy.deepcopy(dict(rule.example)))
    assert rule.code in codes(applied(subject, [Change("deepspeed", ("zero_optimization", "no_such"), 1)]))


# What is right is left alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_nothing_is_wrong_with_what_we_ship(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    subject = replace(read_subject([file], []), environment=Environment(sees_gpu=True, has_nccl=True))
    assert codes(subject) == []


def test_a_sound_job_has_nothing_wrong_with_it() -> None:
    sound = {"output_dir": "out", "optim": "galore_adamw", "optim_target_modules": ["attn"], "learning_rate": 1e-3}
    assert codes(Subject.of(arguments=sound, model=LLAMA)) == []


def test_this_machine_is_read() -> None:
    here = machine(".")
    assert here.versions["torch"] and asdict(here)["output_disk"]


def test_parts_that_a_version_lacks_are_said_before_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_optim.overrides.differences", lambda rows: ["Trainer._train_batch_size is missing"])
    overrides.check.cache_clear()
    subject = Subject.of(arguments={"optim": "sgd"}, environment={"versions": {"transformers": "5.3.0"}})
    found = [one for one in examine(subject) if one.code == "parts-missing"]
    overrides.check.cache_clear()
    assert found and "_train_batch_size is missing" in found[0].reason and found[0].command.startswith("pip install")


def test_optim_args_that_cannot_be_read_are_said() -> None:
    assert codes(Subject.of(arguments={"optim": "sgd", "optim_args": "{lr"})) == ["optim-args-unreadable"]


def test_heads_of_adam_mini_are_those_of_the_model() -> None:
    model = {**LLAMA, "hidden_size": 44, "num_attention_heads": 11, "num_key_value_heads": 11}
    mended, found = fixed(Subject.of(arguments={"optim": "adam_mini"}, model=model))
    assert [one.code for one in found] == ["tensors-refused"]
    assert mended.arguments["optim_args"] == {"num_embeds": 44, "num_heads": 11}


# Together ----------------------------------------------------------------------------------------------------------


def test_several_things_are_mended_one_after_the_other() -> None:
    subject = Subject.of(
        arguments={"output_dir": "out", "optim": "galore_adamw_layerwize", "gradient_accumulation_steps": 4},
        accelerate={
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "FSDP",
            "num_processes": 8,
            "fsdp_config": {"fsdp_version": 1, "fsdp_use_orig_params": False, "fsdp_offload_params": True},
        },
    )
    mended, found = fixed(subject)
    assert not examine(mended)
    assert mended.arguments["optim"] == "galore_adamw" and mended.arguments["optim_target_modules"] == ["all-linear"]
    assert mended.accelerate is not None and mended.accelerate["fsdp_config"]["fsdp_use_orig_params"] is True
    expected = {"optimizer-unknown", "target-modules", "fsdp1-original-parameters", "fsdp1-offload"}
    assert expected <= {one.code for one in found}
    assert subject.arguments["optim"] == "galore_adamw_layerwize", "what was given is left as it is"


def test_what_accelerates_own_file_says_of_deepspeed_is_mended_there() -> None:
    own = {"zero_stage": 3, "offload_param_device": "cpu", "offload_optimizer_device": "nvme"}
    subject = Subject.of(accelerate={"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": own})
    mended, found = fixed(subject)
    assert {one.code for one in found} == {"deepspeed-offload-param", "deepspeed-offload-nvme"}
    assert mended.accelerate is not None and mended.accelerate["deepspeed_config"] == {
        "zero_stage": 3,
        "offload_param_device": "none",
        "offload_optimizer_device": "cpu",
    }


# Files -------------------------------------------------------------------------------------------------------------

FSDP1 = """\
# Mine.
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_processes: 2  # two GPUs
fsdp_config:
  fsdp_version: 1
  fsdp_use_orig_params: false  # as it was
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
"""


def test_a_file_keeps_its_comments_and_all_other_lines(tmp_path: Path) -> None:
    file = tmp_path / "fsdp1.yaml"
    file.write_text(FSDP1)
    before = read_subject([file], [])
    after, _ = fixed(before)
    assert "-  fsdp_use_orig_params: false  # as it was" in patch_of(before, after)
    assert file.read_text() == FSDP1 and write(before, after) == [file]
    assert file.read_text() == FSDP1.replace("params: false", "params: true")
    assert [one.name for one in tmp_path.iterdir()] == ["fsdp1.yaml"]


def test_the_command_says_what_is_wrong_and_mends_it(tmp_path: Path) -> None:
    launcher, engine = tmp_path / "launch.yaml", tmp_path / "engine.json"
    launcher.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "num_processes": 2}))
    engine.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    words = ["doctor", str(launcher), str(engine), "--", "--optim", "lion", "--output_dir", str(tmp_path)]
    looked = CliRunner().invoke(app, words)
    assert looked.exit_code == 1, looked.output
    assert "error deepspeed-offload-param: offload_param is not tested" in looked.stdout
    assert "leave out DeepSpeed: zero_optimization.offload_param" in looked.stdout and "With --fix:" in looked.stdout
    mended = CliRunner().invoke(app, [words[0], "--fix", *words[1:]])
    assert mended.exit_code == 0, mended.output
    assert json.loads(engine.read_text()) == {"zero_optimization": {"stage": 3}}
    told = CliRunner().invoke(app, ["doctor", "--json", str(engine), "--", "--optim", "no_such_at_all_xyz"])
    assert [one["code"] for one in json.loads(told.stdout)["findings"]] == ["optimizer-unknown"]
    missing = CliRunner().invoke(app, ["doctor", str(tmp_path / "nothing.yaml")])
    assert missing.exit_code == 2 and "cannot be read" in missing.stderr


def test_flags_of_no_file_are_shown_as_they_should_be() -> None:
    before = read_subject([], ["--optim", "schedule_free_adamw", "--optim_args", "warmup_steps=0.1, betas=(0.9, 0.99)"])
    after, _ = fixed(before)
    assert '+ --optim schedule_free_adamw --optim_args "betas=(0.9, 0.99)"' in patch_of(before, after)


def test_two_files_of_one_kind_are_refused(tmp_path: Path) -> None:
    for name in ("one.yaml", "two.yaml"):
        (tmp_path / name).write_text(FSDP1)
    refused = CliRunner().invoke(app, ["doctor", str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")])
    assert refused.exit_code == 2 and "are both files of accelerate's" in refused.stderr


# The page ----------------------------------------------------------------------------------------------------------


def test_the_page_has_every_code_and_what_it_says() -> None:
    page = doctor_page.PAGE.read_text()
    assert doctor_page.written(page) == page, "python tests/doctor_page.py"
    assert all(f"`{rule.code}`" in page for rule in RULES)
