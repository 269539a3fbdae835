"""The layerwise names: listed with all that is known of them, and refused until they can be right."""

from __future__ import annotations

import subprocess
import sys

import pytest
from torch import nn

import dist_optim
from dist_optim import Trait
from dist_optim.errors import UnsupportedError
from dist_optim.testing import RankPool

INSTEAD = {
    "galore_adamw_layerwise": "galore_adamw",
    "galore_adafactor_layerwise": "galore_adafactor",
    "galore_adamw_8bit_layerwise": "galore_adamw_8bit",
    "apollo_adamw_layerwise": "apollo_adamw",
}


@pytest.mark.parametrize("name", INSTEAD)
def test_building_is_refused_and_names_what_to_use(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{name}: .* Use {INSTEAD[name]}, "):
        dist_optim.build_optimizer(nn.Linear(4, 4), name, lr=1e-2)
    assert not dist_optim.get_spec(INSTEAD[name]).refusal


def every_rank_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="galore_adamw_layerwise"):
        dist_optim.build_optimizer(nn.Linear(4, 4), "galore_adamw_layerwise", lr=1e-2)


def test_all_ranks_are_refused_together(two_ranks: RankPool) -> None:
    two_ranks.run(every_rank_is_refused)


@pytest.mark.parametrize("name", INSTEAD)
def test_names_are_fully_described(name: str) -> None:
    spec = dist_optim.get_spec(name)
    assert Trait.FUSED_BACKWARD in spec.traits
    assert spec.paper.startswith("https://arxiv.org/abs/") and spec.licence and spec.state_bytes and spec.summary
    assert {"lr", "weight_decay"} <= {record.name for record in spec.records()}
    assert spec.records() == dist_optim.get_spec(INSTEAD[name]).records()


def test_registering_imports_no_upstream_package() -> None:
    check = (
        "import sys, dist_optim; dist_optim.names(); "
        "packages = {module.partition('.')[0] for module in sys.modules}; "
        "print(sorted(packages & {'lomo_optim', 'galore_torch', 'apollo_torch', 'bitsandbytes', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "[]"
