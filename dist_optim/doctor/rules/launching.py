"""accelerate's file, and FSDP wherever it is set: settings and meshes that are not served."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from dist_optim.doctor.asking import Remedy, asking, refusal_of
from dist_optim.doctor.finding import Change, Finding, Rule
from dist_optim.doctor.subject import Subject
from dist_optim.integrations.cpu_rehearsal import refuse_wrong_size, turn_fsdp_on

__all__ = ["RULES", "plugin_of"]

MESH = "parallelism_config"
AXES = ("dp_replicate", "dp_shard", "tp", "cp", "sp")


def plugin_of(subject: Subject) -> Any:
    """What accelerate's plugin would say of FSDP."""
    wrapped = subject.fsdp("transformer_layer_cls_to_wrap") or ()
    listed = wrapped.split(",") if isinstance(wrapped, str) else list(wrapped)
    return SimpleNamespace(
        fsdp_version=int(subject.fsdp("version", 1)),
        use_orig_params=_is_true(subject.fsdp("use_orig_params", True)),
        cpu_offload=SimpleNamespace(offload_params=_is_true(subject.fsdp("offload_params", False))),
        auto_wrap_policy=str(subject.fsdp("auto_wrap_policy", "")),
        transformer_cls_names_to_wrap=[name.strip() for name in listed] or None,
    )


def _is_true(value: Any) -> bool:
    return str(value).lower() in ("true", "1", "yes")


def _mesh_of(subject: Subject) -> dict[str, int] | None:
    section = (subject.accelerate or {}).get(MESH)
    if not isinstance(section, dict):
        return None
    return {axis: int(section.get(f"{MESH}_{axis}_size") or 1) for axis in AXES}


def _settings(subject: Subject) -> str:
    if not subject.strategy.startswith("fsdp"):
        return ""
    from dist_optim.integrations.accelerate.placing import refuse_fsdp_settings

    mesh = _mesh_of(subject)
    sizes = None if mesh is None else SimpleNamespace(**{f"{axis}_size": size for axis, size in mesh.items()})
    return refusal_of(lambda: refuse_fsdp_settings(plugin_of(subject), sizes))


def _set(subject: Subject, name: str, value: Any) -> Change:
    part, path = subject.fsdp_path(name)
    return Change(part, path, value)  # type: ignore[arg-type]


def _alone(axis: str) -> Remedy:
    def changes(subject: Subject) -> Iterator[Change]:
        mesh = _mesh_of(subject)
        if mesh is not None and mesh[axis] > 1:
            yield Change("accelerate", (MESH, f"{MESH}_{axis}_size"), 1)
            yield Change("accelerate", (MESH, f"{MESH}_dp_shard_size"), mesh["dp_shard"] * mesh[axis])

    example = {"parallelism_config_dp_shard_size": 4, f"parallelism_config_{axis}_size": 2}
    return Remedy(code=f"mesh-{axis}", changes=changes, example={"accelerate": _fsdp(2, 8) | {MESH: example}})


def _fsdp(version: int, processes: int = 2, **settings: Any) -> dict[str, Any]:
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "num_processes": processes,
        "mixed_precision": "bf16",
        "fsdp_config": {"fsdp_version": version, **{f"fsdp_{key}": value for key, value in settings.items()}},
    }


