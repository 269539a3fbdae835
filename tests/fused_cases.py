"""Parity cases that step inside backward: the gradients come from a loss, through ``fused``."""

from __future__ import annotations

from dataclasses import replace

from cases import all_cases
from parity import Case

_FIRST = {case.name: case for case in reversed(all_cases())}


def _inside(case: Case) -> Case:
    options = {key: value for key, value in case.constructor.items() if key != "fused_backward"}
    return replace(case, constructor=options, label=" ".join(filter(None, (case.label, "inside backward"))))


LOMO = [_inside(case) for case in all_cases() if case.name in ("lomo", "adalomo")]
LAYERWISE = [
    _inside(replace(_FIRST[name], name=f"{name}_layerwise"))
    for name in ("galore_adamw", "galore_adafactor", "galore_adamw_8bit", "apollo_adamw")
]
OTHERS = [_inside(_FIRST[name]) for name in ("adamw_torch", "sgd", "schedule_free_adamw", "flash_adamw")]
FUSED_CASES = [*LOMO, *LAYERWISE, *OTHERS]
