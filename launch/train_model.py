"""The model and the tokenizer of `launch/train.py`."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from train_arguments import ModelArguments, UsageError

__all__ = ["byte_tokenizer", "load_model", "load_tokenizer", "no_decay_names"]

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


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
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
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


def no_decay_names(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay leaves alone: biases, and everything inside a norm layer."""
    return [
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name == "bias" or name.endswith("_bias") or "norm" in type(module).__name__.lower()
    ]
