"""Train a causal language model with a registered optimizer, on however many ranks the launcher starts.

    accelerate launch --config_file configs/accelerate/ddp_cpu_2.yaml launch/train.py --optim galore_adamw \
        --optim_target_modules attn mlp --optim_args "rank=32, update_proj_gap=50" --output_dir runs/mine

Run by path. It is `dist_optim.integrations.transformers.Trainer` and its `run_report` between a command line
(`train_arguments`) and text (`train_data`).

A mistake of the user ends all ranks with exit code 2 before training, SIGINT with 130, SIGTERM with 143.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # the imports below take seconds, in which Ctrl-C is as likely as later
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(128 + number))

import gc
import logging
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

if __name__ == "__main__":
    logging.disable(logging.WARNING)  # of kernels and accelerators that are not there

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback, default_data_collator, set_seed

from dist_optim.errors import DistOptimError, UsageError
from dist_optim.integrations.environment import num_ranks_asked_for
from dist_optim.integrations.quiet import quieten_libraries
from dist_optim.integrations.refusals import REFUSED, error_line
from dist_optim.integrations.signals import SignalWatch, ignore_signals, is_rank_0
from dist_optim.integrations.transformers import Trainer
from dist_optim.integrations.transformers.first_save import RehearsedSave
from dist_optim.integrations.transformers.run_report import Progress, RunReport, find_checkpoint
from dist_optim.integrations.versions import versions
from dist_optim.ranks.agreement import assert_ranks_equal
from dist_optim.ranks.gloo import use_one_worker_each
from dist_optim.ranks.together import raise_together, together
from train_arguments import make_arguments, read_arguments
from train_data import block_losses, load_blocks, load_model, load_tokenizer

if TYPE_CHECKING:
    from argparse import Namespace

OWN = ("given", "local_rank")
"""What ranks need not have alike: which flags were typed, and the launcher's number."""
SIGNAL_GRACE_S = 2.0
USERS_MISTAKES = (DistOptimError, ValueError, ImportError, OSError)


def main(argv: list[str], watch: SignalWatch) -> None:
    """Run the whole job on this rank; ends the process itself when the user's request cannot be served."""
    quieten_libraries()
    use_one_worker_each()
    report = None
    try:
        asked = _meet(argv)
        model, data, arguments = together(lambda: make_arguments(asked), otherwise=UsageError)
        report = RunReport(data.block_size, telemetry=arguments.telemetry, settings={**vars(model), **vars(data)})
        watch.follow(report.discard)
        resume = arguments.resume_from_checkpoint
        if report.claim(arguments.output_dir, overwrite=asked.overwrite_output_dir, resume=resume):
            _run(model, data, arguments, report, watch)
        else:
            _say(f"{asked.output_dir} holds this run, finished: nothing to do. --overwrite_output_dir trains on.")
    except USERS_MISTAKES as mistake:
        if report is not None and report.has_begun:
            raise
        if report is not None:
            report.give_up()
        _refuse(mistake)
    _leave()


def _meet(argv: list[str]) -> Namespace:
    """Read the arguments and join the other ranks, which must have been given the same. Collective.

    Raises:
        DistOptimError: On all ranks: one cannot read its arguments, has others, or stands alone.
    """
    error: DistOptimError | None = None
    asked: Namespace | None = None
    try:
        asked = read_arguments(argv)
    except DistOptimError as caught:
        error = caught
    on_cpu = asked.use_cpu if asked else "--use_cpu" in argv
    num_ranks = PartialState(cpu=on_cpu or not torch.accelerator.is_available()).num_processes
    if num_ranks_asked_for() != num_ranks:
        raise error or UsageError(
            f"The launcher was asked for {num_ranks_asked_for()} ranks, and accelerate sees {num_ranks}. Start CPU "
            "ranks with --config_file configs/accelerate/ddp_cpu_2.yaml, GPU ranks with --multi_gpu."
        )
    raise_together(error)
    assert asked is not None  # a rank without arguments has an error, and has raised it
    items = [(f"--{name}", value) for name, value in sorted(vars(asked).items()) if name not in OWN]
    assert_ranks_equal("The arguments of launch/train.py", items, "Start all ranks with the same.")
    assert_ranks_equal("The installed packages", versions(asked.optim), "Install the same versions on all hosts.")
    if not on_cpu and not torch.accelerator.is_available():
        _say("No GPU was found: this trains on the CPU. --use_cpu says that it is meant.")
    return asked


