"""What a job would take before it is started: memory, wire and time of a rank, and what fits.

``plan`` is one optimizer under one strategy, ``compare`` several, ``fit`` all that have room. The files that come with
the package, and copies of them: ``shipped``.
"""

from dist_optim.planning.fitting import Fits, compare, fit
from dist_optim.planning.forecast import Forecast, Share, plan
from dist_optim.planning.model import PlannedModel, read_model
from dist_optim.planning.placement import OFFLOADED, PRECISIONS, STRATEGIES

__all__ = [
    "OFFLOADED",
    "PRECISIONS",
    "STRATEGIES",
    "Fits",
    "Forecast",
    "PlannedModel",
    "Share",
    "compare",
    "fit",
    "plan",
    "read_model",
]
