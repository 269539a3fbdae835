"""The environments and the tests of `make compat`: the ends of the ranges that pyproject.toml declares."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent

CHOSEN = {
    "imports": ("test_overrides.py",),
    "optimizers": tuple(
        f"test_parity.py::test_second_life_equals_the_uninterrupted_run[{case} float32]"
        for case in (
            *("adafactor", "adamw_bnb_8bit", "adamw_torch", "apollo_adamw random", "flash_adamw"),
            *("adamw_torch_4bit", "adamw_torch_8bit", "galore_adamw std", "grokadamw", "lomo"),
            *("schedule_free_adamw", "stable_adamw"),
        )
    ),
    "Trainer": (
        "test_trainer_resume.py::test_resumed_training_is_the_uninterrupted_one[galore_adamw-strategies1]",
        "test_trainer_resume.py::test_resumed_training_is_the_uninterrupted_one[schedule_free_adamw-strategies5]",
        "test_trainer_optimizer.py::test_the_mixin_serves_other_trainers",
        "test_trainer_trl.py::test_trls_trainer_takes_every_name_and_resumes",
    ),
    "accelerate": (
        "test_accelerate.py::test_what_is_asked_for_is_what_trains",
        "test_accelerate_state.py::test_a_resumed_run_equals_the_uninterrupted_one[galore_adamw-ddp]",
        "test_accelerate_state.py::test_a_resumed_run_equals_the_uninterrupted_one[galore_adamw-fsdp2]",
    ),
    "DeepSpeed": (
        *(f"test_zero.py::test_equals_one_process[galore_adamw-{stage}]" for stage in (1, 3)),
        *(f"test_zero.py::test_resumes_through_the_engine[galore_adamw-{stage}]" for stage in (0, 2)),
        *(f"test_zero.py::test_resumes_through_the_engine[schedule_free_adamw-{stage}]" for stage in range(4)),
    ),
    "checkpoints": (
        "test_checkpoint.py::test_averaged_weights_are_exported_and_training_goes_on",
        "test_checkpoint.py::test_buffers_schedule_and_own_values_come_back",
    ),
    "command line": ("test_cli.py",),
}
"""What runs in every environment, below `tests/`: one pytest a part."""


@dataclass(frozen=True)
class Row:
    """One environment: a Python, and the packages that are held at their lower bounds."""

    name: str
    python: str
    lowest: tuple[str, ...] = ()
    """Names of packages; "all" for every bound of pyproject.toml."""
    pinned: bool = True
    """Whether everything else is as in constraints.txt; otherwise pip takes the newest that fits."""

    def constraints(self) -> str:
        """The text of a constraints file."""
        bounds = lower_bounds()
        held = bounds if self.lowest == ("all",) else {name: bounds[name] for name in self.lowest}
        others = (ROOT / "constraints.txt").read_text().splitlines() if self.pinned else []
        kept = [line for line in others if not line.startswith("#") and line.split("==")[0] not in held]
        return "".join(f"{line}\n" for line in [*(f"{name}=={version}" for name, version in held.items()), *kept])


ROWS = (
    Row("all lower bounds", "3.10", ("all",), pinned=False),
    Row("constraints.txt, Python 3.12", "3.12"),
    Row("constraints.txt, Python 3.13", "3.13"),
    Row("newest packages", "3.13", pinned=False),
)
"""Python 3.11 with constraints.txt is where all tests run. What is newest is what it was when it was measured."""


def project() -> dict[str, Any]:
    """The `project` table of pyproject.toml."""
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


TOOLS = ("hypothesis", "pytest-xdist", "tensorboard")
"""What draws inputs, divides the tests and reads what was logged is not measured at its lower end."""


AS_PINNED = ("opt-einsum", "prodigyopt", "pytorch-optimizer")
"""Packages whose lowest version is the one that is pinned: all tests run with it, and no row has another."""


def lower_bounds() -> dict[str, str]:
    """Every package that pyproject.toml asks for, with the lowest version that it allows, where it has one."""
    extras = project()["optional-dependencies"]
    asked = [*project()["dependencies"], *(one for extra in extras if extra != "all" for one in extras[extra])]
    bounds: dict[str, str] = {}
    for text in asked:
        name, version = re.fullmatch(r"([\w-]+)(?:>=([\d.]+)(?:,<\d+)?)?", text).groups()  # type: ignore[union-attr]
        if version is None or name in (*TOOLS, *AS_PINNED):
            continue
        assert bounds.setdefault(name, version) == version, f"{name} has two lower bounds"
    return bounds
