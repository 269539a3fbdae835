"""``import_``: what upstream, the Trainer, accelerate or DeepSpeed wrote becomes a checkpoint of ours. One process.

The optimizer is built on the weights, given the state under names, and saved as every run is: so all that a build or a
load refuses is refused here, and what is written loads under any strategy.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_optim.checkpoint.directory import attempt, read_json, written_aside
from dist_optim.checkpoint.folder_seal import seal_alone
from dist_optim.checkpoint.in_and_out.names import assert_fitting, model_of_config, names_by_group
from dist_optim.checkpoint.in_and_out.skeleton import build_on, one_process, skeleton
from dist_optim.checkpoint.in_and_out.sources import Source, find, zero_folder
from dist_optim.checkpoint.in_and_out.upstream_file import load_plain, state_classes_of
from dist_optim.checkpoint.in_and_out.upstream_state import encoded_states
from dist_optim.checkpoint.in_and_out.weight_files import weights_at
from dist_optim.checkpoint.in_and_out.weights import Weights, pairs
from dist_optim.checkpoint.in_and_out.zero_files import read_zero
from dist_optim.checkpoint.optimizer_state import save_optimizer
from dist_optim.checkpoint.run_state import save_checkpoint
from dist_optim.errors import StateDictError, UsageError
from dist_optim.specs.registry import OptimizerSpec, Trait, get_spec
from dist_optim.stepping.optimizer import DistributedOptimizer
from dist_optim.stepping.rank_state import marked

__all__ = ["Import", "import_"]

ALONGSIDE = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.safetensors", "training_args.bin")
"""What the Trainer keeps besides: configuration, tokenizer, its own progress, and the weights by its own names."""


@dataclass(slots=True)
class Import:
    """What was written."""

    directory: Path
    optimizer: str
    steps: int
    tensors: int
    notes: list[str] = field(default_factory=list)


def import_(
    source: str | Path,
    directory: str | Path,
    *,
    optim: str | None = None,
    optim_args: Mapping[str, Any] | None = None,
    target_modules: str | Sequence[str] | None = None,
    model: str | Path | None = None,
    config: str | Path | nn.Module | None = None,
    names: Sequence[Sequence[str]] | None = None,
    steps: int | None = None,
    master_weights: bool = False,
) -> Import:
    """Write a checkpoint that ``load_checkpoint``, and for a Trainer's folder our Trainer, loads. One process.

    Args:
        source: A file of ``torch.save(optimizer.state_dict())``; a folder of transformers' own Trainer, or of
            accelerate's ``save_state``; or what DeepSpeed's ``engine.save_checkpoint`` wrote with an optimizer of ours.
            Read with ``weights_only=True`` and an allow-list, always.
        directory: Appears whole or not at all.
        optim: The registered name of what upstream's class is; DeepSpeed's files say it.
        optim_args: What upstream was built with, where neither its groups say it nor the defaults do.
        target_modules: Which layers were trained in a low-rank space.
        model: A file or folder of weights, where the source has none. Without weights an optimizer's folder is written,
            for ``load_optimizer``.
        config: The folder of the model's ``config.json``, or the model itself on any device, for the order of the
            parameters; None looks into the source.
        names: The parameters' names, group by group, in the order in which the optimizer was given them.
        steps: Steps taken, where nothing in the source counts them.
        master_weights: Of what DeepSpeed trained in half precision: whether the checkpoint is for a model in half
            precision, built with ``master_weights=True``. Else it is for one in fp32, whose weights are the masters.

    Raises:
        CheckpointError: The source is damaged, or none that can be read safely.
        StateDictError: It is unknown which number is which parameter, or they do not fit.
        DistOptimError: As ``build_optimizer``: the state cannot be of this optimizer. Nothing was written.
    """
    given, target = Path(source), Path(directory)
    arguments = dict(optim_args or {})
    with one_process("import_()"):
        tag = zero_folder(given)
        if tag is not None:
            return _read(tag, lambda: _from_zero(tag, target, arguments, master_weights))
        if optim is None:
            raise UsageError(f"{str(source)!r} does not say of which optimizer it is. Give its name: optim, --optim.")
        found = find(given)
        asked = (optim, arguments, target_modules, model, config, names, steps)
        return _read(given, lambda: _from_upstream(found, target, *asked))


def _read(source: Path, act: Callable[[], Import]) -> Import:
    """What a damaged source raises, as one of ours."""
    return attempt(act, source, None, is_reading=True)


def _from_upstream(
    source: Source,
    target: Path,
    optim: str,
    arguments: dict[str, Any],
    target_modules: str | Sequence[str] | None,
    model: str | Path | None,
    config: str | Path | nn.Module | None,
    names: Sequence[Sequence[str]] | None,
    steps: int | None,
) -> Import:
    spec = _spec_of_one(optim)
    spec.load_class()  # packages name their own classes of data when they are imported
    content = _state_dict_in(source.state_dict, spec)
    weights = weights_at(Path(model)) if model is not None else source.weights
    known = _model_of(config, source, content, names)
    found = names_by_group(
        content["param_groups"],
        model=known,
        names=names if names is not None else _exported_names(source.state_dict),
        target_modules=target_modules,
        spec_name=optim,
    )
    groups = [{**group, "params": own} for group, own in zip(content["param_groups"], found, strict=True)]
    tensors = _tensors(weights, known, groups, target)
    run = _skeleton_of(tensors, groups)
    optimizer = build_on(run, groups, optim, arguments)
    state = _by_name(optimizer, content, found)
    assert_fitting(spec, found, state, groups, {name: one.shape for name, one in tensors.items()})
    taken = steps if steps is not None else source.steps
    if taken is not None:
        marked(groups, taken, _mode_of(groups))
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    schedule = load_plain(source.scheduler) if source.scheduler is not None else None
    done = Import(target, optim, optimizer.num_steps, sum(len(own) for own in state.values()))
    if weights is None:
        done.notes.append("There were no weights: this is an optimizer's folder, for load_optimizer.")
        save_optimizer(target, optimizer)
    else:
        _save(target, run, optimizer, schedule, source.folder if source.is_trainers else None)
    return done


def _from_zero(folder: Path, target: Path, arguments: dict[str, Any], master_weights: bool) -> Import:
    found = read_zero(folder)
    if found.has_masters and not master_weights:
        found = found.in_fp32()
    run = skeleton(found.parameters)
    for name, one in found.others.items():
        _register_buffer(run, name, one)
    groups = [dict(group) for group in found.groups]
    optimizer = build_on(run, groups, found.optimizer, arguments, master_weights=found.has_masters)
    state = found.joined_state(_stepped_in_slices(optimizer))
    marked(groups, found.steps, found.mode)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _save(target, run, optimizer, found.schedule, None)
    return Import(target, found.optimizer, found.steps, sum(len(own) for own in state.values()), found.notes)


def _stepped_in_slices(optimizer: DistributedOptimizer) -> Iterator[str]:
    """Parameters of which each rank of a sharded run steps its part."""
    held, spec = optimizer.holdings, optimizer.spec
    for group, names in zip(held.groups, held.names_by_group(), strict=True):
        values = spec.values_in(group, held.division.arguments)
        devices = map(torch.device, ("cpu", "cuda"))  # the files do not say which
        if Trait.ELEMENTWISE in spec.traits and any(spec.driver.runs_on_slices(values, one) for one in devices):
            yield from names


def _spec_of_one(optim: str) -> OptimizerSpec:
    if "+" in optim:
        raise UsageError(
            f"optim={optim!r} is several optimizers, and a state dict is of one. Give one registered name."
        )
    return get_spec(optim)


def _state_dict_in(path: Path, spec: OptimizerSpec) -> dict[str, Any]:
    content = load_plain(path, state_classes_of([spec]))
    groups = content.get("param_groups") if isinstance(content, dict) else None
    if not isinstance(groups, list) or not groups or not isinstance(content.get("state"), dict):
        raise StateDictError(
            f"{str(path)!r} holds no optimizer's state dict, which has state and param_groups. Give what "
            "torch.save(optimizer.state_dict(), ...) wrote."
        )
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        raise StateDictError(f"{str(path)!r} is damaged: a param group has no list of parameters.")
    return dict(content)


def _model_of(
    config: str | Path | nn.Module | None,
    source: Source,
    content: Mapping[str, Any],
    names: Sequence[Sequence[str]] | None,
) -> nn.Module | None:
    if isinstance(config, nn.Module):
        return config
    if config is not None:
        return model_of_config(Path(config))
    if names is None and source.folder is not None and (source.folder / "config.json").is_file():
        return model_of_config(source.folder)
    return None


def _exported_names(path: Path) -> list[list[str]] | None:
    """Those that our own export wrote beside."""
    about = next(
        (at / "export.json" for at in (path.parent, path.parent.parent) if (at / "export.json").is_file()), None
    )
    if about is None:
        return None
    listed = read_json(about).get("param_groups", {})
    return next(iter(listed.values())) if len(listed) == 1 else None


def _tensors(
    weights: Weights | None, known: nn.Module | None, groups: Sequence[Mapping[str, Any]], target: Path
) -> dict[str, Tensor]:
    """All that the model holds, by name: from the weights, or room where there are none."""
    named = [name for group in groups for name in group["params"]]
    if weights is not None:
        _assert_named(weights, known, named)
        wanted = set(_held_by(known)) if known is not None else set(weights.stored)
        return {name: one for name, one in pairs(weights) if name in wanted}
    if known is None:
        raise UsageError("Neither weights nor a model say what shapes the parameters have. Give --model, or --config.")
    shapes = dict(known.named_parameters())
    _assert_listed(named, shapes)
    return {name: torch.zeros(shapes[name].shape, dtype=shapes[name].dtype, device="cpu") for name in named}


def _held_by(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, each once, and the buffers that a state dict has."""
    saved = model.state_dict(keep_vars=True)
    parameters = dict(model.named_parameters())
    return {**parameters, **{name: one for name, one in saved.items() if not isinstance(one, nn.Parameter)}}


