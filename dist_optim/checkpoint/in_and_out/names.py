"""Which parameter a number of upstream's state dict is: by the order in which whoever wrote it made the groups.

torch's state dicts hold numbers. They are names again only where that order is known: from the state dict itself (torch
keeps ``param_names`` that it was given), from a list, or from a model whose parameters are grouped as they were then. A
wrong guess would give a parameter the moments of another one and no error, so there are no guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_optim.building.targets import select_matrices
from dist_optim.errors import MissingPackageError, StateDictError, UsageError
from dist_optim.specs.registry import OptimizerSpec, Trait

__all__ = ["assert_fitting", "model_of_config", "names_by_group"]

Names = list[list[str]]
HOW = (
    "Give the folder of the model's config.json (config, --config), from which the Trainer's order follows; or the "
    "names themselves, group by group, in the order in which the optimizer was given them (names, --names FILE.json)."
)


def names_by_group(
    groups: Sequence[Mapping[str, Any]],
    *,
    model: nn.Module | None,
    names: Sequence[Sequence[str]] | None,
    target_modules: str | Sequence[str] | None,
    spec_name: str,
) -> Names:
    """Names for the numbers of each group.

    Args:
        groups: Of the state dict.
        model: Whose parameters they are, on any device; None where it is not known.
        names: The answer, where the user gives it.
        target_modules: Which layers were trained in a low-rank space.
        spec_name: For messages.

    Raises:
        StateDictError: They cannot be known, or not so many parameters are there.
    """
    sizes = [len(group["params"]) for group in groups]
    if names is not None:
        return _of_size([list(one) for one in names], sizes, "The names that were given")
    if all(len(group.get("param_names", ())) == size for group, size in zip(groups, sizes, strict=True)) and any(sizes):
        return [list(group["param_names"]) for group in groups]
    if model is None:
        raise StateDictError(f"The state dict has numbers, and nothing says which parameters they are. {HOW}")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if any("rank" in group for group in groups):
        return _of_size(_low_rank(model, trained, groups, target_modules, spec_name), sizes, "The low-rank layers")
    if len(groups) == 1:
        return _of_size([trained], sizes, "The model's parameters")
    if len(groups) == 2:
        decaying = _decaying(model)
        by_decay = [[name for name in trained if (name in decaying) is wanted] for wanted in (True, False)]
        return _of_size(by_decay, sizes, "The Trainer's two groups, with weight decay and without,")
    raise StateDictError(f"The state dict has {len(groups)} param groups, of {sizes} parameters, made by hand. {HOW}")


def _of_size(found: Names, sizes: list[int], what: str) -> Names:
    if [len(one) for one in found] != sizes:
        raise StateDictError(
            f"{what} have {[len(one) for one in found]} members, and the groups of the state dict {sizes}: other "
            f"parameters were trained, or in other groups. {HOW}"
        )
    flat = [name for one in found for name in one]
    if len(set(flat)) != len(flat):
        raise StateDictError(f"{what} name a parameter twice. {HOW}")
    return found


def _low_rank(
    model: nn.Module,
    trained: list[str],
    groups: Sequence[Mapping[str, Any]],
    target_modules: str | Sequence[str] | None,
    spec_name: str,
) -> Names:
    """As transformers has it: all other parameters, then the matrices."""
    if len(groups) != 2 or "rank" in groups[0]:
        raise StateDictError(f"The low-rank groups were made by hand. {HOW}")
    if target_modules is None:
        raise UsageError(
            f"{spec_name} was trained on some layers in a low-rank space. Say which, as in training: target_modules, "
            "--optim_target_modules."
        )
    targets = set(select_matrices(model, target_modules, spec_name))
    return [[name for name in trained if (name in targets) is wanted] for wanted in (False, True)]


def _decaying(model: nn.Module) -> set[str]:
    try:
        from transformers import Trainer
    except ImportError as error:
        raise MissingPackageError(
            f"Two param groups are told apart as transformers' Trainer does it, which cannot be imported ({error}). "
            "pip install transformers, or give the names."
        ) from error
    ask: Any = Trainer.get_decay_parameter_names
    return set(ask(None, model))


def model_of_config(folder: Path) -> nn.Module:
    """The model that a folder's ``config.json`` describes, without weights. No code of the folder is run.

    Raises:
        UsageError: There is none, or transformers does not know it.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(f"config.json is read by transformers ({error}). pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        kind = getattr(transformers, config.architectures[0])
        with torch.device("meta"):
            model: nn.Module = kind(config)
    except Exception as error:  # transformers raises almost anything
        raise UsageError(
            f"{str(folder / 'config.json')!r} makes no model of transformers: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}. {HOW}"
        ) from error
    return model


def assert_fitting(
    spec: OptimizerSpec,
    names: Names,
    state: Mapping[str, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, torch.Size],
) -> None:
    """Refuse state of other parameters than those that it was given to.

    Where any slice of a tensor is stepped alone, each tensor of the state has the parameter's shape. Elsewhere one of
    as many dims, two or more, agrees in at least one of them, or is a matrix of one side.

    Raises:
        StateDictError: With the first that does not fit.
    """
    for members, group in zip(names, groups, strict=True):
        is_alike = Trait.ELEMENTWISE in spec.traits and "rank" not in group
        own = {name: state[name] for name in members if name in state}
        if is_alike and Trait.BLOCKWISE not in spec.traits:
            _assert_alike({name: values for name, values in own.items() if _has_tensors(values)})
        for name, values in own.items():
            for key, value in values.items():
                if isinstance(value, Tensor) and not _fits(value.shape, shapes[name], is_alike):
                    raise StateDictError(
                        f"{name!r} has the shape {tuple(shapes[name])}, and its state {key!r} {tuple(value.shape)}: "
                        f"the numbers are of other parameters, or in another order. {HOW}"
                    )


def _has_tensors(values: Mapping[str, Any]) -> bool:
    """Whether it was stepped: some classes note something of a parameter that has no gradient."""
    return any(isinstance(value, Tensor) for value in values.values())


def _assert_alike(state: Mapping[str, Mapping[str, Any]]) -> None:
    """What one tensor of a group has another one has too."""
    kinds: dict[str, bool] = {}
    for own in state.values():
        kinds |= {key: isinstance(value, Tensor) for key, value in own.items() if value is not None or key not in kinds}
    for name, own in state.items():
        wrong = [key for key, is_tensor in kinds.items() if key not in own or isinstance(own[key], Tensor) != is_tensor]
        if wrong:
            raise StateDictError(
                f"The state of {name!r} has no {wrong[0]!r} like the others of its group: the file is damaged, or put "
                "together of several. Take another one."
            )


def _fits(own: torch.Size, parameter: torch.Size, is_alike: bool) -> bool:
    if own.numel() <= 1 or own == parameter:
        return True
    if is_alike:
        return False
    if len(own) != len(parameter) or len(own) < 2:  # tables of codes, scales of blocks, means of rows
        return True
    is_of_a_side = len(set(own)) == 1 and own[0] in parameter
    return is_of_a_side or any(here == there for here, there in zip(own, parameter, strict=True))
