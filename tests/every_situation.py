"""Every row of docs/situations.md but the one whose ranks end, in order."""

from situations import SITUATIONS
from situations_accelerate import WITH_ACCELERATE
from situations_alone import ROWS
from situations_loops import LOOPS
from situations_models import MODELS

EVERY_ROW = (*SITUATIONS, *LOOPS, *MODELS, *WITH_ACCELERATE, *ROWS)
