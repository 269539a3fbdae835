"""`launch/train.py`: what a finished run leaves, what is refused, and how it ends when it is told to."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from accelerate.utils import DistributedType
from launch_files import REPOSITORY
from patience import PATIENCE_S, wait_until
from torch import nn
from train_runs import (
    GALORE,
    SUMMARY_KEYS,
    TWO_RANKS,
    FinishedRun,
    command,
    environment,
    finished_in,
    finished_run,
    foreign_lines,
    run_in,
)
from trainers import fresh_accelerate

import train
import train_arguments
import train_data
from dist_optim.errors import DistOptimError, UsageError
from dist_optim.integrations import signals
from dist_optim.integrations.quiet import quieten_libraries
from dist_optim.integrations.transformers import Trainer
from dist_optim.integrations.transformers.run_report import FINISHED_NAMES, RunDirectory, strategy_name
from dist_optim.testing import RankPool
from train_arguments import make_arguments, read_arguments


@pytest.fixture(scope="module")
def two_rank_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Through the launcher, as most users start it."""
    # Two micro-batches a step and five steps: two refreshes after the first, a schedule that ends at one fifth.
    flags = ("--max_steps", "5", "--logging_steps", "2", "--eval_steps", "3", "--gradient_accumulation_steps", "2")
    output_dir = tmp_path_factory.mktemp("two") / "run"
    return finished_run(TWO_RANKS, output_dir, *GALORE, "--learning_rate", "1e-3", *flags)


