"""A small Llama that tensor parallelism divides evenly, trained through several doors on meshes of two axes and more.

On two ranks it is tensor parallel and nothing else, on four FSDP2 lies over that, on eight replicas (HSDP) besides.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from end_to_end import BATCH, LENGTH, PARTS, VOCABULARY, batch
from fresh import forget
from launch_files import CONFIGS, launch_environment
from placements import full_parameters, mesh_of, own_group
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from trainers import Blocks, Job, arguments_of, fresh_accelerate

import dist_optim
from dist_optim.integrations import cpu_rehearsal
from dist_optim.integrations.accelerate import prepare
from dist_optim.integrations.transformers import Trainer
from dist_optim.ranks.agreement import gather_objects
from dist_optim.testing import relative_distance

STEPS = 6
MAX_NORM = 0.5
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-6},
    "galore_adamw": {"lr": 1e-2, "target_modules": ["attn", "mlp"], "rank": 8, "update_proj_gap": 3},
    "muon": {"lr": 1e-2, "weight_decay": 0.0, "rest_options": {"lr": 1e-3}},
}
IN_ARGUMENTS: dict[str, dict[str, Any]] = {
    "adamw_torch": {"adam_epsilon": 1e-6},
    "muon": {"optim_args": {"rest_options": {"lr": 1e-3}}},
}
"""The same for the Trainer, beyond what ``trainers.SETTINGS`` has."""
AXES = {2: ("tp",), 4: ("shard", "tp"), 8: ("replicate", "shard", "tp")}
"""By the number of ranks."""
LAUNCHED = {4: "fsdp2_tp_cpu_4.yaml", 8: "hsdp_tp_cpu_8.yaml"}
ALONE = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}
"""What ``accelerate launch --parallelism_config_tp_size 2`` sets."""


def make_llama() -> nn.Module:
    """Two ranks share its heads and its widths; the vocabulary, and FSDP2's cut of 60 rows by 2 x 2, are even too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=60,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=22,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def make_moe() -> nn.Module:
    """transformers keeps its experts as stacks: two parameters a layer, of four matrices each."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
    )
    return Qwen3MoeForCausalLM(config)


def tensor_parallel(model: Any, mesh: DeviceMesh) -> Any:
    """As torch's tutorials have it, without sequence parallelism: norms, embedding and head on no axis."""
    columns, rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
    for layer in model.model.layers:
        names = [name for name, _ in layer.named_modules()]
        plan: dict[str, Any] = {name: ColwiseParallel() for name in names if name.endswith(columns)}
        plan |= {name: RowwiseParallel() for name in names if name.endswith(rows)}
        parallelize_module(layer, mesh, plan)
    return model


def plain_loop(name: str, _: str) -> list[Tensor]:
    """``fully_shard`` over ``parallelize_module``."""
    axes = AXES[dist.get_world_size()]
    mesh = mesh_of("cpu", axes)
    model = tensor_parallel(make_llama(), mesh["tp"])
    for unit in [*model.model.layers, model] if axes[:-1] else ():
        fully_shard(unit, mesh=mesh[axes[:-1]])
    optimizer = dist_optim.build_optimizer(model, name, print_audit=False, check_ranks_every=2, **OPTIONS[name])
    return trained(model, optimizer, optimizer.clip_grad_norm_)


@contextmanager
def accelerated(name: str) -> Iterator[tuple[Accelerator, nn.Module, Any]]:
    """``prepare``, with what the launcher makes of the configuration."""
    config = LAUNCHED.get(dist.get_world_size())
    with mock.patch.dict(os.environ, launch_environment(CONFIGS / config) if config else ALONE):
        try:
            accelerator = Accelerator(**cpu_rehearsal.fsdp_arguments())
            (cpu_rehearsal.turn_fsdp_on if config else cpu_rehearsal.bring_mesh)(accelerator)
            model = tensor_parallel(make_llama(), accelerator.torch_device_mesh["tp"])
            model, optimizer, _ = prepare(accelerator, model, name, print_audit=False, **OPTIONS[name])
            yield accelerator, model, optimizer
        finally:
            forget()


def through_accelerate(name: str, _: str) -> list[Tensor]:
    with accelerated(name) as (accelerator, model, optimizer):
        return trained(model, optimizer, partial(accelerator.clip_grad_norm_, list(model.parameters())))