def _find_wrong_size(subject: Subject) -> Iterator[Finding]:
    mesh, ranks = _mesh_of(subject), subject.num_processes
    if mesh is None or any(mesh[axis] > 1 for axis in AXES[3:]):
        return
    replicas, shards, tp = (mesh[axis] for axis in AXES[:3])
    each = {"dp_replicate_size": replicas, "dp_shard_size": shards, "tp_size": tp}
    sizes: Any = SimpleNamespace(total_size=replicas * shards * tp, **each)
    if reason := refusal_of(lambda: refuse_wrong_size(sizes, ranks)):
        along = tp if ranks % tp == 0 and ranks > tp else 1
        kept = replicas if ranks // along % replicas == 0 and ranks // along > replicas else 1
        changes = [Change("accelerate", (MESH, f"{MESH}_tp_size"), along)] if along != tp else []
        changes += [Change("accelerate", (MESH, f"{MESH}_dp_replicate_size"), kept)] if kept != replicas else []
        changes.append(Change("accelerate", (MESH, f"{MESH}_dp_shard_size"), ranks // along // kept))
        yield Finding(code="mesh-size", reason=reason, changes=tuple(changes))


def _find_one_process(subject: Subject) -> Iterator[Finding]:
    launcher = subject.accelerate or {}
    is_one = launcher.get("distributed_type") in ("MULTI_CPU", "NO") and "mpirun_config" not in launcher
    if is_one and subject.num_processes > 1:
        yield Finding(
            code="one-process",
            reason=f"accelerate launch starts {subject.num_processes} processes on one machine only for "
            f"distributed_type MULTI_GPU, FSDP or DEEPSPEED, and one for {launcher['distributed_type']}: it would "
            "train alone. Without a GPU, ranks of MULTI_GPU go to the CPU with use_cpu: true.",
            changes=(Change("accelerate", ("distributed_type",), "MULTI_GPU"),),
        )


def _find_lone_rehearsal(subject: Subject) -> Iterator[Finding]:
    """FSDP on the CPU, in one process."""
    if subject.accelerate is None or not subject.strategy.startswith("fsdp"):
        return
    if not subject.accelerate.get("use_cpu") or subject.num_processes > 1:
        return
    from accelerate.utils import DistributedType

    alone: Any = SimpleNamespace(distributed_type=DistributedType.NO)
    if reason := refusal_of(lambda: turn_fsdp_on(alone)):
        yield Finding(code="rehearsal-alone", reason=reason, changes=(Change("accelerate", ("num_processes",), 2),))


def _find_batch_size(subject: Subject) -> Iterator[Finding]:
    if subject.arguments.get("auto_find_batch_size") and subject.strategy.startswith("fsdp"):
        yield Finding(
            code="batch-size-under-fsdp",
            reason="auto_find_batch_size begins anew where memory ends, and FSDP, in the middle of a pass, cannot: the "
            "job would end there. Set per_device_train_batch_size to what fits, and gradient_accumulation_steps.",
            changes=(Change("arguments", ("auto_find_batch_size",)),),
            is_error=False,
        )


RULES: tuple[Rule, ...] = (
    *asking(
        _settings,
        Remedy(
            code="fsdp1-original-parameters",
            changes=lambda subject: [_set(subject, "use_orig_params", True)],
            example={"accelerate": _fsdp(1, use_orig_params=False)},
        ),
        Remedy(
            code="fsdp1-offload",
            changes=lambda subject: [_set(subject, "offload_params", False)],
            example={"accelerate": _fsdp(1, use_orig_params=True, offload_params=True)},
        ),
        *(_alone(axis) for axis in AXES[3:]),
    ),
    Rule(
        code="mesh-size",
        find=_find_wrong_size,
        example={
            "accelerate": _fsdp(2, 8)
            | {MESH: {"parallelism_config_dp_replicate_size": 2, "parallelism_config_dp_shard_size": 3}}
        },
    ),
    Rule(
        code="rehearsal-alone",
        find=_find_lone_rehearsal,
        example={"accelerate": _fsdp(2, 1) | {"use_cpu": True}},
    ),
    Rule(
        code="batch-size-under-fsdp",
        find=_find_batch_size,
        example={"accelerate": _fsdp(2), "arguments": {"output_dir": "out", "auto_find_batch_size": True}},
    ),
    Rule(
        code="one-process",
        find=_find_one_process,
        example={
            "accelerate": {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "MULTI_CPU",
                "num_processes": 2,
                "use_cpu": True,
            }
        },
    ),
)
