"""Tensor parallelism, alone and with FSDP2 over it, through every door: as close to one process as rounding comes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import ParallelismConfig
from accelerated import started_by_accelerate
from mesh_doors import (
    DOORS,
    EXPERTS,
    OPTIONS,
    distances,
    make_llama,
    make_moe,
    resumed_through_accelerate,
    tensor_parallel,
)
from test_end_to_end import FACTOR
from trainers import Blocks, Job, arguments_of, fresh_accelerate

from dist_optim.errors import UnsupportedError
from dist_optim.integrations import cpu_rehearsal
from dist_optim.integrations.accelerate import prepare
from dist_optim.integrations.accelerate.tensor_parallel import left_as_it_is
from dist_optim.integrations.transformers import Trainer
from dist_optim.testing import RankPool

LLAMA = [door for door in DOORS if door != EXPERTS]


@pytest.mark.parametrize(
    ("make", "doors", "num_ranks"),
    [(make_llama, LLAMA[1:], 2), (make_llama, LLAMA, 4), (make_moe, [EXPERTS], 4)],
    ids=["tensor parallelism alone", "FSDP2 over it", "experts"],
)
def test_a_small_model_on_a_mesh_stays_within_the_noise_floor(
    make: Callable[[], Any], doors: list[str], num_ranks: int, two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    floor, found = {2: two_ranks, 4: four_ranks}[num_ranks].run(distances, "galore_adamw", doors, str(tmp_path))[0]
    assert 0 < floor < 3e-2, "a floor that is no rounding noise would hide anything"
    assert not {door: far for door, far in found.items() if not far <= FACTOR * floor}, (floor, found)


def test_a_state_of_accelerate_goes_on_on_a_mesh(four_ranks: RankPool, tmp_path: Path) -> None:
    assert four_ranks.run(resumed_through_accelerate, "galore_adamw", str(tmp_path / "state")) == [[]] * 4


def refusal(sizes: dict[str, int], is_parallel: bool, settings: dict[str, Any] | None) -> str:
    with started_by_accelerate("ddp" if settings is None else "fsdp2") as accelerator:
        if settings is None:
            cpu_rehearsal.bring_mesh(accelerator, ParallelismConfig(**sizes))
        else:
            cpu_rehearsal.turn_fsdp_on(accelerator, parallelism_config=ParallelismConfig(**sizes))
        for name, value in (settings or {}).items():
            setattr(accelerator.state.fsdp_plugin, name, value)
        model = make_llama()
        if is_parallel:
            model = tensor_parallel(model, accelerator.torch_device_mesh["tp"])
        with pytest.raises(UnsupportedError) as caught:
            prepare(accelerator, model, "adamw_torch", print_audit=False, **OPTIONS["adamw_torch"])
        return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "is_parallel", "settings", "message"),
    [
        ({"dp_shard_size": 2, "tp_size": 2}, False, {}, "tp_size=2, and the model is not .*parallelize_module"),
        ({"dp_shard_size": 2, "tp_size": 2}, True, {"cpu_ram_efficient_loading": True}, "efficient_loading: false"),
        ({"dp_shard_size": 2, "cp_size": 2}, False, {}, "cp_size=2.*dp_shard_size and tp_size alone"),
        ({"tp_size": 4}, False, None, "tp_size=4, and the model is not .*parallelize_module.*bring_mesh"),
        ({"dp_shard_size": 2, "tp_size": 2}, True, None, "dp_shard_size=2, and FSDP is not on.*fsdp_version: 2"),
        ({"dp_shard_size": 4}, False, None, "dp_shard_size=4, and FSDP is not on"),
    ],
)
def test_what_accelerate_cannot_do_with_a_mesh_is_refused(
    sizes: dict[str, int], is_parallel: bool, settings: dict[str, Any], message: str, four_ranks: RankPool
) -> None:
    for text in four_ranks.run(refusal, sizes, is_parallel, settings):
        assert re.search(message, text), text


def refusal_of_the_trainer(sizes: dict[str, int], folder: str) -> str:
    with fresh_accelerate():
        settings = arguments_of(Job("adamw_torch"), "ddp", folder, parallelism_config=ParallelismConfig(**sizes))
        with pytest.raises(UnsupportedError) as caught:
            Trainer(make_llama(), settings, train_dataset=Blocks()).train()
        return str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp_size": 2}, r"tp_size=2, and the model is not .*distributed_config=DistributedConfig\(tp_size"),
        ({"dp_shard_size": 2}, "dp_shard_size=2, and FSDP is not on.*fsdp=True"),
        ({"tp_size": 4}, "asks for 4 ranks .*, and 2 were started"),
    ],
)
def test_a_mesh_that_the_trainer_does_not_make_is_refused(
    sizes: dict[str, int], message: str, two_ranks: RankPool, tmp_path: Path
) -> None:
    for text in two_ranks.run(refusal_of_the_trainer, sizes, str(tmp_path)):
        assert re.search(message, text), text


class Accelerating:
    """As much of an accelerator as tensor parallelism is kept from."""

    distributed_type = SimpleNamespace(value="MULTI_CPU")
    parallelism_config = SimpleNamespace(tp_size=2)

    def _prepare_tp(self, *objects: Any) -> str:
        return "changed"

    def prepare_model(self, model: Any, evaluation_mode: bool = False) -> str:
        return "as it is" if evaluation_mode else "wrapped"


def test_doors_inside_of_each_other_leave_a_model_as_it_is() -> None:
    accelerator: Any = Accelerating()
    for _ in range(2):
        with left_as_it_is(accelerator):
            with left_as_it_is(accelerator):
                assert accelerator.prepare_model(None) == "as it is"
            assert accelerator.prepare_model(None) == "as it is" and accelerator._prepare_tp(1, 2) == (1, 2)
        assert not vars(accelerator) and accelerator.prepare_model(None) == "wrapped"
