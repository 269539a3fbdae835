"""``verify``: start ranks, let them compare both sides, and say what came out."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch.optim import Optimizer

from dist_optim.building.alike import described, version_of
from dist_optim.building.choice import resolve
from dist_optim.errors import DistOptimError, UnsupportedError, UsageError
from dist_optim.integrations.versions import versions
from dist_optim.ranks.at_work import at_work
from dist_optim.specs.registry import OptimizerSpec, Trait
from dist_optim.testing.failure import RankFailure
from dist_optim.testing.pool import RankPool
from dist_optim.testing.verify.job import DTYPES, STRATEGIES, Job
from dist_optim.testing.verify.on_rank import Outcome, verify_on_rank
from dist_optim.verifying.difference import Difference

__all__ = ["Report", "Verdict", "verify"]


class Verdict(Enum):
    """How a verification ended, and the exit code of the command that made it."""

    EQUAL = "equal"
    DIFFERENT = "different"
    REFUSED = "refused"

    @property
    def exit_code(self) -> int:
        """0, 1 or 2."""
        return list(Verdict).index(self)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a verification found; ``as_json`` is the file to attach to an issue."""

    job: Job
    verdict: Verdict
    differences: tuple[Difference, ...] = ()
    """For every step after which some weight differed, the one that differed most."""
    reason: str = ""
    """Why it was refused, or how a rank failed."""
    audit: str = ""
    spec: OptimizerSpec | None = None
    outcome: Outcome | None = None
    seconds: float = 0.0

    @property
    def figure(self) -> float | None:
        """The largest difference of an element after any step: 0 where all is equal, None where none was compared."""
        if self.verdict is Verdict.REFUSED or (self.reason and not self.differences):
            return None
        return max((one.absolute for one in self.differences), default=0.0, key=lambda one: (one != one, one))

    def as_json(self, command: str = "") -> dict[str, Any]:
        """Plain data: the request, the verdict, the machine and the versions.

        Args:
            command: The command line that asked for it.
        """
        proof = None if self.outcome is None else self.outcome.verdict
        return {
            "verdict": self.verdict.value,
            "largest_difference": None if self.figure is None else repr(self.figure),
            "differences": [one.as_json() for one in self.differences],
            "reason": self.reason,
            "command": command,
            "optimizer": self.job.name,
            "options": described(self.job.options),
            "strategy": self.job.strategy,
            "ranks": self.job.ranks,
            "device": self.job.device,
            "model": self.job.model or "small model of awkward shapes",
            "dtype": self.job.dtype,
            "steps": self.job.steps,
            "elements": self.outcome.num_compared if self.outcome else 0,
            "traits": [] if self.spec is None else sorted(one.value for one in self.spec.traits),
            "proof": None if proof is None else {"independent": proof.is_independent, "reason": proof.reason},
            "audit": self.audit.splitlines(),
            "versions": dict(versions(self.job.name)) | self._own_versions(),
            "platform": platform.platform(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "seconds": round(self.seconds, 1),
        }

    def _own_versions(self) -> dict[str, str]:
        packages = () if self.spec is None else self.spec.packages
        return {name: version_of(name) for name in packages if version_of(name) != "not installed"}


def verify(
    optimizer: str | type[Optimizer],
    *,
    strategy: str = "ddp",
    ranks: int = 2,
    model: str | None = None,
    dtype: str = "float32",
    steps: int = 8,
    device: str | None = None,
    timeout_s: float = 600.0,
    pool: RankPool | None = None,
    **options: Any,
) -> Report:
    """Whether every weight after every step is, to the bit, that of upstream's class in one process.

    Both sides get the same gradients and rates. What cannot be verified is told in the report, not raised.

    Args:
        optimizer: A registered name, or a class at the top of a module that can be imported.
        strategy: One of ``STRATEGIES``.
        ranks: How many; on this machine.
        model: A config.json that transformers knows, or its folder; a small model of awkward shapes when None.
        dtype: Of the model: float32, or bfloat16 (not under ZeRO, which keeps fp32 masters then).
        steps: To take and compare.
        device: "cuda" with one GPU a rank over NCCL, or "cpu" over gloo; None takes GPUs where there are enough.
        timeout_s: The longest that it may take.
        pool: Ranks that run already.
        **options: As for ``build_optimizer``.
    """
    began = time.monotonic()
    device = device or ("cuda" if torch.cuda.device_count() >= ranks else "cpu")
    job = Job(
        optimizer=optimizer,
        options=options,
        strategy=strategy,
        ranks=ranks,
        model=model,
        dtype=dtype,
        steps=steps,
        device=device,
    )
    try:
        spec = _checked(job)
        job = _with_what_is_due(job, spec)
        outcomes = _run(job, pool, timeout_s)
    except DistOptimError as error:
        return Report(job=job, verdict=Verdict.REFUSED, reason=str(error), seconds=time.monotonic() - began)
    except RankFailure as failure:
        return Report(job=job, verdict=Verdict.DIFFERENT, reason=str(failure), seconds=time.monotonic() - began)
    first = outcomes[0]
    verdict = Verdict.REFUSED if first.refusal else Verdict.DIFFERENT if first.differences else Verdict.EQUAL
    return Report(
        job=job,
        verdict=verdict,
        differences=first.differences,
        reason=first.refusal,
        audit=first.audit,
        spec=spec,
        outcome=first,
        seconds=time.monotonic() - began,
    )


def _checked(job: Job) -> OptimizerSpec:
    """Refuse what says nothing, before any rank is started."""
    if job.strategy not in STRATEGIES:
        raise UsageError(f"There is no strategy {job.strategy!r} to verify. Take one of {', '.join(STRATEGIES)}.")
    if job.dtype not in DTYPES:
        raise UsageError(f"dtype {job.dtype!r} is none of {', '.join(DTYPES)}.")
    if job.ranks < 1 or job.steps < 1:
        raise UsageError(f"ranks={job.ranks}, steps={job.steps}: at least 1 of each.")
    if job.strategy == "hsdp" and (job.ranks < 4 or job.ranks % 2):
        raise UsageError(f"hsdp on {job.ranks} ranks: two replicas of at least two ranks each. Take 4 ranks.")
    if job.device not in ("cpu", "cuda"):
        raise UsageError(f'device {job.device!r} is neither "cpu" nor "cuda".')
    if job.device == "cuda" and torch.cuda.device_count() < job.ranks:
        raise UsageError(
            f"{job.ranks} ranks on {torch.cuda.device_count()} GPUs: each rank takes one. Take fewer, or device cpu."
        )
    spec = resolve(job.optimizer, inside_backward=True)
    _refuse_inexact(job, spec)
    return spec


def _refuse_inexact(job: Job, spec: OptimizerSpec) -> None:
    if job.stage is not None and job.dtype != "float32":
        raise UnsupportedError(
            f"{job.strategy} in {job.dtype}: DeepSpeed steps fp32 masters, which the reference does not have here. "
            "Verify in float32, which takes the same way through the engine."
        )
    is_average = job.stage is not None or bool(spec.instead) or bool(job.options.get("reduce_to_owner"))
    if is_average and job.device == "cuda" and job.ranks & (job.ranks - 1):
        raise UnsupportedError(
            f"{job.ranks} ranks on GPUs: the engine's average multiplies by 1/{job.ranks}, which rounds the gradients "
            "themselves. Take 2, 4 or 8 ranks, or device cpu."
        )


def _with_what_is_due(job: Job, spec: OptimizerSpec) -> Job:
    """Where nothing is said, low-rank optimizers take all linear layers, and a rate that has no default is 0.001."""
    due: dict[str, Any] = {}
    if Trait.LOW_RANK in spec.traits:
        due["target_modules"] = "all-linear"
    has_own_rate = job.options.get("relative_step", False)  # Adafactor's
    if not has_own_rate and any(record.name == "lr" and record.default is None for record in spec.records()):
        due["lr"] = 1e-3
    return replace(job, options={**due, **job.options})


def _run(job: Job, pool: RankPool | None, timeout_s: float) -> Sequence[Outcome]:
    if pool is not None:
        return pool.run(verify_on_rank, job, timeout_s=timeout_s)
    backend = "nccl" if job.device == "cuda" else "gloo"
    doing = f"{job.steps} steps, on ranks and in one process"
    with at_work(doing), RankPool(job.ranks, backend=backend, timeout_s=timeout_s) as started:
        return started.run(verify_on_rank, job)
