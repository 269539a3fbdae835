"""One job of `launch/train.py` on this rank: from the command line to a finished run, or to a refusal by all ranks."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any, NoReturn

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from torch.utils.data import DataLoader

import train_checkpoints as checkpoints
import train_schedule as schedule
from dist_optim import Trait, get_spec, parse_optim_args
from dist_optim.errors import DistOptimError
from dist_optim.integrations.accelerate import prepare
from dist_optim.integrations.cpu_rehearsal import fsdp_arguments
from dist_optim.ranks.together import raise_together
from train_arguments import DataArguments, ModelArguments, TrainArguments, UsageError, parse_arguments
from train_data import Blocks, load_blocks
from train_deepspeed import accelerator_arguments, is_asked_for, leave_out
from train_loop import TrainingRun, num_training_steps, train
from train_model import load_model, load_tokenizer, no_decay_names
from train_report import RunDirectory, print_summary
from train_signals import SignalWatch, ignore_signals, is_rank_0

REFUSED = 2
Arguments = tuple[ModelArguments, DataArguments, TrainArguments]


def main(argv: list[str], watch: SignalWatch) -> None:
    """Run the whole job on this rank; ends the process itself when the user's request cannot be served."""
    _quieten_libraries()
    arguments, error = _parse(argv)
    engine_arguments: dict[str, Any] = {}
    if arguments is not None and is_asked_for(arguments[2]):
        engine_arguments, error = _engine_arguments(arguments[2])
    accelerator = _start_accelerator(arguments, argv, engine_arguments)
    try:
        raise_together(error)
        assert arguments is not None  # a rank without arguments has an error, and has raised it
        run = build(accelerator, *arguments)
    except DistOptimError as refusal:
        _refuse(refusal, accelerator)
    _train_and_report(run, watch)
    del run
    _end_group(accelerator)


def _train_and_report(run: TrainingRun, watch: SignalWatch) -> None:
    watch.follow(run.discard, lambda: run.step)
    summary = train(run)
    ignore_signals()  # all is written
    watch.follow()
    if run.directory is not None:
        print_summary(summary, run.arguments.output_dir)


def build(
    accelerator: Accelerator, model_arguments: ModelArguments, data_arguments: DataArguments, arguments: TrainArguments
) -> TrainingRun:
    """Load, check and place everything; all ranks raise together when one of them cannot.

    Collective over all ranks.

    Raises:
        DistOptimError: Something the user named cannot be used.
    """
    set_seed(arguments.seed)
    local_error: DistOptimError | None = None
    directory: RunDirectory | None = None
    try:
        hyperparameters = _hyperparameters(arguments)
        schedule.check_schedule(arguments)
        resumes = arguments.resume_from_checkpoint is not None
        checkpoint = checkpoints.find(arguments.resume_from_checkpoint, arguments.output_dir)
        if is_rank_0():
            directory = RunDirectory(arguments.output_dir, arguments.overwrite_output_dir, resumes)
        tokenizer = load_tokenizer(model_arguments)
        model = load_model(model_arguments, tokenizer, data_arguments.block_size)
        train_blocks, eval_blocks = load_blocks(data_arguments, tokenizer)
        _refuse_small_batch(train_blocks, arguments, accelerator.num_processes)
    except DistOptimError as error:
        local_error = error
    raise_together(local_error)

    train_loader, eval_loader = accelerator.prepare(
        DataLoader(train_blocks, batch_size=arguments.per_device_train_batch_size, shuffle=True, drop_last=True),
        DataLoader(eval_blocks, batch_size=arguments.per_device_eval_batch_size),
    )
    num_steps = num_training_steps(arguments, len(train_loader))
    schedule_options = schedule.build_options(arguments, num_steps, RunDirectory.unfinished_in(arguments.output_dir))
    model, optimizer, scheduler = prepare(
        accelerator,
        model,
        arguments.optim,
        target_modules=_target_modules(arguments),
        no_decay=no_decay_names(model),
        scheduler=arguments.lr_scheduler_type,
        scheduler_options=schedule_options,
        **hyperparameters,
    )
    raise_together(None if directory is None else directory.open())
    run = TrainingRun(
        accelerator=accelerator,
        arguments=arguments,
        block_size=data_arguments.block_size,
        directory=directory,
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        eval_loader=eval_loader,
        num_steps=num_steps,
    )
    if checkpoint is not None:
        checkpoints.load(run, checkpoint)
    if is_rank_0() and resumes:
        print(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning")
    return run


def _quieten_libraries() -> None:
    """Keep the output to the job: no other library's bars, nor its warnings about kernels that are not used here."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("DeepSpeed", "bitsandbytes", "torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # accelerate and DeepSpeed call them.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.* is deprecated")
    warnings.filterwarnings("ignore", message="FSDP.state_dict_type")  # its deprecation; FSDP1 has no other door


def _engine_arguments(arguments: TrainArguments) -> tuple[dict[str, Any], DistOptimError | None]:
    """DeepSpeed's part of the Accelerator, or the error, and then a job without it: ranks must meet to end together."""
    try:
        return accelerator_arguments(arguments), None
    except DistOptimError as error:
        leave_out()
        return {}, error


def _parse(argv: list[str]) -> tuple[Arguments | None, DistOptimError | None]:
    """The arguments, or the error: raised later, when the ranks can agree on it."""
    try:
        return parse_arguments(argv), None
    except UsageError as error:
        return None, error


def _start_accelerator(arguments: Arguments | None, argv: list[str], engine_arguments: dict[str, Any]) -> Accelerator:
    """Join the other ranks; refuses to train with fewer than the launcher was asked for."""
    train_arguments = arguments[2] if arguments else None
    use_cpu = train_arguments.use_cpu if train_arguments else "--use_cpu" in argv
    placement = {
        # Without a GPU, accelerate forms a process group only when it is told to use the CPU.
        **(fsdp_arguments() if use_cpu or not torch.accelerator.is_available() else {}),
        "mixed_precision": "bf16" if train_arguments and train_arguments.bf16 else None,
        **engine_arguments,
    }
    accelerator = Accelerator(
        **placement,
        # Every optimizer step takes the same number of micro-batches, also across the end of an epoch.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=train_arguments.gradient_accumulation_steps if train_arguments else 1, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=train_arguments.seed if train_arguments else None
        ),
    )
    asked = _num_ranks_asked_for()
    if asked != accelerator.num_processes:
        _refuse(
            UsageError(
                f"The launcher was asked for {asked} ranks, and accelerate sees {accelerator.num_processes}. Start CPU "
                "ranks with --config_file configs/accelerate/ddp_cpu_2.yaml, GPU ranks with --multi_gpu."
            ),
            accelerator,
        )
    return accelerator


