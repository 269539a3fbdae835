"""Train a causal language model with a registered optimizer, on however many ranks the launcher starts.

    accelerate launch --config_file configs/accelerate/ddp_cpu_2.yaml launch/train.py --optim galore_adamw \
        --optim_target_modules attn mlp --optim_args "rank=32, update_proj_gap=50" --output_dir runs/mine

Run by path. It is `dist_optim.integrations.transformers.Trainer` between a command line and a folder of results.
Reading order of its siblings: `train_arguments`, `train_deepspeed`, `train_data`, `train_report`, `train_signals`.

A mistake of the user ends all ranks with exit code 2 before training, SIGINT with 130, SIGTERM with 143.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

from train_signals import SignalWatch, ignore_signals, is_rank_0

if __name__ == "__main__":  # the imports below take seconds, in which Ctrl-C is as likely as later
    watch = SignalWatch()
    logging.disable(logging.WARNING)  # of kernels and accelerators that are not there

import torch
import torch.distributed as dist
import transformers
from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback, default_data_collator, set_seed

from dist_optim.errors import DistOptimError
from dist_optim.integrations.transformers import Trainer
from dist_optim.ranks.agreement import assert_ranks_equal, gather_objects
from dist_optim.ranks.gloo import use_one_worker_each
from dist_optim.ranks.together import raise_together, together
from train_arguments import UsageError, make_arguments, read_arguments
from train_data import Blocks, block_losses, load_blocks, load_model, load_tokenizer
from train_deepspeed import settle_deepspeed
from train_report import (
    Progress,
    Recorder,
    RunDirectory,
    find_checkpoint,
    optimizer_state_bytes,
    peak_memory_bytes,
    print_summary,
    summarize,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

REFUSED = 2
OWN = ("given", "local_rank")
"""What ranks need not have alike: which flags were typed, and the launcher's number."""
SIGNAL_GRACE_S = 2.0
USERS_MISTAKES = (DistOptimError, ValueError, ImportError, OSError)


class TrainingJob(Trainer):
    """The Trainer, with the speed in its logs, and the command line's notion of where to begin.

    Attributes:
        recorder: Counts tokens and time.
    """

    recorder: Recorder

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """As in transformers; trackers are given the tokens per second of all ranks, too."""
        if "loss" in logs:
            logs["tokens_per_second"] = self.recorder.tokens_per_second(self.state.global_step)
        super().log(logs, start_time)


def main(argv: list[str], watch: SignalWatch) -> None:
    """Run the whole job on this rank; ends the process itself when the user's request cannot be served."""
    _quieten_libraries()
    use_one_worker_each()
    try:
        asked = _meet(argv)
        parts = together(lambda: _settled(asked), otherwise=UsageError)
        directory = RunDirectory(parts[-1].output_dir) if is_rank_0() else None
        is_new = together(
            lambda: directory is None or directory.claim(asked.overwrite_output_dir, asked.resume_from_checkpoint),
            otherwise=UsageError,
        )
        is_new = gather_objects(is_new)[0]
    except DistOptimError as mistake:
        _refuse(mistake)
    if is_new:
        _run(parts, directory, watch)
    else:
        _say(f"{asked.output_dir} holds this run, finished: there is nothing to do. --overwrite_output_dir trains on.")
    _leave()


def _run(parts: Any, directory: RunDirectory | None, watch: SignalWatch) -> None:
    """Train and leave the results, or refuse. Collective over all ranks."""
    job: TrainingJob | None = None
    model, data, arguments = parts
    resume = arguments.resume_from_checkpoint
    try:
        checkpoint = together(lambda: find_checkpoint(resume, arguments.output_dir), otherwise=UsageError)
        job = made = together(
            lambda: _make_job(model, data, arguments, directory, checkpoint is not None), otherwise=UsageError
        )
        watch.follow(directory.discard if directory else lambda: None, lambda: made.state.global_step)
        if resume is not None:
            _say(f"resuming from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning")
        _train(made, checkpoint)
    except USERS_MISTAKES as mistake:
        if job is not None and job.recorder.has_begun:
            raise
        if directory is not None:
            directory.give_up()
        _refuse(mistake)
    _finish(made, directory, watch)


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
    if _num_ranks_asked_for() != num_ranks:
        raise error or UsageError(
            f"The launcher was asked for {_num_ranks_asked_for()} ranks, and accelerate sees {num_ranks}. Start CPU "
            "ranks with --config_file configs/accelerate/ddp_cpu_2.yaml, GPU ranks with --multi_gpu."
        )
    raise_together(error)
    assert asked is not None  # a rank without arguments has an error, and has raised it
    items = [(f"--{name}", value) for name, value in sorted(vars(asked).items()) if name not in OWN]
    assert_ranks_equal("The arguments of launch/train.py", items, "Start all ranks with the same.")
    return asked


