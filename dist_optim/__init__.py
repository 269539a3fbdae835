"""Memory-efficient optimizers with their one-process trajectory under every sharding.

Reading order: ``registry`` (what an optimizer is), ``layouts`` (which part of a tensor a rank holds), ``exchange.plan``
and ``exchange.transfer`` (who owns what, and how it moves), ``instance`` (one upstream optimizer with ghosts),
``optimizer`` (the step), ``build`` (from a model and a name), ``schedulers``, ``checkpoint``, then ``integrations``.

Importing this package needs torch alone; upstream packages and frameworks are imported on use.
"""

from dist_optim import optimizers as _optimizers  # noqa: F401  registers the families
from dist_optim.building.build import build_optimizer
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
    "MetricScheduler",
    "OptimizerSpec",
    "Scope",
    "Trait",
    "UpstreamClass",
    "UpstreamDriver",
    "build_optimizer",
    "build_scheduler",
    "get_spec",
    "load_checkpoint",
    "names",
    "parse_optim_args",
    "register",
    "save_checkpoint",
]

__version__ = "0.1.0"
