"""Pytest plug-in of `make trainer-suite`: transformers' own Trainer tests, with our Trainer in the place of theirs.

`SUITE=ours` puts it there as `dist_optim.run` does, before a test module imports anything. Tests that ask for an
accelerator run on the CPU, marked `accelerator`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import transformers.testing_utils
from transformers import Trainer  # first: transformers makes its own module anew while it is imported

GONE = ("GlueDataset", "GlueDataTrainingArguments")
"""What test modules import, a few tests of slow models use, and transformers has no longer."""


def on_the_cpu(test: Any) -> Any:
    return pytest.mark.accelerator(test)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "accelerator: asks for an accelerator")


transformers.testing_utils.require_torch_accelerator = on_the_cpu
for name in GONE:
    if name not in dir(sys.modules["transformers"]):
        setattr(sys.modules["transformers"], name, object)
if os.environ["SUITE"] == "ours":
    from dist_optim.run import replace_names

    replace_names()
    assert sys.modules["transformers"].Trainer is not Trainer
