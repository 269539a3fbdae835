"""accelerate: place the model, then build the optimizer on what will really be trained."""

from dist_optim.integrations.accelerate.placing import prepare

__all__ = ["prepare"]
