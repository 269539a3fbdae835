"""What `launch/train.py` trains: a model, its tokenizer, and text (files, the hub, or Python's own library).

Everything here is the same on every rank, given the same files, and knows nothing of ranks. Every mistake is a
`UsageError`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from dist_optim.errors import UsageError
from train_arguments import DataArguments, ModelArguments

EMBEDDED_BYTES = {"train": 4_000_000, "validation": 64_000}
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


class Blocks(Dataset[dict[str, Tensor]]):
    """Fixed-length samples, one a row.

    Args:
        rows: ``[blocks, block_size]`` token ids, int32.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}

    def digest(self) -> str:
        """Of all tokens, to compare ranks by."""
        return hashlib.sha256(self.rows.contiguous().numpy().tobytes()).hexdigest()[:16]


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
    size, (texts, held, source) = arguments.block_size, _load_texts(arguments)
    train = _cut(texts, tokenizer, size, 1 if held else 2, source)
    if held:
        validation = _cut(held, tokenizer, size, 1, f"the validation part of {source}")
    else:
        num_held = max(1, round(len(train) * arguments.validation_split_percentage / 100))
        train, validation = train[:-num_held], train[-num_held:]
    return Blocks(train[: arguments.max_train_samples]), Blocks(validation[: arguments.max_eval_samples])


def _load_texts(arguments: DataArguments) -> tuple[list[str], list[str], str]:
    """(training documents, validation documents or none, the source in words)."""
    column, held = arguments.text_column, arguments.validation_file or []
    if arguments.train_file:
        train = read_documents("--train_file", arguments.train_file, column)
        return train, read_documents("--validation_file", held, column), "--train_file"
    if arguments.dataset_name:
        return *_hub_documents(arguments), f"--dataset_name {arguments.dataset_name!r}"
    return *embedded_documents(), "the Python library's source files"


def _cut(documents: list[str], tokenizer: Any, size: int, num_needed: int, source: str) -> Tensor:
    """Blocks of ``size`` tokens out of one long row, an end-of-text token after each document."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    pieces = [torch.tensor(tokenizer(text, **options)["input_ids"] + end, dtype=torch.int32) for text in documents]
    tokens = torch.cat([torch.empty(0, dtype=torch.int32), *pieces])
    num_blocks = tokens.numel() // size
    if num_blocks < num_needed:
        raise UsageError(
            f"{source} gives {num_blocks} blocks of {size} tokens, and {num_needed} are needed. Give more text, or a "
            "smaller --block_size."
        )
    return tokens[: num_blocks * size].view(num_blocks, size)


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
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not found:
            raise UsageError(f"{argument} {pattern!r} matches no file. Give a path or a glob that does.")
        for path in map(Path, found):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UsageError(
                    f"{argument} {str(path)!r} cannot be read as UTF-8 text: {error}. Give a readable file."
                ) from error
            if not text.strip():
                raise UsageError(f"{argument} {str(path)!r} is empty. Give a file with text, or leave it out.")
            is_rows = path.suffix == ".jsonl"
            documents += _json_lines(f"{argument} {str(path)!r}", text, text_column) if is_rows else [text]
    return documents


def _json_lines(source: str, text: str, column: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{source}, line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise UsageError(
                f"{source}, line {number} has no text under {column!r} (it holds: {found}). Name the field with "
                "--text_column."
            )
        yield row[column]


def _hub_documents(arguments: DataArguments) -> tuple[list[str], list[str]]:
    import datasets

    name, column = arguments.dataset_name, arguments.text_column
    try:
        parts = datasets.load_dataset(name, arguments.dataset_config_name)
    except Exception as error:  # the library raises many types: no network, no such name, a configuration is needed
        raise UsageError(
            f"--dataset_name {name!r} cannot be loaded: {error}. Check the name and the network."
        ) from error
    if "train" not in parts or column not in parts["train"].column_names:
        found = {part: parts[part].column_names for part in parts}
        raise UsageError(f"--dataset_name {name!r} has no column {column!r} in a part 'train'; it has {found}.")
    held = next((part for part in ("validation", "test") if part in parts), None)
    return list(parts["train"][column]), list(parts[held][column]) if held else []


def embedded_documents(library: Path | None = None) -> tuple[list[str], list[str]]:
    """Real text without a download: source files of the running Python's standard library, split by file.

    A file's path decides its side and its place in line, so every machine with the same Python gets the same split.
    About 4 MB to train on and 64 kB to validate on. No tests, no installed packages, no empty files.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    left_out = {"dist-packages", "idle_test", "site-packages", "test", "tests"}
    names = [path.relative_to(library) for path in library.rglob("*.py") if path.stat().st_size]
    ordered = sorted((hashlib.sha256(name.as_posix().encode()).hexdigest(), name) for name in names)
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    num_bytes = dict.fromkeys(texts, 0)
    for digest, name in ordered:
        side = "validation" if digest.startswith("0") else "train"
        if not left_out.intersection(name.parts) and num_bytes[side] < EMBEDDED_BYTES[side]:
            texts[side].append((library / name).read_text(encoding="utf-8", errors="replace"))
            num_bytes[side] += len(texts[side][-1])
    return texts["train"], texts["validation"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0-255), then end-of-text and padding: any text, in any language, without a vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, PADDING])
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PADDING}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The named tokenizer, the checkpoint's own, or one token a byte."""
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
    model = _make_model(arguments)
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


def _make_model(arguments: ModelArguments) -> Any:
    name, path = arguments.model_name_or_path, str(arguments.model_config)
    try:
        if name:
            return AutoModelForCausalLM.from_pretrained(name)
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(entries.pop("model_type"), **entries))
    except Exception as error:  # an odd entry can fail anywhere in the config's or the model's constructor
        what = f"{type(error).__name__}: {error}"
        if name:
            raise UsageError(f"--model_name_or_path {name!r} cannot be loaded: {what}") from error
        raise UsageError(
            f"--model_config {path!r} describes no causal language model: {what}. It must be a config.json with a "
            "model_type that transformers knows."
        ) from error
