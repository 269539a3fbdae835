"""What launchers say in the environment."""

from __future__ import annotations

import os

from dist_optim.errors import UsageError

__all__ = ["is_switched_on", "num_ranks_asked_for", "refuse_lone_process", "refuse_separate_ranks"]


def is_switched_on(name: str) -> bool:
    """Whether the variable is there and says yes, as accelerate reads its own."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def num_ranks_asked_for() -> int | str:
    """The number of ranks; "several" where accelerate was asked for them and has started one process, without a GPU."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    started_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return "several" if started_by_accelerate and "MASTER_ADDR" in os.environ else 1


def refuse_lone_process() -> None:
    """Without a GPU `accelerate launch --num_processes 2` starts one process, which would train alone without a word.

    Raises:
        UsageError: Several ranks were asked for, and this process is the only one.
    """
    if num_ranks_asked_for() == "several":
        raise UsageError(
            "accelerate launch was asked for several ranks and has started one process, as there is no GPU. Start CPU "
            "ranks with torchrun --nproc_per_node N, or with distributed_type: MULTI_GPU in accelerate's configuration."
        )


def refuse_separate_ranks(num_processes: int) -> None:
    """Without a GPU a plain `Accelerator()` takes each rank for a job of its own, which nothing keeps in step.

    Args:
        num_processes: How many processes accelerate has found.

    Raises:
        UsageError: The launcher was asked for more ranks than that.
    """
    refuse_lone_process()
    asked_for = num_ranks_asked_for()
    if num_processes == 1 and asked_for != 1:
        raise UsageError(
            f"The launcher was asked for {asked_for} ranks, and this Accelerator is one process alone: without a GPU "
            "it has to be told to use the CPU. Make it with Accelerator(cpu=True), also where the configuration says "
            "use_cpu: true."
        )