def _num_ranks_asked_for() -> int | str:
    """What the launcher's environment says; without a GPU, `accelerate launch --num_processes 2` starts one process."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    started_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return "several" if started_by_accelerate and "MASTER_ADDR" in os.environ else 1


def _refuse_small_batch(blocks: Blocks, arguments: TrainArguments, num_ranks: int) -> None:
    needed = arguments.per_device_train_batch_size * num_ranks
    if len(blocks) < needed:
        raise UsageError(
            f"There are {len(blocks)} training blocks, fewer than one batch of {needed} ({num_ranks} ranks of "
            f"--per_device_train_batch_size {arguments.per_device_train_batch_size}). Give more text, a smaller "
            "batch, or a smaller --block_size."
        )


def _hyperparameters(arguments: TrainArguments) -> dict[str, Any]:
    """All that the optimizer is given by name, checked before anything is loaded."""
    given = parse_optim_args(arguments.optim_args)
    options = {"fused_backward": given.pop("fused_backward")} if "fused_backward" in given else {}
    flags = {"lr": "--learning_rate", "weight_decay": "--weight_decay"}
    for key in sorted(given.keys() & flags.keys()):
        raise UsageError(f"--optim_args sets {key}={given[key]!r}, which has a flag of its own. Use {flags[key]}.")
    values = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay, **given}
    spec = get_spec(arguments.optim)
    spec.check(values)
    if Trait.FUSED_BACKWARD in spec.traits and not spec.instead and not is_asked_for(arguments):
        # Where the flags need stored gradients, gradients are stored: the step is the same.
        is_needed = arguments.max_grad_norm > 0 or arguments.gradient_accumulation_steps > 1
        options = {"fused_backward": False if is_needed else None, **options}
    return {**values, **options}


def _target_modules(arguments: TrainArguments) -> str | list[str] | None:
    given = arguments.optim_target_modules
    return given[0] if given == ["all-linear"] else given


def _refuse(error: DistOptimError, accelerator: Accelerator) -> NoReturn:
    """End all ranks with the same exit code, after rank 0 has said why."""
    if is_rank_0():
        print(f"error: {error}", file=sys.stderr, flush=True)
    # The launcher ends the other ranks as soon as one has left; each still leaves by itself, with the right exit code.
    ignore_signals()
    accelerator.wait_for_everyone()
    _end_group(accelerator)
    sys.exit(REFUSED)


def _end_group(accelerator: Accelerator) -> None:
    """Leave the process group, after all that refers to it: its threads must end before the interpreter does."""
    accelerator.free_memory()
    accelerator.end_training()