def resumed_through_accelerate(name: str, folder: str) -> list[str]:
    """Saved in the middle and gone on with in another model: what differs from the run that was never interrupted."""
    half = STEPS // 2
    with accelerated(name) as (accelerator, model, optimizer):
        trained(model, optimizer, None, range(half))
        accelerator.save_state(folder)
        trained(model, optimizer, None, range(half, STEPS))
        expected = full_parameters(model)
    with accelerated(name) as (accelerator, model, optimizer):
        accelerator.load_state(folder)
        trained(model, optimizer, None, range(half, STEPS))
        found = full_parameters(model)
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def through_the_trainer(name: str, folder: str) -> list[Tensor]:
    """transformers places the model by its own plan, embeddings and head included, and the Trainer takes it so."""
    sizes = {"tp_size": 2, "fsdp_size": 2, "dp_replicate_size": 2}
    return trained_by_the_trainer(name, folder, dict(list(sizes.items())[: len(AXES[dist.get_world_size()])]))


def experts_through_the_trainer(name: str, folder: str) -> list[Tensor]:
    """Two ranks share the experts, and two of each cut them further; all four cut the rest, each with its own batch."""
    return trained_by_the_trainer(name, folder, {"fsdp_size": 4, "ep_size": 2}, optim_target_modules="all-linear")


def trained_by_the_trainer(name: str, folder: str, sizes: dict[str, int], **more: Any) -> list[Tensor]:
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    with fresh_accelerate():
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))
        num_parts = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1)
        more |= {"per_device_train_batch_size": BATCH // num_parts, "max_grad_norm": MAX_NORM}
        more |= IN_ARGUMENTS.get(name, {})
        settings = arguments_of(Job(name), "ddp", folder, **more)
        trainer = Trainer(model, settings, train_dataset=Blocks())
        trainer.train()
        return list(full_parameters(trainer.model).values())


def trained(
    model: nn.Module, optimizer: Any, clip: Callable[[float], Any] | None, steps: Iterable[int] = range(STEPS)
) -> list[Tensor]:
    """The ranks along tp get the same batch."""
    for step in steps:
        own = batch(step).chunk(dist.get_world_size() // 2)[dist.get_rank() // 2]
        model(input_ids=own, labels=own).loss.backward()
        if clip is not None:
            assert float(clip(MAX_NORM)) > MAX_NORM, "clipping must bind, or it is not tested"
        optimizer.step()
        optimizer.zero_grad()
    return list(full_parameters(model).values())


def alone(name: str, num_parts: int, make: Callable[[], nn.Module], **more: Any) -> list[Tensor]:
    """One process, each batch in so many parts."""
    model, options = make(), {**OPTIONS[name], **more}
    optimizer = dist_optim.build_optimizer(model, name, print_audit=False, process_group=own_group(), **options)
    for step in range(STEPS):
        for part in batch(step).chunk(num_parts):
            (model(input_ids=part, labels=part).loss / num_parts).backward()
        optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return list(full_parameters(model).values())


EXPERTS = "Trainer, experts on a mesh of their own"
DOORS = {
    "plain loop": plain_loop,
    "accelerate": through_accelerate,
    "Trainer": through_the_trainer,
    EXPERTS: experts_through_the_trainer,
}


def distances(name: str, doors: list[str], folder: str) -> tuple[float, dict[str, float]]:
    """The noise floor of one process, whose runs the ranks divide, and how far from it each door ends. Collective.

    Both are relative to the way that the reference moved.

    Args:
        name: Of the optimizer.
        doors: Which of ``DOORS``.
        folder: What ``save_pretrained`` wrote of the model.
    """
    make, more = (make_llama, {}) if doors != [EXPERTS] else (make_moe, {"target_modules": "all-linear"})
    start = list(full_parameters(make()).values())
    own_group()  # on every rank: torch finds a later group of all by how many each of them has
    own = [alone(name, num_parts, make, **more) for num_parts in PARTS[dist.get_rank() :: dist.get_world_size()]]
    reference, *others = [one for found in gather_objects(own) for one in found]
    floor = max(relative_distance(other, reference, start) for other in others)
    return floor, {door: relative_distance(DOORS[door](name, folder), reference, start) for door in doors}