def _run(model: Any, data: Any, arguments: Any, report: RunReport, watch: SignalWatch) -> None:
    """Train to the last step, and leave the results. Collective over all ranks."""
    resume = arguments.resume_from_checkpoint
    checkpoint = together(lambda: find_checkpoint(resume, arguments.output_dir), otherwise=UsageError)
    arguments.eval_on_start = arguments.eval_on_start and checkpoint is None
    job = together(lambda: _make_job(model, data, arguments, report), otherwise=UsageError)
    watch.follow(report.discard, lambda: job.state.global_step)
    texts = [("training text", job.train_dataset.digest()), ("validation text", job.eval_dataset.digest())]
    assert_ranks_equal("What ranks have read", texts, "Give all of them the same files.")
    if resume is not None:
        _say(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning")
    try:
        job.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        summary = report.finish(job)
    except Exception:
        # When a signal ends the job, a rank that got it first breaks the others' collectives. Theirs is then on its
        # way, and turns this failure into the interruption that it is.
        if report.has_begun:
            time.sleep(SIGNAL_GRACE_S)
        raise
    ignore_signals()  # all is written
    watch.follow()
    report.print_summary(summary)


def _make_job(model_arguments: Any, data_arguments: Any, arguments: Any, report: RunReport) -> Trainer:
    """Load model, tokenizer and text, and give them to a Trainer.

    Raises:
        DistOptimError: Something the user named cannot be used.
    """
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(model_arguments)
    model = load_model(model_arguments, tokenizer, data_arguments.block_size)
    train_blocks, eval_blocks = load_blocks(data_arguments, tokenizer)
    needed = arguments.per_device_train_batch_size * arguments.world_size
    if len(train_blocks) < needed:
        raise UsageError(
            f"There are {len(train_blocks)} training blocks, fewer than one batch of {needed} ({arguments.world_size} "
            f"ranks of --per_device_train_batch_size {arguments.per_device_train_batch_size}). Give more text, a "
            "smaller batch, or a smaller --block_size."
        )
    if arguments.follows_metric:
        log = os.path.join(arguments.output_dir, ".unfinished", "lr_decisions.jsonl")
        arguments.lr_scheduler_kwargs = {"log_path": log, **arguments.lr_scheduler_kwargs}
    job = Trainer(
        model,
        arguments,
        data_collator=default_data_collator,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        compute_metrics=lambda found: {"loss": float(found.predictions.mean())},
        preprocess_logits_for_metrics=block_losses,
    )
    for stock in (ProgressCallback, PrinterCallback):
        job.remove_callback(stock)
    job.add_callback(Progress())
    if arguments.rehearse:
        job.add_callback(RehearsedSave())
    job.callback_handler.callbacks.insert(1, report)  # after the flow's, before trackers, which log the speed, too
    return job


def _refuse(mistake: Exception) -> NoReturn:
    """End this rank, after rank 0 has said why; the others are on the same way."""
    if is_rank_0():
        print(error_line(mistake), file=sys.stderr, flush=True)
    # The launcher ends the other ranks as soon as one has left; each still leaves by itself, with the right exit code.
    ignore_signals()
    _leave(waits=isinstance(mistake, DistOptimError))  # which all ranks raise together
    sys.exit(REFUSED)


def _leave(waits: bool = True) -> None:
    """Leave the process group, after all that refers to it: its threads must end before the interpreter does."""
    gc.collect()
    if dist.is_initialized():
        if waits:
            PartialState().wait_for_everyone()
        dist.destroy_process_group()


def _say(text: str) -> None:
    if is_rank_0():
        print(text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:], SignalWatch())