@pytest.fixture(scope="module")
def one_rank_run(one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_in(one_rank, tmp_path_factory.mktemp("one") / "run", *GALORE, "--max_steps", "1")


class TestFinishedRun:
    def test_summary_has_the_promised_keys_and_both_ranks(self, two_rank_run: FinishedRun) -> None:
        summary = two_rank_run.summary
        assert summary.keys() >= SUMMARY_KEYS
        assert (summary["optim"], summary["strategy"], summary["world_size"]) == ("galore_adamw", "ddp", 2)
        assert summary["steps"] == 5
        assert len(summary["optimizer_state_bytes_per_rank"]) == len(summary["peak_memory_bytes_per_rank"]) == 2
        assert summary["eval_loss_last"] < summary["eval_loss_first"]
        assert summary["train_loss_last"] < summary["train_loss_first"]

    def test_one_process_has_no_strategy(self, one_rank_run: FinishedRun) -> None:
        assert (one_rank_run.summary["strategy"], one_rank_run.summary["world_size"]) == ("none", 1)

    def test_each_rank_holds_about_half_of_the_one_process_state(
        self, one_rank_run: FinishedRun, two_rank_run: FinishedRun
    ) -> None:
        (total,) = one_rank_run.summary["optimizer_state_bytes_per_rank"]
        shares = [held / total for held in two_rank_run.summary["optimizer_state_bytes_per_rank"]]
        assert all(0.4 <= share <= 0.6 for share in shares), shares

    def test_metrics_have_a_line_for_each_logging_step_and_evaluation(self, two_rank_run: FinishedRun) -> None:
        assert [row["step"] for row in two_rank_run.metrics if "loss" in row] == [1, 2, 4, 5]
        assert [row["step"] for row in two_rank_run.metrics if "eval_loss" in row] == [0, 3, 5]

    def test_the_schedule_advances_once_a_step_whatever_the_world_size(self, two_rank_run: FinishedRun) -> None:
        rates = {row["step"]: row["learning_rate"] for row in two_rank_run.metrics if "learning_rate" in row}
        assert rates == pytest.approx({1: 1e-3, 2: 0.8e-3, 4: 0.4e-3, 5: 0.2e-3})  # linear, from lr to 0

    def test_the_model_loads_and_gives_the_reported_loss(self, two_rank_run: FinishedRun) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(two_rank_run.output_dir / "model")
        text = "def naïve(x):\n\treturn x  # ≠ y"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        assert two_rank_run.exported_loss() == pytest.approx(two_rank_run.summary["eval_loss_last"], rel=1e-4)

    def test_no_line_is_printed_that_is_not_ours(self, two_rank_run: FinishedRun) -> None:
        assert foreign_lines(two_rank_run.output) == []
        noise = "FutureWarning: `torch.jit.script` is deprecated"
        assert foreign_lines(f"{two_rank_run.output}\n{noise}\n") == [noise], "or nothing is seen"

    def test_output_shows_progress_audit_and_summary_once(self, two_rank_run: FinishedRun) -> None:
        assert "5/5" in two_rank_run.output
        assert two_rank_run.output.count("optimizer state, by rank") == 1
        assert two_rank_run.output.count("step 0/5: validation loss") == 1
        assert two_rank_run.output.count("dist_optim: galore_adamw on 2 ranks") == 1
        assert two_rank_run.output.count("galore_adamw on 2 ranks, ddp") == 1, (
            "the title of the summary, and of the plots"
        )
        assert (two_rank_run.output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert sorted(path.name for path in two_rank_run.output_dir.iterdir()) == sorted(FINISHED_NAMES)


class Kept(logging.Handler):
    """Keeps what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def heard() -> list[str]:
    """What reaches the user of some warnings."""
    handler = Kept()
    logger = logging.getLogger("accelerate.accelerator")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")  # an earlier body's imports may have ignored all
            quieten_libraries()
            logger.warning(
                "Gradient accumulation steps mismatch: GradientAccumulationPlugin has 1, DeepSpeed config has 2."
            )
            logger.warning("the batch size is odd")
            warnings.warn("FSDP.state_dict_type() is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("the loss is odd", stacklevel=1)
    finally:
        logger.removeHandler(handler)
    is_silent = not logging.getLogger("DeepSpeed").isEnabledFor(logging.ERROR)
    return handler.said + [str(one.message) for one in warned] + ["DeepSpeed"] * is_silent


def test_what_is_about_the_users_run_is_heard(one_rank: RankPool) -> None:
    assert one_rank.run(heard) == [["the batch size is odd", "the loss is odd"]]


class TestRefusals:
    """One clear message, exit code 2, no trace of ours, nothing trained."""

    def test_target_modules_that_match_nothing_end_both_ranks(self, two_ranks: RankPool, tmp_path: Path) -> None:
        flags = ("--optim", "galore_adamw", "--optim_target_modules", "attention_typo")
        (code, said), *others = run_in(two_ranks, *flags, "--output_dir", tmp_path / "run")
        (message,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "attention_typo" in message and "self_attn" in message
        assert (code, others) == (2, [(2, "")])
        assert "Traceback" not in said and "validation loss" not in said
        assert not (tmp_path / "run").exists()

    def test_a_mistake_on_the_command_line_ends_both_ranks(self, two_ranks: RankPool, tmp_path: Path) -> None:
        (code, said), *others = run_in(two_ranks, "--optimm", "sgd", "--output_dir", tmp_path)
        assert "error: Unknown argument '--optimm'. Did you mean: --optim" in said and said.count("\n") == 1
        assert (code, others) == (2, [(2, "")])

    def test_a_folder_that_holds_a_run_is_kept(self, one_rank_run: FinishedRun) -> None:
        directory = RunDirectory(str(one_rank_run.output_dir))
        with pytest.raises(UsageError, match="already holds a run.*--overwrite_output_dir"):
            directory.claim(overwrite=False, resume=None)
        assert directory.claim(overwrite=True, resume=None)
        directory.give_up()
        assert one_rank_run.summary["steps"] == 1  # replaced only when the new run has finished

    def test_an_output_dir_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UsageError, match="cannot be written"):
            RunDirectory(str(tmp_path / "file" / "run")).claim(overwrite=False, resume=None)

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("empty.txt", b"  \n", "is empty"),
            ("binary.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
            ("missing.txt", None, "No such file"),
            ("*.nothing", None, "matches no file"),
            ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
            ("other.jsonl", b'{"body": "a"}\n', r"no text under 'text' \(it holds: \['body'\]\)"),
        ],
    )
    def test_unusable_train_file(self, tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=words):
            train_data.read_documents("--train_file", [str(tmp_path / name)], "text")

    def test_too_little_text_for_a_block(self, tmp_path: Path) -> None:
        (tmp_path / "short.txt").write_text("short")
        data = train_arguments.DataArguments(train_file=[str(tmp_path / "short.txt")], block_size=64)
        with pytest.raises(UsageError, match="gives 0 blocks of 64 tokens"):
            train_data.load_blocks(data, train_data.byte_tokenizer())

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--learning_rate fast", "invalid float value"),
            ("--learning_rate -1", "--learning_rate -1.0 is out of range"),
            ("--learning_rate nan", "--learning_rate nan is out of range"),
            ("--learning_rate inf", "--learning_rate inf is out of range: it must be finite"),
            ("--num_train_epochs inf", "--num_train_epochs inf is out of range: it must be finite"),
            ("--seed -1", "--seed -1 is out of range: it must be at least 0"),
            (f"--seed {2**70}", "must be below 4294967296"),
            ("--output_dir=", "--output_dir is missing, or empty"),
            ("--optim galore_adam", "galore_adamw"),
            ("--optim_args lr=0.1", "lr, which has a flag of its own. Use --learning_rate"),
            ("--optim_args weight_decay=0.1", "weight_decay, which has a flag of its own. Use --weight_decay"),
            ("--max_steps 0", "--max_steps 0 is out of range"),
            ("--gradient_accumulation_steps 0", "must be at least 1"),
            ("--lr_scheduler_type greddy", "Did you mean greedy"),
            ("--model_config nowhere.json", "llama_tiny.json"),
            ("--model_name_or_path a --model_config b", "exclude each other"),
            ("--train_file a --dataset_name b", "exclude each other"),
            ("--validation_file a", "needs --train_file"),
            ("stray", "Unknown argument 'stray'"),
        ],
    )
    def test_unusable_arguments(self, flags: str, words: str) -> None:
        with pytest.raises(DistOptimError, match=words):
            make_arguments(read_arguments(["--output_dir", "out", *flags.split()]))

    def test_output_dir_is_required(self) -> None:
        with pytest.raises(UsageError, match="--output_dir"):
            make_arguments(read_arguments([]))

    def test_a_tokenizer_larger_than_the_vocabulary(self, tmp_path: Path) -> None:
        config = json.loads((REPOSITORY / "configs/models/llama_tiny.json").read_text())
        (tmp_path / "small.json").write_text(json.dumps({**config, "vocab_size": 100, "pad_token_id": None}))
        arguments = train_arguments.ModelArguments(model_config=str(tmp_path / "small.json"))
        with pytest.raises(UsageError, match="258 tokens and the model a vocabulary of 100"):
            train_data.load_model(arguments, train_data.byte_tokenizer(), block_size=64)


WATCHED = """
import importlib.util, os, pathlib, subprocess, sys, time
if len(sys.argv) > 2:  # as torchrun's agent, which waits for its rank
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[2]], env={**os.environ, "TORCHELASTIC_RUN_ID": "it"})
spec = importlib.util.spec_from_file_location("signals", SIGNALS)
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
mark = pathlib.Path(sys.argv[1])
watch = signals.SignalWatch()
watch.follow(mark.unlink, lambda: 7)
mark.write_text(str(os.getpid()))
time.sleep(100)
"""


class TestInterruption:
    def test_a_signal_ends_every_rank_and_leaves_no_half_run(self, tmp_path: Path) -> None:
        """Ctrl-C: the launcher passes it on to both ranks, and ends with a code of its own."""
        metrics = tmp_path / "run" / ".unfinished" / "metrics.jsonl"
        flags = ("--max_steps", "100000", "--logging_steps", "1", "--output_dir", tmp_path / "run")
        with started(*command(TWO_RANKS, *flags)) as process:
            wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE_S)
        assert errors.count("interrupted at step ") == 1, errors
        assert 'launch/train.py", line' not in errors
        assert list((tmp_path / "run").iterdir()) == []
        wait_until(lambda: not processes_naming(str(tmp_path)))

    @pytest.mark.parametrize(
        ("sent", "is_agent", "exit_code"),
        [
            (signal.SIGTERM, False, 143),
            (signal.SIGINT, False, 130),
            (signal.SIGKILL, True, -9),  # the agent cannot pass this on: its rank sees that it is gone
        ],
    )
    def test_a_rank_cleans_up_says_how_far_it_was_and_ends(
        self, tmp_path: Path, sent: signal.Signals, is_agent: bool, exit_code: int
    ) -> None:
        program = WATCHED.replace("SIGNALS", repr(signals.__file__))
        mark = tmp_path / "mark"
        with started(sys.executable, "-c", program, *([program] if is_agent else []), mark) as process:
            wait_until(lambda: mark.exists() and mark.read_text() != "")
            process.send_signal(sent)
            _, errors = process.communicate(timeout=PATIENCE_S)  # the rank holds the pipe as long as it lives
        assert (process.returncode, errors) == (exit_code, "\ninterrupted at step 7\n")
        assert not mark.exists()


@contextmanager
def started(*words: str | Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [str(word) for word in words], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def processes_naming(text: str) -> list[int]:
    """Ids of the living processes whose command line holds the text."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and text in " ".join(process.info["cmdline"] or []):
            found.append(process.pid)
    return found


