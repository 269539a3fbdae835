"""Memory-efficient optimizers with their one-process trajectory under every sharding.

Reading order, a folder a question: ``specs`` (what an optimizer is), ``optimizers`` (the families), ``ranks`` (what
ranks do together), ``layouts`` (where a tensor lies), ``exchange`` (how it moves), ``stepping`` (how it is stepped),
``proving`` (whether tensors are independent), ``inside_backward`` (the same step, fed by hooks), ``building`` (from a
model and a name), ``planning`` (what a job would take), ``checkpoint``, ``schedulers``, then ``integrations``. A room
imports from those before it alone.

Importing this package needs torch alone; upstream packages and frameworks are imported on use.
"""

# ruff: noqa: E402  Ctrl-C is answered before the imports that take seconds
from dist_optim.integrations import signals as _signals

_signals.end_quietly_on_interrupt()

from dist_optim import optimizers as _optimizers  # noqa: F401  registers the families
from dist_optim.building.build import build_optimizer
from dist_optim.building.layerwise_decay import layerwise_decay
from dist_optim.building.simulate import Machine, Simulation, simulate
from dist_optim.checkpoint import load_checkpoint, save_checkpoint
from dist_optim.errors import DistOptimError
from dist_optim.schedulers import MetricScheduler, build_scheduler
from dist_optim.specs.driver import UpstreamDriver
from dist_optim.specs.hyperparameters import Hyperparameter, Scope, parse_optim_args
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass, get_spec, names, register
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = [
    "DistOptimError",
    "DistributedOptimizer",
    "Hyperparameter",
    "Machine",
    "MetricScheduler",
    "OptimizerSpec",
    "Scope",
    "Simulation",
    "Trait",
    "UpstreamClass",
    "UpstreamDriver",
    "build_optimizer",
    "build_scheduler",
    "get_spec",
    "layerwise_decay",
    "load_checkpoint",
    "names",
    "parse_optim_args",
    "register",
    "save_checkpoint",
    "simulate",
]

__version__ = "0.1.0"
