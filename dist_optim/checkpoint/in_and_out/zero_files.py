"""What ``engine.save_checkpoint`` wrote with an optimizer of ours, put together again. DeepSpeed is not imported.

``*_optim_states.pt`` holds of each rank its share of our state, by names, and its parts of the fp32 weights; the file
of the model, names and shapes of what lies in those parts, one after the other. Both are pickles that name classes of
DeepSpeed's: they are opened with an allow-list, where each of those stands for an empty class of ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_optim.checkpoint.in_and_out.upstream_file import load_plain
from dist_optim.errors import CheckpointError, UnsupportedError
from dist_optim.specs.driver import STRUCTURE

__all__ = ["ZeroCheckpoint", "read_zero"]

State = dict[str, dict[str, Any]]


class _Inert:
    """In the place of a class of DeepSpeed's: it holds what it was given, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...


class _Number(int):
    """In the place of an enumeration of numbers."""


ALLOWED: tuple[tuple[Any, str], ...] = (
    (_Number, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Inert, "deepspeed.utils.tensor_fragment.tensor_fragment"),
)


@dataclass(slots=True)
class ZeroCheckpoint:
    """A run, with every tensor of the model whole, and the state as the ranks have it."""

    optimizer: str
    steps: int
    mode: str
    groups: list[dict[str, Any]]
    """With names."""
    parameters: dict[str, Tensor]
    """What the groups name, as the optimizer is to be built on it."""
    others: dict[str, Tensor]
    """The rest of the model."""
    masters: dict[str, Tensor]
    """The fp32 weights of what the model holds in half precision."""
    shares: list[State]
    """State by name, rank by rank."""
    schedule: Any
    notes: list[str] = field(default_factory=list)

    @property
    def has_masters(self) -> bool:
        """Whether the model is in half precision, with masters beside it."""
        return bool(self.masters)

    def in_fp32(self) -> ZeroCheckpoint:
        """The same run with a model in fp32, whose weights are the masters."""
        whole = {name: self.masters.get(name, one.float()) for name, one in self.parameters.items()}
        others = {name: one.float() if one.is_floating_point() else one for name, one in self.others.items()}
        return replace(self, parameters=whole, others=others, masters={})

    def joined_state(self, local: Iterable[str]) -> State:
        """State of whole tensors.

        Args:
            local: Names of what each rank steps its part of; all else has one owner, who has all of its state.

        Raises:
            CheckpointError: The parts do not make up a tensor.
        """
        cut, found = set(local), State()
        for name, parameter in self.parameters.items():
            own = [share[name] for share in self.shares if share.get(name)]
            if own:
                found[name] = _joined(name, own, parameter.shape) if name in cut else dict(own[0])
            if own and name in self.masters:
                found[name]["(master)"] = self.masters[name]
        return found


def read_zero(folder: Path) -> ZeroCheckpoint:
    """Read all ranks' files of a tag.

    Raises:
        CheckpointError: A file is missing, damaged, names code, or is of another optimizer.
        UnsupportedError: It was written in a way that is not known here.
    """
    model_files, optimizer_files = _ranked(folder, "*_model_states.pt"), _ranked(folder, "*_optim_states.pt")
    models = [load_plain(path, ALLOWED) for path in model_files]
    if not models:
        raise CheckpointError(f"{str(folder)!r} holds no file of a model.")
    if not optimizer_files:
        raise UnsupportedError(
            f"{str(folder)!r} is of ZeRO stage 0, where DeepSpeed keeps the optimizer of rank 0 alone. Load it through "
            "the engine that saved it, and save with dist_optim.save_checkpoint."
        )
    wrapped = [_section(load_plain(path, ALLOWED), "optimizer_state_dict", path) for path in optimizer_files]
    ours = [_ours(one, path) for one, path in zip(wrapped, optimizer_files, strict=True)]
    _assert_all_ranks(ours, folder)
    return _put_together(models, wrapped, ours, folder)


