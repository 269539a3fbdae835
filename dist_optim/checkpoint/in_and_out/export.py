"""``export``: what the unmodified upstream optimizer loads, and the weights as safetensors. One process, no model.

::

    <output>/model.safetensors     the weights to use, with config and tokenizer where there are such
    <output>/optimizer.pt          torch.load(weights_only=True), then load_state_dict of upstream's own class;
                                   of several optimizers in one, optimizer-NAME.pt each
    <output>/scheduler.pt, ...     as they lay there
    <output>/export.json           the class, its groups by names, how to load it
    <output>/training/             the same four, where the weights that the state belongs to are others than those to
                                   use: averages, fp32 masters, ``dtype``
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from dist_optim.checkpoint.build_values import build_values
from dist_optim.checkpoint.directory import attempt, write_json, written_aside
from dist_optim.checkpoint.engine_view import view_of
from dist_optim.checkpoint.group_values import decoded
from dist_optim.checkpoint.in_and_out.folder import Folder
from dist_optim.checkpoint.in_and_out.safetensors_file import write_safetensors, written_as
from dist_optim.checkpoint.in_and_out.skeleton import Choice, build_on, one_process, room, skeleton, specs_of
from dist_optim.checkpoint.in_and_out.soundness import assert_consistent
from dist_optim.checkpoint.in_and_out.upstream_file import loading_text, write_state_dict
from dist_optim.checkpoint.in_and_out.upstream_state import casts_of, upstream_state_dicts
from dist_optim.checkpoint.in_and_out.weights import LogicalWeights, OverlaidWeights, Weights
from dist_optim.checkpoint.optimizer_state import look_into, read_state
from dist_optim.errors import UnsupportedError, UsageError
from dist_optim.specs.composed import ComposedSpec
from dist_optim.specs.hyperparameters import Scope
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["Export", "export"]

WEIGHTS, OPTIMIZER, ABOUT = "model.safetensors", "optimizer.pt", "export.json"
TRAINING = "training"
PARTS = ("weights", "optimizer")
CONFIGURATION = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
"""Configuration and tokenizer of a model, as transformers writes them."""
OF_A_RUN = ("scheduler.pt", "trainer_state.json", "rng_state.pth")
LOMO = {
    "lomo": "lomo-optim's steps inside hooks and keeps no moments, so that its load_state_dict has nothing to load. "
    "Build lomo_optim.Lomo on the exported weights, and go on at the rate that the run had come to.",
    "adalomo": "lomo-optim's keeps its moments in attributes, which its state_dict() leaves out and its "
    "load_state_dict does not fill. lomo_optim.AdaLomo on the exported weights begins with new moments; to keep them, "
    "go on with dist_optim from the checkpoint.",
}
"""Why, and what to do."""
OURS = ("checkpoint.json", "optimizer.json", "export.json", "*.index.json", "run.json")


@dataclass(slots=True)
class Export:
    """What was written."""

    directory: Path
    optimizer: str
    steps: int
    files: list[str] = field(default_factory=list)
    loading: dict[str, str] = field(default_factory=dict)
    """How each file of an optimizer is loaded, in Python."""
    notes: list[str] = field(default_factory=list)
    """What whoever goes on from it must know."""
    left_out: str = ""
    """Why there is no optimizer in it, where both were asked for and upstream loads none."""


def export(
    checkpoint: str | Path,
    output: str | Path | None = None,
    *,
    only: str | None = None,
    dtype: torch.dtype | None = None,
    config: str | Path | None = None,
    optimizer: Choice | None = None,
    optim_args: Mapping[str, Any] | None = None,
) -> Export:
    """Write a checkpoint as the unmodified upstream optimizer and others load it. One process; no model is built.

    The state dict is upstream's own, with parameters by number in the order of the recorded groups: build upstream's
    optimizer on those groups (``export.json`` names them), load the weights that lie beside it, and it goes on to the
    same bits.

    Args:
        checkpoint: A folder of ``save_checkpoint``, ``save_optimizer``, the Trainer or accelerate.
        output: A folder that appears whole or not at all; None for ``<checkpoint>-export``. One that is there is
            replaced.
        only: ``"weights"`` or ``"optimizer"``; None for both.
        dtype: Of the weights to use; None leaves each in its own.
        config: A folder with the configuration and tokenizer; None looks into the checkpoint.
        optimizer: The class that was trained with, where it has no registered name.
        optim_args: What upstream was built with, where neither its groups say it nor the defaults do.

    Raises:
        CheckpointError: It is no checkpoint, or damaged.
        UnsupportedError: Upstream cannot load such a state: with the reason. Nothing was written. (Where weights are
            there too, and both were asked for, they are written, and ``left_out`` says it.)
        UsageError: The arguments fit no checkpoint.
    """
    if only not in (None, *PARTS):
        raise UsageError(f"only={only!r} is neither of {' and '.join(PARTS)}. Leave it out for both.")
    folder = Folder.look(checkpoint)
    target = Path(f"{folder.path}-export") if output is None else Path(output)
    _refuse_inside(target, folder.path)
    if only == "weights" and folder.weights is None:
        raise UsageError(f"{str(checkpoint)!r} holds an optimizer without weights. Give the folder around it.")
    done = Export(target, folder.record["optimizer"], folder.record["num_steps"])
    with one_process("export()"):
        assert_consistent(folder)
        dicts: Mapping[str, _StateDict] = {}
        if only != "weights":
            arguments = dict(optim_args or {})
            try:
                dicts = attempt(
                    lambda: _state_dicts(folder, optimizer, arguments, done), folder.path, None, is_reading=True
                )
            except UnsupportedError as error:
                if only == "optimizer" or folder.weights is None:
                    raise
                done.left_out = str(error)
        with written_aside(target, None) as aside:
            attempt(lambda: _write(aside, folder, dicts, only, dtype, config, done), target, None)
    return done


def _refuse_inside(target: Path, source: Path) -> None:
    if target.resolve() == source.resolve() or source.resolve() in target.resolve().parents:
        raise UsageError(f"The export {str(target)!r} would lie in the checkpoint itself. Give another folder.")


# Optimizer ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _StateDict:
    """What one class of upstream's loads."""

    upstream: type[Optimizer]
    names: list[list[str]]
    content: dict[str, Any]


