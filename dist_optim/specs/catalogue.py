"""What the registry holds, as plain data for ``dist-optim list``: nothing here imports an upstream package."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import re
from typing import Any

from dist_optim.errors import MissingPackageError
from dist_optim.specs.hyperparameters import Hyperparameter
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

__all__ = ["describe", "describe_hyperparameters", "install_line", "is_non_commercial", "missing_packages"]


def describe(spec: OptimizerSpec) -> dict[str, Any]:
    """Everything about an optimizer except its hyperparameters, ready for JSON."""
    missing = missing_packages(spec)
    return {
        "name": spec.name,
        "summary": spec.summary,
        "paper": spec.paper,
        "package": spec.package,
        "version": _version(spec.package),
        "installed": not missing,
        "install": install_line(spec) if missing else None,
        "licence": spec.licence,
        "non_commercial": is_non_commercial(spec.licence),
        "needs": needs(spec),
        "traits": sorted(trait.value for trait in spec.traits),
        "state_bytes_per_parameter": spec.state_bytes,
        "typical_state_bytes": typical_state_bytes(spec),
        "inside_backward_only": {Trait.LOW_RANK, Trait.FUSED_BACKWARD} <= spec.traits,
        "fixed_arguments": dict(spec.forced),
        "refusal": spec.refusal or None,
    }


def describe_hyperparameters(spec: OptimizerSpec) -> list[dict[str, Any]]:
    """One record a hyperparameter, ready for JSON.

    Only a spec without records of its own (a plug-in's) imports its class for this, and gives none without its package.
    """
    try:
        return [_describe_record(record) for record in spec.records()]
    except MissingPackageError:
        return []


def _describe_record(record: Hyperparameter) -> dict[str, Any]:
    return {
        "name": record.name,
        "type": record.describe_type(),
        "default": _as_json(record.default),
        "required": record.required,
        "minimum": _finite(record.minimum),
        "maximum": _finite(record.maximum),
        "choices": list(record.choices),
        "scope": record.scope.value,
        "meaning": record.meaning,
    }


def needs(spec: OptimizerSpec) -> list[str]:
    """What must be there, or be given, besides the package."""
    return [*(["target_modules"] if Trait.LOW_RANK in spec.traits else []), *spec.needs]


def typical_state_bytes(spec: OptimizerSpec, width: int = 4096) -> float | None:
    """Bytes a parameter of a square fp32 matrix with the default rank, by the spec's text; None where that has none."""
    formula = re.match(r"(?:for an m x n matrix[^:]*: )?(\d[\d.]*)?( ?\([^)]*[mn][^)]*\) / mn)?", spec.state_bytes)
    factor, quotient = formula.groups() if formula else (None, None)
    if factor is None and quotient is None:
        return None
    ranks = [record.default for record in spec.records() if record.name == "rank"]
    sizes = {"m": width, "n": width, "r": ranks[0] if ranks else 1}
    terms = re.findall(r"([\d.]*) ?([mnr]+)", (quotient or "").partition(")")[0])
    total = sum(float(number or 1) * math.prod(sizes[letter] for letter in letters) for number, letters in terms)
    return float(factor or 1) * (total / width**2 if quotient else 1.0)


def is_non_commercial(licence: str) -> bool:
    """Whether a licence forbids commercial use, by its name."""
    return re.search(r"\bNC\b|non-?commercial", licence, re.IGNORECASE) is not None


def install_line(spec: OptimizerSpec) -> str:
    """The command that installs the upstream package and what it imports itself."""
    return f"pip install 'dist-optim[{spec.extra}]'" if spec.extra else f"pip install {spec.package}"


def missing_packages(spec: OptimizerSpec) -> list[str]:
    """The packages without which the class cannot be imported here; looked up, not imported."""
    own = [] if _version(spec.package) or _is_found(spec) else [spec.package]
    return own + [name for name in _companions(spec) if name != spec.package and _version(name) is None]


def _is_found(spec: OptimizerSpec) -> bool:
    """Whether the module is on the path, for a package that was not installed by pip."""
    return isinstance(spec.load, UpstreamClass) and importlib.util.find_spec(spec.load.module.split(".")[0]) is not None


def _companions(spec: OptimizerSpec) -> list[str]:
    """What our extra installs: some packages import others that they do not declare."""
    try:
        requirements = importlib.metadata.requires("dist-optim") or []
    except importlib.metadata.PackageNotFoundError:
        return []  # run from a source tree
    wanted = re.compile(rf"^([\w.-]+).*;\s*extra\s*==\s*['\"]{re.escape(spec.extra)}['\"]")
    return [found[1] for found in map(wanted.match, requirements) if found] if spec.extra else []


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_json(default: Any) -> Any:
    """What JSON has no word for, as text: an infinity, a dtype."""
    is_plain = default is None or isinstance(default, (bool, int, str, tuple, list))
    return default if is_plain or (isinstance(default, float) and math.isfinite(default)) else str(default)


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None
