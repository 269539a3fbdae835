"""What the summary of a run says, and the table that shows it."""

from __future__ import annotations

import math
import resource
import sys
from collections import Counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim import Optimizer

from dist_optim.layouts.detect import detect
from dist_optim.ranks.agreement import gather_objects
from dist_optim.schedulers import metric_scheduler_in
from dist_optim.specs.unwrapping import find_optimizer

__all__ = [
    "headline",
    "optimizer_of_ours",
    "optimizer_state_bytes",
    "peak_memory_bytes",
    "print_summary",
    "strategy_name",
    "summarize",
]

MOMENT_BYTES = 8
"""A parameter's state in torch's AdamW in fp32: two moments."""


def summarize(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The summary, all ranks' figures in it. Collective.

    Args:
        trainer: After ``train()``.
        rows: The metrics, in order.
    """
    args, state = trainer.args, trainer.state
    scheduler = metric_scheduler_in(trainer.lr_scheduler)
    decisions = {} if scheduler is None else {"lr_decisions": Counter(row["decision"] for row in scheduler.decisions)}
    losses, eval_losses = ([row[key] for row in rows if key in row] or [math.nan] for key in ("loss", "eval_loss"))
    held = optimizer_state_bytes(trainer.optimizer), adamw_state_bytes(trainer)
    by_rank = gather_objects((*held, peak_memory_bytes(trainer.accelerator.device)))
    return {
        "optim": text_of(args.optim),
        "strategy": strategy_name(trainer.accelerator),
        "world_size": args.world_size,
        "steps": state.global_step,
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "eval_loss_first": eval_losses[0],
        "eval_loss_last": eval_losses[-1],
        "lr_scheduler_type": text_of(args.lr_scheduler_type),
        "learning_rate_last": float(trainer.optimizer.param_groups[0]["lr"]),
        **decisions,
        "optimizer_state_bytes_per_rank": [held for held, _, _ in by_rank],
        "adamw_state_bytes_per_rank": [held for _, held, _ in by_rank],
        "peak_memory_bytes_per_rank": [peak for _, _, peak in by_rank],
    }


def adamw_state_bytes(trainer: Any) -> int:
    """What this rank would hold of torch's AdamW under the same strategy: two fp32 moments of all that it steps."""
    if trainer.is_deepspeed_enabled:  # ZeRO-3 leaves empty tensors in the model, with the size beside them
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        total = sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in trained)
        return MOMENT_BYTES * total // (1 if strategy_name(trainer.accelerator) == "zero0" else trainer.args.world_size)
    placed = detect(trainer.model_wrapped).values()
    return MOMENT_BYTES * sum(one.local().numel() for one in placed if one.parameter.requires_grad)


def optimizer_state_bytes(optimizer: Any) -> int:
    """What this rank holds, of an optimizer of ours or of any other."""
    ours = optimizer_of_ours(optimizer)
    if ours is not None:
        return int(ours.optimizer_state_bytes())
    stock = find_optimizer(optimizer, Optimizer)
    kept = [] if stock is None else [value for entry in stock.state.values() for value in entry.values()]
    return sum(value.nbytes for value in kept if isinstance(value, Tensor))


def optimizer_of_ours(optimizer: Any) -> Any:
    """The optimizer itself, past what accelerate and DeepSpeed have put around it; None where it is not ours."""
    while optimizer is not None and not hasattr(optimizer, "route_audit"):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on its GPU, or resident in the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def strategy_name(accelerator: Accelerator) -> str:
    """How the model is spread, in one word: none, ddp, fsdp1, fsdp2, hsdp, zero0 to zero3."""
    kind = accelerator.distributed_type
    if kind is DistributedType.NO:
        return "none"
    if kind is DistributedType.DEEPSPEED:
        return f"zero{accelerator.deepspeed_config['zero_optimization']['stage']}"
    if kind is not DistributedType.FSDP:
        return "ddp" if kind.value.startswith("MULTI_") else kind.value.lower()
    sizes = accelerator.state.parallelism_config
    replicates = sizes is not None and sizes.dp_replicate_size > 1
    return "hsdp" if replicates else f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"


def headline(summary: dict[str, Any]) -> str:
    """What was trained with, and how: ``galore_adamw on 2 ranks, ddp``."""
    num_ranks = summary["world_size"]
    return f"{summary['optim']} on {num_ranks} rank{'s' if num_ranks > 1 else ''}, {summary['strategy']}"


def print_summary(summary: dict[str, Any], output_dir: str) -> None:
    """Show the run's result as a table. Needs rich."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=headline(summary), show_header=False)
    for row in _rows(summary):
        table.add_row(*row)
    table.add_row("output", output_dir)
    Console().print(table)


def _rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    counts = ", ".join(f"{count} {decision}" for decision, count in summary.get("lr_decisions", {}).items())
    rate = f"{summary['learning_rate_last']:.3g}, {summary['lr_scheduler_type']}"
    losses = [
        (what, summary[f"{key}_loss_first"], summary[f"{key}_loss_last"])
        for what, key in (("training loss", "train"), ("validation loss", "eval"))
    ]
    speed = [(f"{what} per second", summary.get(f"{what}_per_second")) for what in ("tokens", "samples")]
    return [
        ("steps", f"{summary['steps']}"),
        *((what, f"{first:.4f} → {last:.4f}") for what, first, last in losses if not math.isnan(first)),
        ("last learning rate", f"{rate}: {counts}" if counts else rate),
        *((what, f"{value:,.0f}") for what, value in speed if value is not None),
        ("optimizer state, by rank", _in_mib(summary["optimizer_state_bytes_per_rank"])),
        ("that of torch's AdamW", _in_mib(summary["adamw_state_bytes_per_rank"])),
        ("peak memory, by rank", _in_mib(summary["peak_memory_bytes_per_rank"])),
    ]


def _in_mib(sizes: list[int]) -> str:
    return ", ".join(f"{size / 2**20:.1f} MiB" for size in sizes)


def text_of(choice: Any) -> str:
    """A name, or that of transformers' enumeration."""
    return str(getattr(choice, "value", choice))