class TestParts:
    def test_arguments_from_a_file_equal_those_from_flags(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text(
            "output_dir: out\nlearning_rate: 1e-3\nbf16: true\noptim_target_modules: [a, b]\n"
            "fsdp_config: {version: 2}\n"
        )
        flags = "--output_dir out --learning_rate 1e-3 --bf16 --optim_target_modules a b --fsdp_config"
        given = [*flags.split(), '{"version": 2}']
        assert read_arguments([str(tmp_path / "run.yaml")]) == read_arguments(given)

    def test_flags_beside_a_file_override_it_on_either_side(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("output_dir: out\nmax_steps: 100\noptim_target_modules: [a, b]\n")
        flags = ["--local_rank=1", str(file), "--max_steps", "5", "--optim_target_modules", "c"]
        asked = read_arguments(flags)
        assert (asked.output_dir, asked.max_steps, asked.optim_target_modules) == ("out", 5, ["c"])
        assert asked.given == ["local_rank", "max_steps", "optim_target_modules", "output_dir"]

    def test_an_unknown_key_in_a_file_is_answered_with_the_near_ones(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text('{"output_dir": "out", "learning_rte": 1}')
        with pytest.raises(UsageError, match="--learning_rate"):
            read_arguments([str(tmp_path / "run.json")])

    @pytest.mark.parametrize(
        "file", sorted((REPOSITORY / "configs" / "runs").glob("*.yaml")), ids=lambda path: path.stem
    )
    def test_every_run_of_the_repository_is_one_that_could_start(self, file: Path) -> None:
        with fresh_accelerate(), mock.patch.dict(os.environ, {"WORLD_SIZE": "1"}):
            asked = read_arguments([str(file)])
            _, _, made = make_arguments(asked)
        assert made.output_dir == f"runs/{file.stem}"
        assert file.read_text().startswith("# torchrun") and f"configs/runs/{file.name}" in file.read_text()

    def test_embedded_text_is_split_by_file_and_always_the_same(self, tmp_path: Path) -> None:
        for number in range(64):
            (tmp_path / f"module_{number}.py").write_text(f"x = {number}\n")
        (tmp_path / "site-packages").mkdir()
        (tmp_path / "site-packages" / "foreign.py").write_text("foreign = 1\n")
        train, validation = train_data.embedded_documents(tmp_path)
        assert sorted(train + validation) == sorted(f"x = {number}\n" for number in range(64))
        assert train
        assert validation
        assert train_data.embedded_documents(tmp_path) == (train, validation)

    def test_blocks_hold_every_token_once_and_validation_is_the_end(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("abcdefgh" * 10)
        (tmp_path / "b.jsonl").write_text('{"text": "ijkl"}\n\n{"text": "mnop"}\n')
        files = [str(tmp_path / "*.txt"), str(tmp_path / "b.jsonl")]
        tokenizer = train_data.byte_tokenizer()
        data = train_arguments.DataArguments(train_file=files, block_size=10, validation_split_percentage=25)
        train, validation = train_data.load_blocks(data, tokenizer)
        end = tokenizer.eos_token
        assert (len(train), len(validation)) == (7, 2)  # 80 + 1 + 4 + 1 + 4 + 1 tokens are 9 blocks and one token
        text = tokenizer.decode(torch.cat([train.rows.flatten(), validation.rows.flatten()]).tolist())
        assert text == f"{'abcdefgh' * 10}{end}ijkl{end}mnop"

    def test_norms_and_biases_do_not_decay(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(3, 2), nn.MultiheadAttention(2, 1))
        decaying = Trainer.get_decay_parameter_names(None, model)
        assert sorted({name for name, _ in model.named_parameters()} - set(decaying)) == [
            *("0.bias", "1.bias", "1.weight", "3.in_proj_bias", "3.out_proj.bias"),
        ]

    @pytest.mark.parametrize(
        ("kind", "fsdp_version", "num_replicas", "name"),
        [
            (DistributedType.NO, None, None, "none"),
            (DistributedType.MULTI_CPU, None, None, "ddp"),
            (DistributedType.FSDP, 1, None, "fsdp1"),
            (DistributedType.FSDP, 2, None, "fsdp2"),
            (DistributedType.FSDP, 2, 2, "hsdp"),
        ],
    )
    def test_strategy_names(
        self, kind: DistributedType, fsdp_version: int | None, num_replicas: int | None, name: str
    ) -> None:
        accelerator: Any = SimpleNamespace(
            distributed_type=kind,
            state=SimpleNamespace(
                fsdp_plugin=SimpleNamespace(fsdp_version=fsdp_version),
                parallelism_config=num_replicas and SimpleNamespace(dp_replicate_size=num_replicas),
            ),
        )
        assert strategy_name(accelerator) == name


def whole_results(directory: RunDirectory, mark: str) -> None:
    """As `finish` leaves them before it moves anything."""
    for name in ("run.json", "metrics.jsonl", "loss.png", "lr.png"):
        (directory.unfinished / name).write_text(mark)
    (directory.unfinished / "model").mkdir()
    (directory.unfinished / "model" / "weights").write_text(mark)
    (directory.unfinished / "summary.json").write_text(json.dumps({"steps": mark}))


class Killed(BaseException):
    pass


def dies_after(number: int, name: str, calls: list[int]) -> Any:
    """The method of `Path`, until all patched methods together were called ``number`` times."""
    original = getattr(Path, name)

    def call(*positional: Any, **named: Any) -> Any:
        if len(calls) == number:
            raise Killed
        calls.append(1)
        return original(*positional, **named)

    return mock.patch.object(Path, name, call)


class TestRestart:
    @pytest.mark.parametrize("number", range(11))
    def test_a_kill_while_results_move_into_place_is_made_up_for(self, tmp_path: Path, number: int) -> None:
        run = RunDirectory(str(tmp_path))
        for mark in ("old", "new"):
            run.claim(overwrite=True, resume=None)
            if mark == "old":
                (run.unfinished / "lr_decisions.jsonl").write_text("old")
            whole_results(run, mark)
            if mark == "old":
                run._move_into_place()
        calls: list[int] = []
        with (
            dies_after(number, "replace", calls),
            dies_after(number, "rename", calls),
            dies_after(number, "unlink", calls),
        ):
            try:
                run._move_into_place()
            except Killed:
                run.discard()  # as a signal would
        assert len(calls) == min(number, 9), "the kill points are counted"
        assert not RunDirectory(str(tmp_path)).claim(overwrite=False, resume="last")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FINISHED_NAMES)
        assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": "new"}
        for name in ("run.json", "metrics.jsonl", "loss.png", "lr.png", "model/weights"):
            assert (tmp_path / name).read_text() == "new"

    def test_results_without_a_summary_are_gone_on_from_or_kept(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        with pytest.raises(UsageError, match="already holds a run"):
            RunDirectory(str(tmp_path)).claim(overwrite=False, resume=None)
        assert RunDirectory(str(tmp_path)).claim(overwrite=False, resume="last")

    def test_a_finished_run_started_again_has_nothing_to_do(
        self, one_rank: RankPool, one_rank_run: FinishedRun
    ) -> None:
        before = one_rank_run.summary
        flags = ("--max_steps", "1", "--resume_from_checkpoint", "last", "--output_dir", one_rank_run.output_dir)
        ((code, said),) = run_in(one_rank, *GALORE, *flags)
        assert code == 0 and "finished: nothing to do" in said
        assert one_rank_run.summary == before


def refusal_of_other_arguments(argv: list[str]) -> str:
    with fresh_accelerate(), pytest.raises(DistOptimError) as caught:
        train._meet([*argv, *(["--seed", "7"] if torch.distributed.get_rank() else [])])
    return f"{type(caught.value).__name__}: {caught.value}"


def test_ranks_with_other_arguments_all_refuse_and_name_the_argument(two_ranks: RankPool) -> None:
    for said in two_ranks.run(refusal_of_other_arguments, ["--output_dir", "out", "--use_cpu"]):
        assert said.startswith("RanksDisagreeError") and "--seed is 42 on rank 0 and 7 on rank 1" in said
