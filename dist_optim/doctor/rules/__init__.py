"""Everything that the doctor looks for; a rule is one small record, in the file of what it looks at."""

from dist_optim.doctor.finding import Rule
from dist_optim.doctor.rules import arguments, deepspeed, environment, launching, models, optimizers, options

__all__ = ["RULES"]

RULES: tuple[Rule, ...] = (
    *environment.RULES,
    *optimizers.RULES,
    *arguments.RULES,
    *launching.RULES,
    *deepspeed.RULES,
    *models.RULES,
    *options.RULES,
)
