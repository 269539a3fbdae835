"""What `launch/train.py` trains: a model, its tokenizer, and text (files, the hub, or Python's own library).

Everything here is the same on every rank, given the same files, and knows nothing of ranks.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from train_arguments import DataArguments, ModelArguments, UsageError

EMBEDDED_TRAIN_BYTES = 4_000_000
EMBEDDED_VALIDATION_BYTES = 64_000
DOCUMENTS_PER_BATCH = 256
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


class Blocks(Dataset[dict[str, Tensor]]):
    """Fixed-length samples cut from one long row of tokens."""

    def __init__(self, tokens: Tensor, block_size: int) -> None:
        num_blocks = tokens.numel() // block_size
        self.rows = tokens[: num_blocks * block_size].view(num_blocks, block_size)  # [blocks, block_size] int32

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}

    def first(self, num_blocks: int | None) -> Blocks:
        """The same samples, at most ``num_blocks`` of them."""
        return self if num_blocks is None else Blocks(self.rows[:num_blocks].flatten(), self.rows.shape[1])

    def digest(self) -> str:
        """Of all tokens, to compare ranks by."""
        return hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:16]

    def split(self, validation_percentage: float) -> tuple[Blocks, Blocks]:
        """Hold out the last blocks: (train, validation), at least one block of validation."""
        num_validation = max(1, round(len(self) * validation_percentage / 100))
        train, validation = self.rows[:-num_validation], self.rows[-num_validation:]
        return Blocks(train.flatten(), self.rows.shape[1]), Blocks(validation.flatten(), self.rows.shape[1])


def block_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss a token of each block; blocks are equally long, so that their mean is the mean over tokens.

    Args:
        logits: ``[blocks, block_size, vocabulary]``.
        labels: ``[blocks, block_size]``, not shifted.
    """
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return losses.mean(dim=1)


def load_blocks(arguments: DataArguments, tokenizer: Any) -> tuple[Blocks, Blocks]:
    """Training and validation blocks.

    Raises:
        UsageError: A source is missing, unreadable, empty, or too small for one block.
    """
    train_texts, validation_texts, source = _load_texts(arguments)
    train = Blocks(_tokenize(train_texts, tokenizer), arguments.block_size)
    if validation_texts is None:
        _refuse_short(train, arguments.block_size, 2, source)
        train, validation = train.split(arguments.validation_split_percentage)
    else:
        validation = Blocks(_tokenize(validation_texts, tokenizer), arguments.block_size)
        _refuse_short(validation, arguments.block_size, 1, f"the validation part of {source}")
    _refuse_short(train, arguments.block_size, 1, source)
    return train.first(arguments.max_train_samples), validation.first(arguments.max_eval_samples)


def _load_texts(arguments: DataArguments) -> tuple[list[str], list[str] | None, str]:
    """(training documents, validation documents or None, the source in words)."""
    column = arguments.text_column
    if arguments.train_file:
        train = read_documents("--train_file", arguments.train_file, column)
        held = arguments.validation_file
        return train, read_documents("--validation_file", held, column) if held else None, "--train_file"
    if arguments.dataset_name:
        return *_hub_documents(arguments), f"--dataset_name {arguments.dataset_name!r}"
    return *embedded_documents(), "the Python library's source files"


def read_documents(argument: str, patterns: Sequence[str], text_column: str) -> list[str]:
    """Read all files that the patterns match: one document a file, or one a line of a `.jsonl` file.

    Args:
        argument: The flag that named the patterns, for messages.
        patterns: Paths and globs.
        text_column: The field of a `.jsonl` line that holds the text.

    Raises:
        UsageError: A pattern matches nothing; a file cannot be read, is not text, or is empty.
    """
    documents: list[str] = []
    for path in _expand(argument, patterns):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{argument} {str(path)!r} cannot be read as UTF-8 text: {error}. Give a readable file."
            ) from error
        if not text.strip():
            raise UsageError(f"{argument} {str(path)!r} is empty. Give a file with text, or leave it out.")
        documents += _json_lines(argument, path, text, text_column) if path.suffix == ".jsonl" else [text]
    return documents


def _expand(argument: str, patterns: Sequence[str]) -> list[Path]:
    paths: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise UsageError(f"{argument} {pattern!r} matches no file. Give a path or a glob that does.")
        paths += [Path(match) for match in matches]
    return paths


