"""This machine: versions, missing packages, torch's build, NCCL, the disk of the checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from dist_optim.doctor.asking import refusal_of
from dist_optim.doctor.finding import Finding, Rule
from dist_optim.doctor.subject import Subject
from dist_optim.overrides import TABLE, VERSIONS, check
from dist_optim.specs.catalogue import install_line, missing_packages

__all__ = ["RULES"]

LOCAL_DISKS = ("btrfs", "ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs", "zfs")
"""Kinds of file systems that one machine has for itself."""


def _find_versions(subject: Subject) -> Iterator[Finding]:
    for package, (first, last) in VERSIONS.items():
        installed = subject.environment.versions.get(package)
        if installed is None or _parts(first) <= _parts(installed)[:3] <= _parts(last):
            continue
        yield Finding(
            code="version-untested",
            reason=f"{package} {installed} is installed, and {first} to {last} are what the tests have passed with "
            "(docs/compat.md). What dist_optim reads or extends of it is compared at start-up, and refused by name "
            "where it differs.",
            command=f"pip install '{package}>={first},<={last}'",
            is_error=_parts(installed)[:3] < _parts(first),
        )


def _parts(version: str) -> tuple[int, ...]:
    numbers = version.partition("+")[0].split(".")
    return tuple(int("".join(digit for digit in part if digit.isdigit()) or 0) for part in numbers)


def _find_parts(subject: Subject) -> Iterator[Finding]:
    """What dist_optim reads or extends of the packages of this job, and they lack."""
    asked = {
        "accelerate": subject.accelerate is not None,
        "transformers": bool(subject.arguments),
        "deepspeed": subject.strategy == "deepspeed",
        "FSDP2": subject.strategy == "fsdp2",
        "FSDP1": subject.strategy == "fsdp1",
    }
    for integration, is_needed in asked.items():
        package = TABLE[integration][0].package
        is_there = package in subject.environment.versions
        reason = refusal_of(lambda one=integration: check(one)) if is_needed and is_there else ""  # type: ignore[misc]
        if reason:
            first, last = VERSIONS[package]
            command = f"pip install '{package}>={first},<={last}'"
            yield Finding(code="parts-missing", reason=reason, command=command)


def _find_missing(subject: Subject) -> Iterator[Finding]:
    spec = subject.spec
    if spec is not None and missing_packages(spec):
        names = ", ".join(missing_packages(spec))
        yield Finding(
            code="package-missing",
            reason=f"optimizer {spec.name!r} needs the package {names}, which is not installed.",
            command=install_line(spec),
        )
    for package, extra, is_needed in (
        ("deepspeed", "deepspeed", subject.strategy == "deepspeed"),
        ("accelerate", "train", subject.accelerate is not None or bool(subject.arguments)),
        ("transformers", "train", bool(subject.arguments) or subject.model is not None),
    ):
        if is_needed and subject.environment.versions and package not in subject.environment.versions:
            yield Finding(
                code="package-missing",
                reason=f"The configuration needs {package}, which is not installed.",
                command=f"pip install 'dist-optim[{extra}]'",
            )


def _find_torch_build(subject: Subject) -> Iterator[Finding]:
    if subject.environment.has_gpu and subject.environment.torch_cuda is None:
        yield Finding(
            code="torch-for-cpu",
            reason="This machine has a GPU, and the installed torch is a build without CUDA: all would run on the CPU. "
            "Install the build for CUDA.",
            command="pip install --force-reinstall torch",
        )


def _find_unseen_gpu(subject: Subject) -> Iterator[Finding]:
    here = subject.environment
    if here.has_gpu and here.torch_cuda is not None and not here.sees_gpu:
        yield Finding(
            code="gpu-unseen",
            reason=f"This machine has a GPU, and torch (built for CUDA {here.torch_cuda}) sees none: the driver is "
            "older than that, or CUDA_VISIBLE_DEVICES hides it. torch says which:",
            command="python -c 'import torch; torch.cuda.init()'",
        )


def _find_no_nccl(subject: Subject) -> Iterator[Finding]:
    here = subject.environment
    if here.sees_gpu and not here.has_nccl:
        yield Finding(
            code="no-nccl",
            reason="torch sees GPUs and has no NCCL: ranks could talk over the host alone. Install a build with NCCL.",
            command="pip install --force-reinstall torch",
            is_error=subject.num_processes > 1,
        )


def _find_disk(subject: Subject) -> Iterator[Finding]:
    machines = int((subject.accelerate or {}).get("num_machines", 1))
    if machines > 1 and subject.environment.output_disk in LOCAL_DISKS:
        yield Finding(
            code="local-disk",
            reason=f"The job runs on {machines} machines, and its output folder lies on a disk of this one "
            f"({subject.environment.output_disk}). A checkpoint must be on a disk that all ranks share: name such a "
            "folder in --output_dir.",
        )


RULES: tuple[Rule, ...] = (
    Rule(
        code="version-untested",
        find=_find_versions,
        example={"environment": {"versions": {"torch": "2.6.0"}}},
    ),
    Rule(code="parts-missing", find=_find_parts),
    Rule(
        code="package-missing",
        find=_find_missing,
        example={
            "deepspeed": {"zero_optimization": {"stage": 2}},
            "environment": {"versions": {"torch": "2.13.0", "accelerate": "1.15.0"}},
        },
    ),
    Rule(
        code="torch-for-cpu",
        find=_find_torch_build,
        example={"environment": {"has_gpu": True, "torch_cuda": None}},
    ),
    Rule(
        code="gpu-unseen",
        find=_find_unseen_gpu,
        example={"environment": {"has_gpu": True, "torch_cuda": "12.8"}},
    ),
    Rule(
        code="no-nccl",
        find=_find_no_nccl,
        example={"environment": {"has_gpu": True, "torch_cuda": "12.8", "sees_gpu": True}},
    ),
    Rule(
        code="local-disk",
        find=_find_disk,
        example={
            "accelerate": {
                "compute_environment": "LOCAL_MACHINE",
                "distributed_type": "FSDP",
                "num_machines": 2,
                "fsdp_config": {"fsdp_version": 2},
            },
            "environment": {"output_disk": "ext4"},
        },
    ),
)
