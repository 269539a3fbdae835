"""The exceptions of dist_optim: every one says what happened, why, and what to do.

```
DistOptimError
├── UnknownOptimizerError   (ValueError)           no optimizer has that name
├── HyperparameterError     (ValueError)           unknown key, wrong type, or value out of range
├── TargetModulesError      (ValueError)           `target_modules` is missing or selects nothing
├── ParameterError          (ValueError)           a parameter is stale, foreign, or listed twice
├── StateDictError          (ValueError)           a state dict does not belong to this optimizer or rank
├── ScheduleError           (ValueError)           a learning-rate schedule is unknown, or cannot do what was asked
├── UsageError              (ValueError)           arguments of a job, or what they name, cannot be used
├── MetricError             (ValueError)           no learning-rate decision can be taken from what ranks gave
├── CheckpointError         (RuntimeError)         a checkpoint cannot be written or read
│   └── BackgroundSaveError                        one that was written beside the training could not be
├── WrongModeError          (RuntimeError)         step() while the weights for evaluation are in place
├── NonFiniteGradientError  (ArithmeticError)      a gradient is infinite or NaN, and on_nonfinite="raise"
├── UnsupportedError        (NotImplementedError)  a sound request that cannot keep the promise yet
│   ├── UnsupportedLayoutError                     a sharding that cannot be served
│   └── UnprovenCodeError                          a step reaches code that no proof of independence has seen
├── MissingPackageError     (ImportError)          the upstream package is not installed
├── RankFailedError         (RuntimeError)         something failed on one rank, by an error that is not ours
│   └── StepFailedError                            a step failed on one rank, after other tensors had been updated
├── RankLostError           (RuntimeError)         another rank is silent, or has ended
└── RanksDisagreeError      (RuntimeError)         ranks hold different values where they must be equal
```

A built-in base in parentheses lets callers catch what they already catch. Nothing here imports torch.
"""

__all__ = [
    "BackgroundSaveError",
    "CheckpointError",
    "DistOptimError",
    "HyperparameterError",
    "MetricError",
    "MissingPackageError",
    "NonFiniteGradientError",
    "ParameterError",
    "RankFailedError",
    "RankLostError",
    "RanksDisagreeError",
    "ScheduleError",
    "StateDictError",
    "StepFailedError",
    "TargetModulesError",
    "UnknownOptimizerError",
    "UnprovenCodeError",
    "UnsupportedError",
    "UnsupportedLayoutError",
    "UsageError",
    "WrongModeError",
]


class DistOptimError(Exception):
    """Root of every error that dist_optim raises for something the user can change."""


class UnknownOptimizerError(DistOptimError, ValueError):
    """No registered optimizer has the given name."""


class HyperparameterError(DistOptimError, ValueError):
    """A hyperparameter has an unknown name, a wrong type or a value out of range."""


class TargetModulesError(DistOptimError, ValueError):
    """`target_modules` is missing where it is required, or selects no matrix."""


class ParameterError(DistOptimError, ValueError):
    """A parameter does not belong to the model, is listed twice, or was replaced after the optimizer was built."""


class StateDictError(DistOptimError, ValueError):
    """A state dict does not fit this optimizer: other parameters, another algorithm, or another rank's share."""


class CheckpointError(DistOptimError, RuntimeError):
    """A checkpoint cannot be written or read: no such folder, not a checkpoint, incomplete, or of another model."""


class BackgroundSaveError(CheckpointError):
    """A save beside the training has failed: told at the next call of all ranks, which has changed nothing."""


class ScheduleError(DistOptimError, ValueError):
    """A learning-rate schedule is unknown, has an unknown option, or could never do what it is for."""


class MetricError(DistOptimError, ValueError):
    """What the ranks gave as a metric cannot be reduced to one number."""


class UsageError(DistOptimError, ValueError):
    """The arguments of a job, or a file or folder that they name, cannot be used."""


class WrongModeError(DistOptimError, RuntimeError):
    """A step was asked for while the averaged weights for evaluation are in place."""


class NonFiniteGradientError(DistOptimError, ArithmeticError):
    """A gradient is infinite or not a number, and the optimizer was built with ``on_nonfinite="raise"``."""


class UnsupportedError(DistOptimError, NotImplementedError):
    """The request is sound, but serving it now would break the promise of an equal trajectory."""


class UnsupportedLayoutError(UnsupportedError):
    """A parameter is sharded in a way that cannot be served."""


class UnprovenCodeError(UnsupportedError):
    """A step is about to run a line of the optimizer's class that was never executed while it was proven."""


class MissingPackageError(DistOptimError, ImportError):
    """The upstream package of an optimizer is not installed."""


class RankFailedError(DistOptimError, RuntimeError):
    """Something failed on one rank, by an error that is not ours: the message names both."""


class StepFailedError(RankFailedError):
    """A step failed on one rank, so the parameters are partly updated."""


class RankLostError(DistOptimError, RuntimeError):
    """Another rank has been silent for too long, was killed, or failed: the job cannot go on."""


class RanksDisagreeError(DistOptimError, RuntimeError):
    """Ranks hold different values where the algorithm needs equal ones."""