def _json_lines(argument: str, path: Path, text: str, text_column: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{argument} {str(path)!r}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UsageError(
                f"{argument} {str(path)!r}, line {number} has no text under {text_column!r} (it holds: {found}). "
                "Name the field with --text_column."
            )
        documents.append(row[text_column])
    return documents


def _hub_documents(arguments: DataArguments) -> tuple[list[str], list[str] | None]:
    import datasets

    name = arguments.dataset_name
    try:
        parts = datasets.load_dataset(name, arguments.dataset_config_name)
    except Exception as error:  # the library raises many types: no network, no such name, a configuration is needed
        raise UsageError(
            f"--dataset_name {name!r} cannot be loaded: {error}. Check the name and the network."
        ) from error
    if "train" not in parts or arguments.text_column not in parts["train"].column_names:
        found = {part: parts[part].column_names for part in parts}
        raise UsageError(
            f"--dataset_name {name!r} has no column {arguments.text_column!r} in a part 'train'; it has {found}."
        )
    held = next((parts[part] for part in ("validation", "test") if part in parts), None)
    return list(parts["train"][arguments.text_column]), None if held is None else list(held[arguments.text_column])


def embedded_documents(library: Path | None = None) -> tuple[list[str], list[str]]:
    """Real text without a download: source files of the running Python's standard library, split by file.

    A file's path decides its side and its place in line, so every machine with the same Python gets the same split.
    About 4 MB to train on and 64 kB to validate on.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    validation: list[str] = []
    train_bytes = validation_bytes = 0
    for digest, path in sorted((_digest(path, library), path) for path in _library_files(library)):
        text = path.read_text(encoding="utf-8", errors="replace")
        if digest.startswith("0") and validation_bytes < EMBEDDED_VALIDATION_BYTES:
            validation.append(text)
            validation_bytes += len(text)
        elif not digest.startswith("0") and train_bytes < EMBEDDED_TRAIN_BYTES:
            train.append(text)
            train_bytes += len(text)
    return train, validation


def _library_files(library: Path) -> Iterator[Path]:
    """Modules of the library proper: no tests, no installed packages, no empty files."""
    left_out = {"dist-packages", "idle_test", "site-packages", "test", "tests"}
    for path in library.rglob("*.py"):
        if not left_out.intersection(path.relative_to(library).parts) and path.stat().st_size:
            yield path


def _digest(path: Path, library: Path) -> str:
    return hashlib.sha256(path.relative_to(library).as_posix().encode()).hexdigest()


def _tokenize(documents: Iterable[str], tokenizer: Any) -> Tensor:
    """One row of token ids (int32), an end-of-text token after each document."""
    documents = list(documents)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [torch.empty(0, dtype=torch.int32)]
    for start in range(0, len(documents), DOCUMENTS_PER_BATCH):
        batch = documents[start : start + DOCUMENTS_PER_BATCH]
        for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]:
            pieces.append(torch.tensor(ids + end, dtype=torch.int32))
    return torch.cat(pieces)


def _refuse_short(blocks: Blocks, block_size: int, num_needed: int, source: str) -> None:
    if len(blocks) < num_needed:
        raise UsageError(
            f"{source} gives {len(blocks)} blocks of {block_size} tokens, and {num_needed} are needed. "
            "Give more text, or a smaller --block_size."
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0-255), then end-of-text and padding: any text, in any language, without a vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, PADDING])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The named tokenizer, the checkpoint's own, or one token a byte.

    Raises:
        UsageError: It cannot be loaded.
    """
    source = arguments.tokenizer_name or arguments.model_name_or_path
    if source is None:
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UsageError(f"No tokenizer can be loaded from {source!r}: {error}") from error


def load_model(arguments: ModelArguments, tokenizer: Any, block_size: int) -> nn.Module:
    """The checkpoint, or a fresh model from its config; the caller has set the seed.

    Raises:
        UsageError: It cannot be loaded, its vocabulary is too small for the tokenizer, or its context for the blocks.
    """
    if arguments.model_name_or_path:
        try:
            model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--model_name_or_path {arguments.model_name_or_path!r} cannot be loaded: {error}"
            ) from error
    else:
        model = _model_from_config(str(arguments.model_config))
    model.config.use_cache = False
    vocab_size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocab_size:
        raise UsageError(
            f"The tokenizer has {len(tokenizer)} tokens and the model a vocabulary of {vocab_size}. Set vocab_size in "
            "the model's config to at least that many, or give the model's own --tokenizer_name."
        )
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and block_size > context:
        raise UsageError(f"--block_size {block_size} is longer than the model's context of {context} tokens. Lower it.")
    return model


def _model_from_config(path: str) -> Any:
    """A fresh model of the shape that a config.json describes."""
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(entries.pop("model_type"), **entries))
    except Exception as error:  # an odd entry can fail anywhere in the config's or the model's constructor
        raise UsageError(
            f"--model_config {path!r} describes no causal language model: {type(error).__name__}: {error}. It must "
            "be a config.json with a model_type that transformers knows."
        ) from error