def _assert_named(weights: Weights, known: nn.Module | None, named: Sequence[str]) -> None:
    _assert_listed(named, weights.stored)
    held = _held_by(known) if known is not None else {}
    wrong = [
        name for name, one in held.items() if name not in weights.stored or weights.stored[name].shape != one.shape
    ]
    if wrong:
        raise StateDictError(f"The weights have no {wrong[0]!r} of the model's shape ({len(wrong)} names differ).")


def _assert_listed(named: Sequence[str], known: Mapping[str, Any]) -> None:
    missing = [name for name in named if name not in known]
    if missing:
        raise StateDictError(
            f"The weights have no {missing[0]!r} ({len(missing)} of {len(named)} names are missing). Give the weights "
            "that were trained with this state, under the model's own names."
        )


def _skeleton_of(tensors: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]) -> nn.Module:
    """A module with what is trained as parameters, and all else beside it."""
    named = {name for group in groups for name in group["params"]}
    run = skeleton({name: one for name, one in tensors.items() if name in named})
    for name, one in tensors.items():
        if name not in named:
            _register_buffer(run, name, one)
    return run


def _register_buffer(root: nn.Module, name: str, tensor: Tensor) -> None:
    at = root
    *path, last = name.split(".")
    for part in path:
        if part not in at._modules:
            at.add_module(part, nn.Module())
        at = at.get_submodule(part)
    at.register_buffer(last, tensor)


