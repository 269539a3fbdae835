"""The matrices inside a network: what is left without embeddings, the output head, and all that is no matrix."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import nn

from dist_optim.layouts.detect import PlacedParameter, named_modules

__all__ = ["hidden_matrices"]

HEADS = {
    *("lm_head", "head", "embed_out", "output_projection", "output_layer", "proj_out", "unembed"),
    *("classifier", "score", "qa_outputs", "cls"),
}
"""Names of modules whose linear layers give the output, wherever they stand at the top of a model."""


def hidden_matrices(model: nn.Module, placed: Mapping[str, PlacedParameter]) -> set[str]:
    """Names of the 2-D parameters (logical shapes) that are neither embeddings nor of the output head.

    Embeddings are the parameters of ``nn.Embedding`` and ``nn.EmbeddingBag``, of modules whose class says Embedding,
    and parameters with ``embed`` in their own name; so is a head that is tied to one. The head is what
    ``get_output_embeddings()`` returns; else the linear layers under a module with one of the usual names (``lm_head``,
    ``classifier``, ``score``, ...); else the last linear layer, unless it belongs to a block that is repeated, or is
    the only matrix.
    """
    matrices = {name for name, one in placed.items() if len(one.shape) == 2}
    hidden = matrices - set(_embeddings(model, placed))
    heads, is_told = _heads(model)
    inside = [one for head in heads for one in head.modules()]  # a head that FSDP1 has wrapped is inside its wrapper
    own = {name for module in inside for name in _own_names(_name_of(model, module), module, placed)}
    return hidden - own or (set() if is_told else hidden)


def _embeddings(model: nn.Module, placed: Mapping[str, PlacedParameter]) -> Iterator[str]:
    for name, module in named_modules(model):
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or "Embedding" in type(module).__name__:
            yield from _own_names(name, module, placed)
    yield from (name for name in placed if "embed" in name.rpartition(".")[2].lower())


def _heads(model: nn.Module) -> tuple[list[nn.Module], bool]:
    """The modules of the output head, and whether the model says so, by a method or by names."""
    found = {name: module for name, module in named_modules(model) if _is_linear(module)}
    told = _output_embeddings(model) or [found[name] for name in found if HEADS & set(name.split(".")[:2])]
    return (told, True) if told else (_last(found), False)


def _output_embeddings(model: nn.Module) -> list[nn.Module]:
    """By transformers' own word; a model without a head of this kind has no such method, or returns None."""
    for _, module in named_modules(model):
        ask = getattr(module, "get_output_embeddings", None)
        if callable(ask):
            try:
                head = ask()
            except (AttributeError, NotImplementedError):
                head = None
            return [head] if isinstance(head, nn.Module) else []
    return []


def _last(linear: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The last linear layer, where it is no part of a block of which there are several."""
    blocks = Counter(_block(name) for name in linear)
    name = next(reversed(list(linear)), None)
    is_repeated = name is not None and re.search(r"(^|\.)\d+\.", name) and blocks[_block(name)] > 1
    return [] if name is None or is_repeated else [linear[name]]


def _block(name: str) -> str:
    """ "layers.0.mlp.up" and "layers.1.mlp.up" are one."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1N", name)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # transformers' GPT-2


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in named_modules(model) if module is wanted), "")


def _own_names(name: str, module: nn.Module, placed: Mapping[str, PlacedParameter]) -> Iterator[str]:
    """Logical names of a module's own parameters: a tied one has the name under which the model lists it first."""
    ids = {id(parameter) for parameter in module.parameters(recurse=False)}
    yield from (own for own, one in placed.items() if id(one.parameter) in ids)
    yield from (own for own in placed if own.rpartition(".")[0] == name and own.rpartition(".")[2] == "weight")