def _put_together(
    models: Sequence[Mapping[str, Any]],
    wrapped: Sequence[Mapping[str, Any]],
    ours: Sequence[Mapping[str, Any]],
    folder: Path,
) -> ZeroCheckpoint:
    stage = int(wrapped[0].get("zero_stage", 1))
    whole = _weights_of_stage_3(models[0], wrapped) if stage == 3 else _weights_of_stages_1_and_2(models[0], wrapped)
    whole |= _training_weights(ours, whole)
    frozen = _frozen(models, is_cut=stage == 3)
    calls = [one["calls"] for one in ours]
    first = calls[0][0]
    groups = [dict(group) for group in first["param_groups"]]
    listed = [name for group in groups for name in group["params"]]
    dtype = _dtype_of(models[0])
    module = {name: one for name, one in models[0]["module"].items() if isinstance(one, Tensor) and one.numel()}
    missing = [name for name in listed if name not in whole and name not in frozen and name not in module]
    if missing:
        raise CheckpointError(f"{str(folder)!r} has no weights of {missing[0]!r} ({len(missing)} are missing).")
    is_averaged = any("training_weights" in one for one in ours)
    masters = {name: one for name, one in whole.items() if dtype != torch.float32}
    everything = {**module, **frozen, **{name: one.to(dtype) for name, one in whole.items()}}
    found = ZeroCheckpoint(
        optimizer=first["optimizer"],
        steps=int(first["num_steps"]),
        mode="train" if is_averaged else first["mode"],
        groups=[_training(group) for group in groups] if is_averaged else groups,
        parameters={name: everything[name] for name in listed},
        others={name: one for name, one in everything.items() if name not in listed and name not in _tied(models[0])},
        masters=masters,
        shares=[_share(one) for one in calls],
        schedule=models[0].get("lr_scheduler"),
    )
    if wrapped[0].get("dynamic_loss_scale"):
        found.notes.append("The loss scale is DeepSpeed's, and was left out: another engine begins with its own.")
    return found


def _share(calls: Sequence[Mapping[str, Any]]) -> State:
    """All of one rank's state."""
    if any(call.get("extras") for call in calls):
        raise UnsupportedError(
            "The optimizer keeps more than the state of its parameters. Load through the engine that saved it."
        )
    return {name: dict(own) for call in calls for name, own in call["state"].items()}


def _training(group: dict[str, Any]) -> dict[str, Any]:
    return {**group, "train_mode": True} if "train_mode" in group else group


def _joined(name: str, own: Sequence[Mapping[str, Any]], shape: torch.Size) -> dict[str, Any]:
    """One parameter's state of its parts, in the order of the ranks; counts are the same on all of them."""
    found: dict[str, Any] = {}
    for key, value in own[0].items():
        parts = [one[key] for one in own if key in one]
        if not isinstance(value, Tensor) or not value.ndim or key == STRUCTURE:
            filled = [one for one in own if any(isinstance(v, Tensor) and v.numel() > 1 for v in one.values())]
            found[key] = (filled or own)[0][key]
            continue
        flat = torch.cat([part.reshape(-1) for part in parts])
        if flat.numel() != shape.numel():
            raise CheckpointError(
                f"State {key!r} of {name!r} has {flat.numel()} elements on all ranks together, and the tensor "
                f"{shape.numel()}. Files of different saves or ranks lie in the folder: take another checkpoint."
            )
        found[key] = flat.view(shape)
    return found


# Weights --------------------------------------------------------------------------------------------------------------


