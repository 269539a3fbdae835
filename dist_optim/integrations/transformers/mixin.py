"""``DistOptimTrainerMixin``: any ``transformers.Trainer``, with its optimizer built once and after placement.

Put it before a Trainer class::

    class MyTrainer(DistOptimTrainerMixin, SFTTrainer): ...

``create_optimizer`` defers (``deferred``). The Trainer then lets accelerate place the model by its strategy, with the
deferred optimizer; what comes back holds the placed parameters, and there it is built.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dist_optim.inside_backward.handle import follow
from dist_optim.integrations import cpu_rehearsal
from dist_optim.integrations.accelerate.tensor_parallel import left_as_it_is
from dist_optim.integrations.transformers import deepspeed as trainer_deepspeed
from dist_optim.integrations.transformers import rehearsal as trainer_rehearsal
from dist_optim.integrations.transformers.beside_training import refuse_unserved_saves
from dist_optim.integrations.transformers.checkpoint import CheckpointingMixin
from dist_optim.integrations.transformers.checks import (
    check_given_optimizer,
    check_made_by_hand,
    check_strategy,
    check_verified_by_engine,
    refuse_smaller_batch,
)
from dist_optim.integrations.transformers.choosing import choice_of, class_and_keywords, keywords_of
from dist_optim.integrations.transformers.deferred import DeferredOptimizer, deferred_class
from dist_optim.integrations.transformers.generation import reading_whole_parameters
from dist_optim.integrations.transformers.grouping import groups_for_trainer, groups_of_patterns
from dist_optim.integrations.transformers.inside_backward import backward_of, settings_inside_backward
from dist_optim.integrations.transformers.loss import LossOfRanksMixin
from dist_optim.integrations.transformers.placing import is_sharded, place_alone
from dist_optim.integrations.transformers.same_job import assert_same_job
from dist_optim.integrations.transformers.schedules import (
    decide_after_evaluation,
    scheduler_for_trainer,
    shared_schedule,
)
from dist_optim.layouts.detect import reshard
from dist_optim.ranks.agreement import gather_objects, num_ranks
from dist_optim.schedulers import metric_scheduler_in
from dist_optim.specs.registry import Trait, get_spec, spec_of_class
from dist_optim.specs.unwrapping import find_optimizer
from dist_optim.stepping.optimizer import DistributedOptimizer

__all__ = ["DistOptimTrainerMixin"]


class DistOptimTrainerMixin(CheckpointingMixin, LossOfRanksMixin):
    """The Trainer's methods that make, clip by, evaluate by and save an optimizer.

    Strategies: one process, DDP, FSDP 1 and 2 (``fsdp`` + ``fsdp_config``, or accelerate's configuration), DeepSpeed.
    On the CPU, FSDP asked for is FSDP done (``cpu_rehearsal``).

    ``create_optimizer`` may be overridden as transformers' guide has it: call ``super()`` and add param groups, or
    return an optimizer made of ``self.get_optimizer_cls_and_kwargs(self.args, self.model)``.
    """

    optimizer_cls_and_kwargs: Any  # transformers' own, as those of CheckpointingMixin

    def __init__(self, *positional: Any, **named: Any) -> None:
        self._num_training_steps = 0
        self._rehearsed_mesh: Any = None
        self._is_fsdp_rehearsed = False
        self._norm_of_backward: Tensor | None = None
        self._named_in_json: tuple[str, dict[str, Any]] | None = None
        super().__init__(*positional, **named)
        self._given = (self.optimizer, self.lr_scheduler)

    # Strategy -----------------------------------------------------------------------------------------------------

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_accelerator_args(**options)  # type: ignore[misc]
        if self.args.device.type == "cpu":
            # accelerate refuses a mesh on the CPU, the arguments' and the launcher's: the rehearsal brings it.
            self._rehearsed_mesh = arguments.pop("parallelism_config", None)
            cpu_rehearsal.fsdp_arguments()
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; on the CPU, FSDP asked for is turned on."""
        trainer_rehearsal.settle_fsdp_settings(self.args)
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if cpu_rehearsal.is_ignored(self.accelerator):
            plugin = trainer_rehearsal.fsdp_plugin(self.args.fsdp_plugin_args)
            cpu_rehearsal.turn_fsdp_on(self.accelerator, plugin, self._rehearsed_mesh)
            self.is_fsdp_enabled = self._is_fsdp_rehearsed = True
        elif self._rehearsed_mesh is not None or cpu_rehearsal.is_mesh_set_aside(self.accelerator):
            cpu_rehearsal.bring_mesh(self.accelerator, self._rehearsed_mesh)

    # Optimizer ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer that the arguments ask for, deferred; ``train()`` builds it when the model is in place.

        Raises:
            DistOptimError: The arguments contradict each other, or the strategy cannot serve the name.
        """
        if self.optimizer is not None:
            return self.optimizer
        placed = self.model if model is None else model
        if self._named_in_json is not None:
            name, settings = self._named_in_json[0], dict(self._named_in_json[1])
            if num_steps := getattr(self.args, "verify_steps", 0):
                settings["verify_steps"] = num_steps
            trained = [parameter for parameter in placed.parameters() if parameter.requires_grad]
            groups = groups_of_patterns(placed, settings.pop("params", None))
            self.optimizer = deferred_class(name)(trained if groups is None else groups, **settings)
            return self.optimizer
        choice, given = choice_of(self, placed)
        if choice is None:
            return super().create_optimizer(*([] if model is None else [model]))  # type: ignore[misc]
        spec = get_spec(choice) if isinstance(choice, str) else spec_of_class(choice)
        groups = (given or {}).pop("params", None)
        values = keywords_of(spec, self.args, given)
        decay = values.pop("weight_decay", None)
        if groups is None:
            # transformers gives GaLore and APOLLO no decay at all: unset, it is the optimizer's own.
            kept = 0.0 if decay is None and Trait.LOW_RANK not in spec.traits else decay
            decays = set(self.get_decay_parameter_names(placed))  # type: ignore[attr-defined]
            groups = groups_for_trainer(placed, decays, kept, values.pop("params", None))
            if spec.rest:
                values.setdefault("rest", spec.rest)  # the Trainer lists parameters; the user did not
        elif decay is not None:
            values["weight_decay"] = decay
        self.optimizer = deferred_class(choice)(groups, **values)
        return self.optimizer

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """A class and its keywords: ``cls(param_groups, **keywords)`` makes what ``create_optimizer`` may return."""
        return class_and_keywords(args, model)

    # Building -----------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As in transformers, with the optimizer built on the placed model."""
        self._num_training_steps = max_steps
        assert_same_job(self)
        check_strategy(self.accelerator, self.model)
        check_given_optimizer(self, *self._given)
        self._undo_preparation_for_evaluation()
        if self._is_fsdp_rehearsed and not is_sharded(self.model):
            trainer_rehearsal.equal_start(self.model)
        if self.is_deepspeed_enabled:
            self._named_in_json = trainer_deepspeed.settings_from_json(self)
        is_for_any_engine = self._is_for_any_engine(resume_from_checkpoint)
        with self._optimizers_built_after_placement():
            prepared = super()._prepare_for_training(  # type: ignore[misc]
                max_steps, train_dataloader, None if is_for_any_engine else resume_from_checkpoint
            )
        if self._saves_beside():
            refuse_unserved_saves(self)
        if is_for_any_engine:
            self._resume_under_deepspeed(resume_from_checkpoint)
        return prepared

    def _undo_preparation_for_evaluation(self) -> None:
        """An ``evaluate()`` before ``train()`` leaves a model that would not be wrapped, or that is gathered."""
        if self.is_fsdp_enabled:
            self.model_wrapped = self.model
            reshard(self.model)
        elif not self.is_deepspeed_enabled and self.model_wrapped is self.model and num_ranks() > 1:
            self.model._is_accelerate_prepared = False

    def training_step(self, *positional: Any, **named: Any) -> Any:
        """As in transformers; where memory ends and cannot be answered with a smaller batch, it says so."""
        try:
            return super().training_step(*positional, **named)  # type: ignore[misc]
        except Exception as error:
            refuse_smaller_batch(self, error)
            raise

    def evaluation_loop(self, *positional: Any, **named: Any) -> Any:
        """As in transformers; also before any training under FSDP2, which accelerate places with an optimizer only."""
        if self.accelerator.is_fsdp2 and not is_sharded(self.model):
            place_alone(self)
        return super().evaluation_loop(*positional, **named)  # type: ignore[misc]

    def prediction_step(self, *positional: Any, **named: Any) -> Any:
        """As in transformers; what is generated under FSDP1 leaves the parameters as they are."""
        with reading_whole_parameters(self.args, self.model):
            return super().prediction_step(*positional, **named)  # type: ignore[misc]

    @contextmanager
    def _optimizers_built_after_placement(self) -> Iterator[None]:
        """While the Trainer prepares, ``accelerator.prepare`` builds what was deferred."""
        prepare, create = self.accelerator.prepare, self.create_optimizer
        modules: list[nn.Module] = [self.model_wrapped]

        def prepare_and_build(*objects: Any, **options: Any) -> Any:
            for part in objects:
                if isinstance(part, DeferredOptimizer):
                    part.is_awaited = True
            if self.is_deepspeed_enabled:
                self._let_backward_serve(None)
                check_verified_by_engine(self.args, objects)
                objects = trainer_deepspeed.build_deferred(objects, self._num_training_steps)
            is_placed = self.accelerator.is_fsdp2 and any(is_sharded(part) for part in objects)
            with left_as_it_is(self.accelerator):
                result = objects if is_placed else prepare(*objects, **options)
            is_single = len(objects) == 1  # then accelerate returns no sequence
            parts = (result,) if is_single and not is_placed else tuple(result)
            if is_placed:  # by an evaluation, or by an earlier train(): accelerate would exchange parameters again
                self.accelerator._models = [part for part in parts if isinstance(part, nn.Module)]
            modules.extend(part for part in parts if isinstance(part, nn.Module))
            if self.accelerator.distributed_type.value == "FSDP":
                cpu_rehearsal.assert_fsdp(modules[-1])
            parts = tuple(self._built(part, modules[-1]) for part in parts)
            return parts[0] if is_single else parts

        def create_on(model: nn.Module | None = None) -> Any:
            """An override may leave out the ``model`` that the Trainer passes under FSDP1."""
            takes_model = model is not None and len(inspect.signature(create).parameters) > 0
            return create(model) if takes_model else create()

        self.accelerator.prepare, self.create_optimizer = prepare_and_build, create_on  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.accelerator.prepare, self.create_optimizer

    def _built(self, part: Any, model: nn.Module) -> Any:
        """The prepared optimizer in place of a deferred one; anything else as it is, once it has been checked."""
        inner = part if isinstance(part, DeferredOptimizer) else getattr(part, "optimizer", None)
        if isinstance(inner, DeferredOptimizer):
            self.accelerator._optimizers = [one for one in self.accelerator._optimizers if one is not part]
            inside_backward = settings_inside_backward(inner, model, self.args)
            optimizer = inner.build(model, self._num_training_steps, **inside_backward)
            self._let_backward_serve(optimizer)
            prepared = self.accelerator.prepare_optimizer(optimizer)
            prepared._is_accelerate_prepared = True  # a second train() finds it as it is
            return prepared
        if isinstance(part, Optimizer) and isinstance(inner, Optimizer) and not self.is_deepspeed_enabled:
            check_made_by_hand(inner, model, self.args)
        if isinstance(inner, DistributedOptimizer) and not self.is_deepspeed_enabled:
            follow(inner, model)  # auto_find_batch_size wraps the model anew
        return part

    def _let_backward_serve(self, optimizer: DistributedOptimizer | None) -> None:
        # accelerate's own by its class, so that what a second optimizer needs does not wrap the first one's.
        stock = functools.partial(type(self.accelerator).backward, self.accelerator)
        self.accelerator.backward = backward_of(stock, optimizer, self._note_norm)

    def _note_norm(self, norm: Tensor | None) -> None:
        self._norm_of_backward = norm

    # Schedule -----------------------------------------------------------------------------------------------------

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """As in transformers; a schedule that follows a metric decides once for all ranks."""
        if self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = scheduler_for_trainer(self.args, chosen, num_training_steps)
            self._created_lr_scheduler = True
        else:
            self.lr_scheduler = shared_schedule(self.args, self.optimizer, self.lr_scheduler)
        return self.lr_scheduler

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        skips = skip_scheduler or metric_scheduler_in(self.lr_scheduler) is not None
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skips)  # type: ignore[misc]
        if not skip_scheduler:
            decide_after_evaluation(self.lr_scheduler, metrics, self.args, self.state.global_step)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """By what rank 0 has: ranks that each went by their own would save, all together, at different steps."""
        is_best: bool = super()._determine_best_metric(gather_objects(metrics)[0], trial)  # type: ignore[misc]
        return is_best

    # Clipping -----------------------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._steps_inside_backward():
            return self._norm_of_backward
        norm = self._clip_exactly(float(self.args.max_grad_norm))
        return super()._clip_grad_norm(model) if norm is None else norm  # type: ignore[misc]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self._steps_inside_backward():
            return self._norm_of_backward  # None, and then not logged, where nobody had to know it
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    def _steps_inside_backward(self) -> bool:
        optimizer = find_optimizer(self.optimizer, DistributedOptimizer)
        return optimizer is not None and optimizer.inside_backward is not None

    def _clip_exactly(self, max_norm: float) -> Tensor | None:
        """The global norm before clipping; None where transformers' own way is exact: one process, DeepSpeed."""
        optimizer = find_optimizer(self.optimizer, DistributedOptimizer)
        if optimizer is None or num_ranks(optimizer.holdings.process_group) == 1:
            return None
        self.accelerator.unscale_gradients()
        return optimizer.clip_grad_norm_(max_norm)