def _state_dicts(
    folder: Folder, choice: Choice | None, arguments: dict[str, Any], done: Export
) -> dict[str, _StateDict]:
    name, specs = folder.record["optimizer"], specs_of(folder.record["optimizer"], choice)
    for spec in specs.values():
        _refuse_own(spec)
    built = _built(folder, choice, arguments, name)
    view = view_of(built)
    everything = {key for group in build_values(built.holdings) for key in group}
    incoming = look_into(folder.optimizer, view, allow_changed=sorted(everything))  # groups are taken as saved
    read_state(view, incoming)
    groups = decoded(incoming.record["param_groups"], incoming.room)
    incoming.room.clear()
    contents = upstream_state_dicts(built, incoming.state, groups, incoming.extras)
    dtypes = {placed.fqn: torch.float32 if folder.has_masters else placed.dtype for placed in built.holdings.placed}
    found = {}
    for part, content in contents.items():
        own = built.spec.parts[part] if isinstance(built.spec, ComposedSpec) else built.spec
        names = [group["params"] for group in groups if len(contents) == 1 or group["optim"] == part]
        found[part] = _StateDict(own.own_class(), names, content)
        flat = [dtypes[one] for members in names for one in members]
        if casts := casts_of(own.own_class(), content["state"], flat):
            done.notes.append(
                f"{own.own_class().__name__}.load_state_dict casts {', '.join(casts)} to the weights' dtype, which "
                "loses bits: upstream's own resumes do so too."
            )
        if own.instead:
            done.notes.append(
                f"{part} is exported as {own.own_class().__name__}, the same steps with stored gradients."
            )
    return found


def _built(folder: Folder, choice: Choice | None, arguments: dict[str, Any], name: str) -> DistributedOptimizer:
    """The recorded optimizer, on parameters without values."""
    specs = specs_of(name, choice)
    keeps = not specs or any(spec.keeps_tensors for spec in specs.values())
    known = {one: about.dtype for one, about in folder.weights.stored.items()} if folder.weights is not None else {}
    known |= {one[len("weights/") :]: about.dtype for one, about in folder.stored.items() if one[:8] == "weights/"}
    tensors = {
        one: room(torch.Size(shape), known.get(one, torch.float32), is_written=keeps)
        for one, shape in folder.record["shapes"].items()
    }
    groups = [{**group} for group in decoded(_without_tensors(folder.groups), {})]
    given = {**_built_with(folder, specs), **arguments}
    return build_on(skeleton(tensors), groups, name, given, choice=choice, master_weights=folder.has_masters)


