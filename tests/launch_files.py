"""The launchers' files of configuration, and what a launcher makes of one."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

__all__ = ["CONFIGS", "REPOSITORY", "launch_environment"]

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIGS = REPOSITORY / "configs" / "accelerate"


def launch_environment(config: Path) -> dict[str, str]:
    """What ``accelerate launch --config_file`` gives to each rank, beyond what this process has."""
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if not arguments.use_deepspeed:
        return dict(prepare_multi_gpu_env(arguments).items() - os.environ.items())
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return dict(prepare_deepspeed_cmd_env(arguments)[1].items() - os.environ.items())