def _weights_of_stages_1_and_2(model: Mapping[str, Any], wrapped: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Of each param group a flat tensor that the ranks hold a part each of; the parameters one after the other."""
    flats = [one["single_partition_of_fp32_groups"] for one in wrapped]
    paddings = wrapped[0].get("param_alignment_paddings")
    whole: dict[str, Tensor] = {}
    for number, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([parts[number] for parts in flats])
        at = 0
        for place, (name, shape) in enumerate(shapes.items()):
            whole[name] = _narrowed(flat, at, torch.Size(shape), name)
            at += whole[name].numel() + (paddings[number][place] if paddings is not None else 0)
    return whole


def _weights_of_stage_3(model: Mapping[str, Any], wrapped: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Each parameter is cut into equal parts, one a rank, which lie one after the other on each."""
    flats = [torch.cat(list(one["fp32_flat_groups"])) for one in wrapped]
    whole: dict[str, Tensor] = {}
    at = 0
    for name, shape in ((name, torch.Size(own)) for shapes in model["param_shapes"] for name, own in shapes.items()):
        size = math.ceil(shape.numel() / len(flats))
        joined = torch.cat([_narrowed(flat, at, torch.Size([size]), name) for flat in flats])
        whole[name] = joined[: shape.numel()].view(shape)
        at += size
    return whole


def _narrowed(flat: Tensor, at: int, shape: torch.Size, name: str) -> Tensor:
    if at + shape.numel() > flat.numel():
        raise CheckpointError(
            f"DeepSpeed's partitions end before {name!r}: files of different saves lie in the folder."
        )
    return flat.narrow(0, at, shape.numel()).view(shape)


def _training_weights(ours: Sequence[Mapping[str, Any]], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an optimizer that averages, what it goes on from; the files' weights are the averages."""
    if "training_weights" not in ours[0]:
        return {}
    found = {}
    for name, one in whole.items():
        parts = [call[name].reshape(-1) for own in ours for call in own["training_weights"] if name in call]
        flat = torch.cat(parts)
        if flat.numel() != one.numel():
            raise CheckpointError(f"The training weights of {name!r} are not whole: take another checkpoint.")
        found[name] = flat.view(one.shape)
    return found


def _frozen(models: Sequence[Mapping[str, Any]], *, is_cut: bool) -> dict[str, Tensor]:
    shapes = models[0].get("frozen_param_shapes") or {}
    if not is_cut:
        parts = models[0].get("frozen_param_fragments") or {}
        return {name: parts[name].view(torch.Size(shape)) for name, shape in shapes.items() if name in parts}
    found = {}
    for name, shape in shapes.items():
        flat = torch.cat([model["frozen_param_fragments"][name].reshape(-1) for model in models])
        found[name] = flat[: torch.Size(shape).numel()].view(torch.Size(shape))
    return found


def _tied(model: Mapping[str, Any]) -> set[str]:
    """Other names of tensors that have one already."""
    return set(model.get("shared_params") or {})


def _dtype_of(model: Mapping[str, Any]) -> torch.dtype:
    """Of the weights that the engine trained."""
    config = model.get("ds_config")
    for key, dtype in (("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)):
        section = config.get(key) if isinstance(config, dict) else None
        if isinstance(section, dict) and section.get("enabled"):
            return dtype
    return torch.float32


# Files ----------------------------------------------------------------------------------------------------------------


def _ranked(folder: Path, pattern: str) -> list[Path]:
    """In the order of the ranks, which the names count without leading zeros."""
    return sorted(folder.glob(pattern), key=lambda path: [int(one) for one in re.findall(r"\d+", path.name)])


def _section(content: Any, key: str, path: Path) -> Mapping[str, Any]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(path)!r} is no file of an optimizer of DeepSpeed's: it has no {key}.")
    return found


def _ours(wrapped: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    own = next(_dicts_with("dist_optim", wrapped), None)
    if own is None or not isinstance(own.get("calls"), list) or not own["calls"]:
        raise UnsupportedError(
            f"{str(path)!r} is of an optimizer of DeepSpeed's own. Name one of dist_optim's in its JSON from the "
            "start; or take over the weights alone (DeepSpeed's zero_to_fp32), and begin with a new state."
        )
    return own


def _dicts_with(key: str, value: Any) -> Iterator[Mapping[str, Any]]:
    """Where DeepSpeed puts the state dict of the optimizer that it wraps depends on the stage."""
    for one in (value, *value.values()):
        if isinstance(one, dict) and key in one:
            yield one


def _assert_all_ranks(ours: Sequence[Mapping[str, Any]], folder: Path) -> None:
    first = ours[0]["calls"][0]
    for rank, own in enumerate(ours):
        for at, call in enumerate(own["calls"]):
            theirs = (call["optimizer"], call["num_steps"], call["rank"], call["world_size"], len(own["calls"]))
            wanted = (first["optimizer"], first["num_steps"], rank, len(ours), len(ours[0]["calls"]))
            if call["world_size"] is not None and theirs != wanted:
                raise CheckpointError(
                    f"{str(folder)!r}: the file of rank {rank} (call {at}) is of {theirs}, and should be of {wanted} "
                    "(optimizer, steps, rank, ranks, calls). A file is missing, or of another save."
                )
