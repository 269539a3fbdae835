"""The arguments of ``build_optimizer``: what each may be."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dist_optim.errors import HyperparameterError, ParameterError, UnsupportedError
from dist_optim.specs.driver import ParamGroup

__all__ = ["check_model", "check_process_group", "check_settings", "listed_names", "refuse_sparse_embeddings"]


def check_model(model: object, call: str = "build_optimizer(") -> None:
    """Refuse what is no model, or has nothing to train.

    Args:
        model: What was given as the model.
        call: The call that takes it, up to the model.

    Raises:
        ParameterError: With what to pass.
    """
    if isinstance(model, nn.Module):
        _refuse_untrainable(model)
        return
    if isinstance(model, (Tensor, Iterable)) and not isinstance(model, (str, bytes)):
        raise ParameterError(
            f"The model is missing: {call}...) was given a {type(model).__name__} in its place. Which part of each "
            f"tensor this rank holds is read off the model itself. Pass {call}model, name, lr=...) for all of its "
            f"parameters, or {call}model, name, params=..., lr=...) for some of them, or for groups."
        )
    raise ParameterError(
        f"The model is missing: {call}...) takes a torch.nn.Module, and was given {model!r:.80}. Pass "
        f"{call}model, name, lr=...)."
    )


def _refuse_untrainable(model: nn.Module) -> None:
    if next(model.parameters(), None) is None:
        raise ParameterError(f"{type(model).__name__} has no parameters: there is nothing to optimize.")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ParameterError(
                f"Parameter {name!r} has no shape yet, since its module is lazy. Make one forward pass first."
            )


def refuse_sparse_embeddings(model: nn.Module, groups: Sequence[ParamGroup]) -> None:
    """Refuse embeddings whose gradients are sparse, at which engines that cut gradients end in torch's own errors.

    Args:
        model: Whose modules are looked at.
        groups: What is stepped. A table that another module has too has a dense gradient in the end.

    Raises:
        UnsupportedError: With the module to change.
    """
    uses = Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))
    names = {id(one.parameter): one.fqn for group in groups for one in group["params"] if one.parameter.requires_grad}
    for module in model.modules():
        is_sparse = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
        if is_sparse and uses[id(module.weight)] == 1 and id(module.weight) in names:
            raise UnsupportedError(
                f"The gradient of {names[id(module.weight)]!r} would be sparse, and only dense ones are stepped by. "
                "Set sparse=False in the embedding, or freeze it."
            )


def check_process_group(process_group: object) -> None:
    """Refuse what ranks cannot talk over. Local: who gave another one cannot be reached.

    Raises:
        ParameterError: It is no process group, or this rank is not in it.
    """
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ParameterError("This rank is not in the process_group. Make this call on the ranks of the group alone.")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise ParameterError(
            f"process_group={process_group!r:.80} is not a process group. Pass None for all ranks, or what "
            "torch.distributed.new_group or mesh.get_group() returned."
        )


def check_settings(
    *,
    bucket_bytes: Any,
    check_ranks_every: Any,
    fused_backward: Any = None,
    reduce_to_owner: Any = False,
    print_audit: Any = True,
    independent: Any = None,
    master_weights: Any = False,
    replicate: Any = None,
    verify_steps: Any = 0,
    min_coverage: Any = None,
) -> None:
    """Refuse settings of ``build_optimizer`` that say nothing.

    Raises:
        HyperparameterError: With what the setting is.
    """
    if not _is_whole(bucket_bytes) or bucket_bytes <= 0:
        raise HyperparameterError(f"bucket_bytes={bucket_bytes!r} is not a whole number of bytes, at least 1.")
    if not _is_whole(check_ranks_every) or check_ranks_every < 0:
        raise HyperparameterError(
            f"check_ranks_every={check_ranks_every!r} is not a whole number of steps: 100 compares in every hundredth, "
            "0 never."
        )
    if not _is_whole(verify_steps) or verify_steps < 0:
        raise HyperparameterError(
            f"verify_steps={verify_steps!r} is not a whole number of steps: 5 verifies the first five, 0 none."
        )
    if min_coverage is not None and not (isinstance(min_coverage, (int, float)) and 0 <= min_coverage <= 1):
        raise HyperparameterError(f"min_coverage={min_coverage!r} is no share: pass a number from 0 to 1, or None.")
    for name, value, allowed in (
        ("fused_backward", fused_backward, (True, False, None)),
        ("reduce_to_owner", reduce_to_owner, (True, False)),
        ("print_audit", print_audit, (True, False)),
        ("independent", independent, (True, False, None)),
        ("master_weights", master_weights, (True, False)),
        ("replicate", replicate, ("elementwise", None)),
    ):
        if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
            raise HyperparameterError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}. Pass one of them.")


def listed_names(what: str, given: Any) -> list[str]:
    """Names that were given as a list, or in another order-free way.

    Raises:
        ParameterError: It is one string, or holds something else than strings.
    """
    if isinstance(given, (str, bytes)):
        raise ParameterError(f"{what}={given!r} is one string, where a list of names is taken. Pass [{given!r}].")
    names = list(given) if isinstance(given, Iterable) else [given]
    strange = [name for name in names if not isinstance(name, str)]
    if strange:
        raise ParameterError(
            f"{what} holds {strange[0]!r:.80}, which is no name. Pass names as model.named_parameters() gives them."
        )
    return names


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)