def _num_ranks_asked_for() -> int | str:
    """What the launcher's environment says; without a GPU, `accelerate launch --num_processes 2` starts one process."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    started_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return "several" if started_by_accelerate and "MASTER_ADDR" in os.environ else 1


def _settled(asked: Namespace) -> Any:
    settle_deepspeed(asked)
    return make_arguments(asked)


def _make_job(
    model_arguments: Any, data_arguments: Any, arguments: Any, directory: RunDirectory | None, resumes: bool
) -> TrainingJob:
    """Load model, tokenizer and text, and give them to a Trainer. Collective over all ranks.

    Raises:
        DistOptimError: Something the user named cannot be used, or ranks read other text.
    """
    set_seed(arguments.seed)
    tokenizer = load_tokenizer(model_arguments)
    model = load_model(model_arguments, tokenizer, data_arguments.block_size)
    train_blocks, eval_blocks = load_blocks(data_arguments, tokenizer)
    _refuse_small_batch(train_blocks, arguments)
    if arguments.follows_metric:
        log = os.path.join(arguments.output_dir, ".unfinished", "lr_decisions.jsonl")
        arguments.lr_scheduler_kwargs = {"log_path": log, **arguments.lr_scheduler_kwargs}
    arguments.eval_on_start = arguments.eval_on_start and not resumes
    samples = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    recorder = Recorder(directory, samples * data_arguments.block_size)
    job = TrainingJob(
        model,
        arguments,
        data_collator=default_data_collator,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        compute_metrics=lambda found: {"loss": float(found.predictions.mean())},
        preprocess_logits_for_metrics=block_losses,
        callbacks=[recorder, *([Progress()] if is_rank_0() else [])],
    )
    job.recorder = recorder
    job.remove_callback(ProgressCallback)
    job.remove_callback(PrinterCallback)
    return job


def _refuse_small_batch(blocks: Blocks, arguments: Any) -> None:
    needed = arguments.per_device_train_batch_size * arguments.world_size
    if len(blocks) < needed:
        raise UsageError(
            f"There are {len(blocks)} training blocks, fewer than one batch of {needed} ({arguments.world_size} ranks "
            f"of --per_device_train_batch_size {arguments.per_device_train_batch_size}). Give more text, a smaller "
            "batch, or a smaller --block_size."
        )


def _train(job: TrainingJob, checkpoint: Path | None) -> None:
    """Train to the last step, and evaluate there. Collective over all ranks."""
    texts = [("training text", job.train_dataset.digest()), ("validation text", job.eval_dataset.digest())]
    assert_ranks_equal("What ranks have read", texts, "Give all of them the same files.")
    try:
        job.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        last = [row["step"] for row in job.recorder.rows if "eval_loss" in row][-1:]
        if last != [job.state.global_step]:
            job.evaluate()
    except Exception:
        # When a signal ends the job, a rank that got it first breaks the others' collectives. Theirs is then on its
        # way, and turns this failure into the interruption that it is.
        if job.recorder.has_begun:
            time.sleep(SIGNAL_GRACE_S)
        raise


def _finish(job: TrainingJob, directory: RunDirectory | None, watch: SignalWatch) -> None:
    """Gather what ranks measured, and have rank 0 write the results. Collective over all ranks."""
    accelerator = job.accelerator
    weights = accelerator.get_state_dict(job.model_wrapped)
    summary = {
        **summarize(job, job.recorder),
        "optimizer_state_bytes_per_rank": gather_objects(optimizer_state_bytes(job.optimizer)),
        "peak_memory_bytes_per_rank": gather_objects(peak_memory_bytes(accelerator.device)),
    }
    if directory is not None:
        model = accelerator.unwrap_model(job.model_wrapped)
        directory.finish(model, weights, job.processing_class, job.recorder.rows, summary)
    accelerator.wait_for_everyone()
    ignore_signals()  # all is written
    watch.follow()
    if directory is not None:
        print_summary(summary, job.args.output_dir)


def _refuse(mistake: Exception) -> NoReturn:
    """End this rank, after rank 0 has said why; the others are on the same way."""
    if is_rank_0():
        print(f"error: {' '.join(str(mistake).split())}", file=sys.stderr, flush=True)
    # The launcher ends the other ranks as soon as one has left; each still leaves by itself, with the right exit code.
    ignore_signals()
    _leave(waits=isinstance(mistake, DistOptimError))  # which all ranks raise together
    sys.exit(REFUSED)


def _leave(waits: bool = True) -> None:
    """Leave the process group, after all that refers to it: its threads must end before the interpreter does."""
    gc.collect()
    if dist.is_initialized():
        if waits:
            dist.barrier()
        dist.destroy_process_group()


def _say(text: str) -> None:
    if is_rank_0():
        print(text, flush=True)


def _quieten_libraries() -> None:
    """Keep the output to the job: no other library's bars, nor its warnings about what is not used here."""
    logging.disable(logging.NOTSET)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns of what it finds by itself
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("DeepSpeed", "bitsandbytes", "torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # accelerate and DeepSpeed call them.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.* is deprecated")
    warnings.filterwarnings("ignore", message="FSDP.state_dict_type")  # its deprecation; FSDP1 has no other door


if __name__ == "__main__":
    main(sys.argv[1:], watch)