def _by_name(
    optimizer: DistributedOptimizer, content: Mapping[str, Any], names: Sequence[Sequence[str]]
) -> dict[str, dict[str, Any]]:
    numbers = [number for group in content["param_groups"] for number in group["params"]]
    flat = [name for own in names for name in own]
    name_of = dict(zip(numbers, flat, strict=True))
    stray = [number for number in content["state"] if number not in name_of]
    if stray:
        raise StateDictError(f"The state dict has state of {stray[0]!r}, which is in none of its param groups.")
    odd = next((number for number, own in content["state"].items() if not isinstance(own, dict)), None)
    if odd is not None:
        raise StateDictError(
            f"The state of {name_of[odd]!r} is {content['state'][odd]!r:.60}, and no dictionary. Take another file."
        )
    return encoded_states(optimizer, content, name_of)


def _mode_of(groups: Sequence[Mapping[str, Any]]) -> str:
    return "eval" if any(group.get("train_mode") is False for group in groups) else "train"


def _save(target: Path, run: nn.Module, optimizer: DistributedOptimizer, schedule: Any, trainers: Path | None) -> None:
    with written_aside(target, None) as aside:
        save_checkpoint(aside, run, optimizer, None if schedule is None else _Schedule(schedule))
        if trainers is not None:
            attempt(lambda: _copy_alongside(trainers, aside), target, None)
            attempt(lambda: seal_alone(aside), target, None)


def _copy_alongside(source: Path, target: Path) -> None:
    for path in sorted({path for pattern in ALONGSIDE for path in source.glob(pattern) if path.is_file()}):
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)


@dataclass(frozen=True)
class _Schedule:
    """What is saved as a schedule."""

    content: Any

    def state_dict(self) -> Any:
        """As it was read."""
        return self.content