def _built_with(folder: Folder, specs: Mapping[str, OptimizerSpec]) -> dict[str, Any]:
    """What the record says of the constructor's arguments, where they are of one optimizer."""
    first: dict[str, Any] = next(iter(folder.record["build"]), {})
    return {
        key: first[key]
        for spec in (specs.values() if len(specs) == 1 else ())
        for key in spec.in_scope(Scope.CONSTRUCTOR)
        if key in first
    }


def _without_tensors(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in group.items() if not (isinstance(value, dict) and value.keys() != {"tuple"})}
        for group in groups
    ]


def _refuse_own(spec: OptimizerSpec) -> None:
    if spec.package == "dist-optim":
        raise UnsupportedError(
            f"{spec.name} has no upstream optimizer that loads a state: {LOMO.get(spec.name, 'its class is ours.')}"
        )


# Files ----------------------------------------------------------------------------------------------------------------


def _write(
    aside: Path,
    folder: Folder,
    dicts: Mapping[str, _StateDict],
    only: str | None,
    dtype: torch.dtype | None,
    config: str | Path | None,
    done: Export,
) -> None:
    to_use = None if only == "optimizer" else folder.weights
    to_train = to_use if not (dicts and to_use is not None) else _training_weights(folder, to_use)
    is_apart = bool(dicts) and to_use is not None and (to_train is not to_use or _rounds(to_use, dtype))
    at_optimizer = aside / TRAINING if is_apart else aside
    at_optimizer.mkdir(exist_ok=True)
    places = [(aside, to_use, dtype)] + ([(at_optimizer, to_train, None)] if is_apart else [])
    for place, weights, own_dtype in places:
        if weights is not None:
            weights.check()
            write_safetensors(place / WEIGHTS, weights, own_dtype)
            _copy_configuration(folder.path if config is None else Path(config), place, is_given=config is not None)
    if only is None and not done.left_out:  # with a schedule and without an optimizer, a resume would begin it anew
        _copy_run(folder.path, at_optimizer)
    for name, one in dicts.items():
        file = OPTIMIZER if len(dicts) == 1 else f"optimizer-{name}.pt"
        classes = write_state_dict(at_optimizer / file, one.content)
        relative = str((at_optimizer / file).relative_to(aside))
        done.loading[relative] = loading_text(relative, classes)
        if classes:
            done.notes.append(f"{relative} holds objects of upstream's, so that loading it has to allow their classes.")
    if is_apart:
        done.notes.append(
            f"The optimizer goes on from the weights in {TRAINING}/; {WEIGHTS} is to be used, not trained."
        )
    write_json(aside / ABOUT, _about(folder, dicts, done))
    done.files += sorted(str(one.relative_to(aside)) for one in aside.rglob("*") if one.is_file())


def _training_weights(folder: Folder, to_use: Weights) -> Weights:
    own = folder.training_weights
    return OverlaidWeights(to_use, LogicalWeights(folder.optimizer / "tensors", only=own)) if own else to_use


def _rounds(weights: Weights, dtype: torch.dtype | None) -> bool:
    return any(written_as(one.dtype, dtype) != one.dtype for one in weights.stored.values())


def _about(folder: Folder, dicts: Mapping[str, _StateDict], done: Export) -> dict[str, Any]:
    return {
        "format": 1,
        "optimizer": done.optimizer,
        "steps": done.steps,
        "classes": {name: f"{one.upstream.__module__}.{one.upstream.__qualname__}" for name, one in dicts.items()},
        "param_groups": {name: one.names for name, one in dicts.items()},
        "loading": done.loading,
        "notes": done.notes,
        "left_out": done.left_out,
    }


def _copy_configuration(source: Path, target: Path, *, is_given: bool) -> None:
    if is_given and not source.is_dir():
        raise UsageError(f"--config {str(source)!r} is no folder. Give the one that holds config.json.")
    left_out = {path for pattern in (*OURS, *OF_A_RUN) for path in source.glob(pattern)}
    for pattern in CONFIGURATION:
        for path in sorted(set(source.glob(pattern)) - left_out):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def _copy_run(source: Path, target: Path) -> None:
    for name in OF_A_RUN:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
