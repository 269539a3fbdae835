"""Train a causal language model with a registered optimizer, on however many ranks the launcher starts.

    accelerate launch --config_file configs/accelerate/ddp_cpu_2.yaml launch/train.py --optim galore_adamw \
        --optim_target_modules attn mlp --optim_args "rank=32, update_proj_gap=50" --output_dir runs/mine

Run by path; its siblings `train_arguments`, `train_data`, `train_model`, `train_loop` and `train_report` hold the rest.
A mistake of the user ends all ranks with exit code 2 before training, SIGINT with 130, SIGTERM with 143.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from torch.utils.data import DataLoader

from dist_optim import parse_optim_args
from dist_optim.agreement import raise_together
from dist_optim.errors import DistOptimError
from dist_optim.integrations.accelerate import prepare
from train_arguments import DataArguments, ModelArguments, TrainArguments, UsageError, parse_arguments
from train_data import Blocks, load_blocks
from train_loop import TrainingRun, num_training_steps, train
from train_model import load_model, load_tokenizer, no_decay_names
from train_report import RunDirectory, print_summary

REFUSED = 2
Arguments = tuple[ModelArguments, DataArguments, TrainArguments]


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; later ones are ignored while this rank leaves."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def main(argv: list[str]) -> None:
    """Run the whole job on this rank; always ends the process when it cannot finish."""
    run: TrainingRun | None = None
    try:
        _catch_signals()
        _quieten_libraries()
        arguments, error = _parse(argv)
        accelerator = _start_accelerator(arguments, argv)
        try:
            raise_together(error)
            assert arguments is not None  # a rank without arguments has an error, and has raised it
            run = build(accelerator, *arguments)
        except DistOptimError as refusal:
            _refuse(refusal, accelerator)
        summary = train(run)
        if run.directory is not None:
            print_summary(summary, run.arguments.output_dir)
        run = None
        _end_group(accelerator)
    except Interrupted as interrupted:
        _leave_interrupted(interrupted, run)


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
    try:
        hyperparameters = parse_optim_args(arguments.optim_args)
        directory = RunDirectory(arguments.output_dir, arguments.overwrite_output_dir) if _is_rank_0() else None
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
    model, optimizer, scheduler = prepare(
        accelerator,
        model,
        arguments.optim,
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        target_modules=_target_modules(arguments),
        no_decay=no_decay_names(model),
        scheduler=lambda optimizer: transformers.get_scheduler(
            arguments.lr_scheduler_type, optimizer, _num_warmup_steps(arguments, num_steps), num_steps
        ),
        **hyperparameters,
    )
    raise_together(None if directory is None else directory.open())
    return TrainingRun(
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


def _quieten_libraries() -> None:
    """Keep the output to the job: no other library's bars, nor its warnings about kernels that are not used here."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("bitsandbytes", "torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated")  # accelerate calls it


def _parse(argv: list[str]) -> tuple[Arguments | None, UsageError | None]:
    """The arguments, or the error: raised later, when the ranks can agree on it."""
    try:
        return parse_arguments(argv), None
    except UsageError as error:
        return None, error


def _start_accelerator(arguments: Arguments | None, argv: list[str]) -> Accelerator:
    """Join the other ranks; refuses to train with fewer than the launcher was asked for."""
    train_arguments = arguments[2] if arguments else None
    use_cpu = train_arguments.use_cpu if train_arguments else "--use_cpu" in argv
    accelerator = Accelerator(
        # Without a GPU, accelerate forms a process group only when it is told to use the CPU.
        cpu=use_cpu or not torch.accelerator.is_available(),
        mixed_precision="bf16" if train_arguments and train_arguments.bf16 else None,
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


def _target_modules(arguments: TrainArguments) -> str | list[str] | None:
    given = arguments.optim_target_modules
    return given[0] if given == ["all-linear"] else given


def _num_warmup_steps(arguments: TrainArguments, num_steps: int) -> int:
    share_or_count = arguments.warmup_steps
    return round(share_or_count * num_steps) if share_or_count < 1 else int(share_or_count)


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _catch_signals() -> None:
    signals = (signal.SIGINT, signal.SIGTERM)

    def interrupt(signal_number: int, frame: FrameType | None) -> NoReturn:
        for other in signals:  # launchers often send a second one
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(signal_number)

    for number in signals:
        signal.signal(number, interrupt)


def _refuse(error: DistOptimError, accelerator: Accelerator) -> NoReturn:
    """End all ranks with the same exit code, after rank 0 has said why."""
    if _is_rank_0():
        print(f"error: {error}", file=sys.stderr, flush=True)
    # The launcher ends the other ranks as soon as one has left; each still leaves by itself, with the right exit code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    accelerator.wait_for_everyone()
    _end_group(accelerator)
    sys.exit(REFUSED)


def _end_group(accelerator: Accelerator) -> None:
    """Leave the process group, after all that refers to it: its threads must end before the interpreter does."""
    accelerator.free_memory()
    accelerator.end_training()


def _leave_interrupted(interrupted: Interrupted, run: TrainingRun | None) -> NoReturn:
    """Leave without another collective: the other ranks may already be gone."""
    if run is not None and run.directory is not None:
        run.directory.discard()
    if _is_rank_0():
        print(f"\ninterrupted at step {0 if run is None else run.step}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(interrupted.exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
