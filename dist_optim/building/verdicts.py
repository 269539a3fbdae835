"""May each rank step a part of the tensors? What was proven of a class that nobody described, or the user says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from dist_optim.errors import HyperparameterError, UnsupportedError
from dist_optim.proving.known import known_verdict
from dist_optim.proving.prove import prove
from dist_optim.ranks.agreement import gather_objects, num_ranks, own_rank
from dist_optim.ranks.together import together
from dist_optim.specs.composed import OPTIM, ComposedSpec
from dist_optim.specs.driver import ParamGroup
from dist_optim.specs.registry import OptimizerSpec
from dist_optim.specs.verdict import Verdict

__all__ = ["with_verdict"]


def with_verdict(
    spec: OptimizerSpec,
    groups: Sequence[ParamGroup],
    arguments: Mapping[str, Any],
    ranks: dist.ProcessGroup | None,
    independent: bool | None,
) -> OptimizerSpec:
    """The spec, with a verdict where nobody described the class and several ranks could share its work. Collective.

    Rank 0 proves it, for all.

    Args:
        spec: The optimizer.
        groups: Its param groups; ``params`` lists the ``PlacedParameter`` of the group.
        arguments: Constructor keywords for upstream.
        ranks: All ranks that train the model.
        independent: The user's word for it; None to prove it.

    Raises:
        UnsupportedError: On all ranks: the class cannot be stepped on several ranks at all.
        HyperparameterError: ``independent`` was given for an optimizer that is described.
    """
    if not spec.is_undescribed:
        if independent is not None:
            raise HyperparameterError(
                f"independent={independent} says how a class without a name here may be stepped; {spec.name} is "
                "described. Leave it out."
            )
        return spec
    if num_ranks(ranks) == 1:
        return spec
    if isinstance(spec, ComposedSpec):
        return _with_verdicts(spec, groups, arguments, ranks, independent)
    verdict = _proven(spec, groups, arguments, ranks) if independent is None else _as_said(spec, independent)
    if verdict.refusal:
        raise UnsupportedError(verdict.refusal)
    return replace(spec, verdict=verdict)


def _with_verdicts(
    spec: ComposedSpec,
    groups: Sequence[ParamGroup],
    arguments: Mapping[str, Any],
    ranks: dist.ProcessGroup | None,
    independent: bool | None,
) -> OptimizerSpec:
    """Every class that nobody described by itself, with the groups that it steps."""

    def own(name: str) -> list[ParamGroup]:
        mine = (group for group in groups if group[OPTIM] == name)
        return [{key: value for key, value in group.items() if key != OPTIM} for group in mine]

    return spec.with_verdicts(
        {
            name: with_verdict(part, own(name), arguments[name], ranks, independent) if part.is_undescribed else part
            for name, part in spec.parts.items()
        }
    )


def _proven(
    spec: OptimizerSpec, groups: Sequence[ParamGroup], arguments: Mapping[str, Any], ranks: dist.ProcessGroup | None
) -> Verdict:
    is_first = own_rank(ranks) == 0
    proven = together(
        lambda: (known_verdict(spec, groups, arguments) or prove(spec, groups, arguments)) if is_first else None,
        ranks,
        doing=f"Trying out {spec.name}",
    )
    verdict: Verdict = gather_objects(proven, ranks)[0]
    return verdict


def _as_said(spec: OptimizerSpec, independent: bool) -> Verdict:
    return Verdict(
        name=spec.name,
        is_independent=independent,
        reason=f"as the user says (independent={independent})",
        ghosts="empty",
        evaluations=1,
    )
