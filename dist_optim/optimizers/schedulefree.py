"""Schedule-free AdamW, RAdam and SGD: an average of the iterates takes the place of a learning-rate schedule.

Training runs on weights ``y``; ``eval()`` puts the average ``x`` in their place, for evaluating and exporting, and
``train()`` puts ``y`` back. Every upstream instance counts its own steps, so all of them step every time.
"""

from __future__ import annotations

from dist_optim.optimizers.common import epsilon, flag, learning_rate, weight_decay
from dist_optim.specs.hyperparameters import Hyperparameter
from dist_optim.specs.registry import OptimizerSpec, Trait, UpstreamClass

_PACKAGE = "schedulefree"
_EXTRA = "schedulefree"
_LICENCE = "Apache-2.0"
_PAPER = "https://arxiv.org/abs/2405.15682"
_TRAITS = frozenset({Trait.ELEMENTWISE, Trait.WEIGHT_SWAPPING})

# eval() divides by the first beta (schedulefree 1.4.1 checks that for SGD alone).
_BETAS = Hyperparameter(
    name="betas",
    kind="floats",
    default=(0.9, 0.999),
    minimum=0.0,
    maximum=1.0,
    minimum_open=True,
    maximum_open=True,
    meaning="interpolation between the average and the newest iterate; decay rate of squared gradients",
)
# schedulefree 1.4.1 takes a fraction without a word, and then steps at (k + 1) / fraction times the learning rate.
_WARMUP = Hyperparameter(
    name="warmup_steps",
    kind="int",
    default=0,
    minimum=0,
    meaning="steps of linear warm-up, as a whole number: multiply a fraction by the number of training steps",
)
_AVERAGING = (
    Hyperparameter(
        name="r", kind="float", default=0.0, minimum=0.0, meaning="step t weighs t ** r in the average of the iterates"
    ),
    Hyperparameter(
        name="weight_lr_power",
        kind="float",
        default=2.0,
        minimum=0.0,
        meaning="a step weighs its learning rate to this power in the average",
    ),
)

SPECS = (
    OptimizerSpec(
        name="schedule_free_adamw",
        load=UpstreamClass("schedulefree", "AdamWScheduleFree"),
        package=_PACKAGE,
        extra=_EXTRA,
        traits=_TRAITS,
        hyperparameters=(learning_rate(2.5e-3), _BETAS, epsilon(), weight_decay(), _WARMUP, *_AVERAGING),
        paper=_PAPER,
        summary="AdamW that averages its iterates and needs no schedule",
        licence=_LICENCE,
        state_bytes="8 (fp32), 4 (bf16)",
    ),
    OptimizerSpec(
        name="schedule_free_radam",
        load=UpstreamClass("schedulefree", "RAdamScheduleFree"),
        package=_PACKAGE,
        extra=_EXTRA,
        traits=_TRAITS,
        hyperparameters=(
            learning_rate(2.5e-3),
            _BETAS,
            epsilon(),
            weight_decay(),
            *_AVERAGING,
            flag("silent_sgd_phase", True, "leave the weights alone in the first steps, where RAdam would step as SGD"),
        ),
        paper=_PAPER,
        summary="RAdam that averages its iterates and needs neither schedule nor warm-up",
        licence=_LICENCE,
        state_bytes="8 (fp32), 4 (bf16)",
    ),
    OptimizerSpec(
        name="schedule_free_sgd",
        load=UpstreamClass("schedulefree", "SGDScheduleFree"),
        package=_PACKAGE,
        extra=_EXTRA,
        traits=_TRAITS,
        hyperparameters=(
            learning_rate(1.0),
            Hyperparameter(
                name="momentum",
                kind="float",
                default=0.9,
                minimum=0.0,
                maximum=1.0,
                minimum_open=True,
                maximum_open=True,
                meaning="interpolation between the average and the newest iterate",
            ),
            weight_decay(0.0, meaning="L2 penalty, added to the gradient"),
            _WARMUP,
            *_AVERAGING,
        ),
        paper=_PAPER,
        summary="SGD that averages its iterates and needs no schedule",
        licence=_LICENCE,
        state_bytes="4 (fp32), 2 (bf16)",
    ),
)
