"""What dist_optim overrides, replaces, or reads in other packages, although nobody promised that it stays: one table.

A renamed method would simply not be called any more: exact clipping gone, say, and no error. So ``check`` compares the
table with what is installed, where an integration is imported or first used, and names everything that differs.
"""

from __future__ import annotations

import dis
import functools
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from dist_optim.errors import UnsupportedError

__all__ = ["TABLE", "VERSIONS", "Override", "check", "differences"]


@dataclass(frozen=True, slots=True)
class Override:
    """One name that has to be there."""

    package: str
    """The distribution, as pip names it."""
    owner: str
    """``module:Class``, a module, or ``module:function``."""
    attribute: str
    """A method, a function, or an attribute that the class assigns or annotates, or that the function assigns."""
    parameters: tuple[str, ...] | None = None
    """Names in order, without ``self``, where ours takes or passes them; None where being there is enough."""
    in_older: str = ""
    """``module:name`` of what is read in place of it, where the installed version has that one still."""


VERSIONS = {
    "accelerate": ("1.10.0", "1.15.0"),
    "deepspeed": ("0.19.4", "0.19.8"),
    "torch": ("2.9.0", "2.13.0"),
    "transformers": ("5.3.0", "5.23.0"),
}
"""The first and the last version that the tests have passed with (docs/compat.md)."""


def _rows(package: str, owner: str, *names: str, **methods: tuple[str, ...]) -> tuple[Override, ...]:
    """``names`` have to be there; ``methods`` have to take these parameters."""
    return tuple(Override(package, owner, name, methods.get(name)) for name in (*names, *methods))


_TRAINER, _ACCELERATOR = "transformers.trainer:Trainer", "accelerate.accelerator:Accelerator"
_ENGINE, _ZERO = "deepspeed.runtime.engine:DeepSpeedEngine", "deepspeed.runtime.zero"
_FSDP1 = "torch.distributed.fsdp:FullyShardedDataParallel"
_FLAT = "torch.distributed.fsdp._flat_param"
_FSDP2 = "torch.distributed.fsdp._fully_shard._fsdp"
_DDP, _C10D = "torch.nn.parallel:DistributedDataParallel", "torch.distributed"

TABLE: dict[str, tuple[Override, ...]] = {
    "transformers": (
        *_rows(
            "transformers",
            _TRAINER,
            "__init__",
            "_build_accelerator_args",
            "_finalize_training",
            "_maybe_log_save_evaluate",
            "_run_epoch",
            "_train_batch_size",
            "evaluation_loop",
            "model_wrapped",
            "prediction_step",
            "save_model",
            "train",
            "training_step",
            _clip_grad_norm=("model",),
            _determine_best_metric=("metrics", "trial"),
            _evaluate=("trial", "ignore_keys_for_eval", "skip_scheduler"),
            _get_grad_norm=("model", "grad_norm"),
            _get_output_dir=("trial",),
            _load_best_model=(),
            _load_from_checkpoint=("resume_from_checkpoint", "model"),
            _load_optimizer_and_scheduler=("checkpoint",),
            _prepare_for_training=("max_steps", "train_dataloader", "resume_from_checkpoint"),
            _push_from_checkpoint=("checkpoint_folder",),
            _save=("output_dir", "state_dict"),
            _save_checkpoint=("model", "trial"),
            _save_optimizer_and_scheduler=("output_dir",),
            _save_rng_state=("output_dir",),
            _load_scaler=("checkpoint",),
            _save_scaler=("output_dir",),
            compute_loss=("model", "inputs", "return_outputs", "num_items_in_batch"),
            create_accelerator_and_postprocess=(),
            create_optimizer=("model",),
            create_scheduler=("num_training_steps", "optimizer"),
            get_decay_parameter_names=("model",),
            get_optimizer_cls_and_kwargs=("args", "model"),
        ),
        *_rows("transformers", "transformers.trainer", "get_fsdp_ckpt_kwargs"),
    ),
    "accelerate": (
        *_rows(
            "accelerate",
            _ACCELERATOR,
            "_dataloaders",
            "_is_accelerate_prepared",
            "_models",
            "_optimizers",
            "_prepare_tp",
            "_schedulers",
            "load_state",
            "prepare",
            "prepare_optimizer",
            "save_state",
            "unscale_gradients",
            backward=("loss", "kwargs"),
            clip_grad_norm_=("parameters", "max_norm", "norm_type"),
            prepare_model=("model", "device_placement", "evaluation_mode"),
            register_load_state_pre_hook=("hook",),
        ),
        *_rows("accelerate", "accelerate.state:PartialState", "_shared_state", "device", "distributed_type"),
        *_rows("accelerate", "accelerate.state:AcceleratorState", "fsdp_plugin"),
        *_rows("accelerate", "accelerate.utils", "save_fsdp_model"),
    ),
    "deepspeed": (
        *_rows(
            "deepspeed",
            _ENGINE,
            "_config",
            "_copy_recovery_script",
            "basic_optimizer",
            "checkpoint_engine",
            "load_checkpoint",
            "load_universal_checkpoint",
            "managed_gradient_accumulation",
            "optimizer",
            "save_checkpoint",
            _configure_basic_optimizer=("model_parameters",),
            _configure_optimizer=("client_optimizer", "model_parameters"),
            _get_all_ckpt_names=("checkpoints_path", "tag"),
            _is_supported_optimizer=("optimizer_name",),
        ),
        *_rows("deepspeed", f"{_ZERO}.utils", "ZERO_SUPPORTED_OPTIMIZERS"),
        *_rows(
            "deepspeed",
            f"{_ZERO}.stage_1_and_2:DeepSpeedZeroOptimizer",
            "bit16_groups_flat",
            "real_dp_process_group",
            "single_partition_of_fp32_groups",
            "update_lp_params",
        ),
        *_rows(
            "deepspeed",
            f"{_ZERO}.stage3:DeepSpeedZeroOptimizer_Stage3",
            "_partition_all_parameters",
            "_reassign_or_swap_out_partitioned_parameters",
            "fp32_partitioned_groups_flat",
            "grad_position",
            "persistent_parameters",
            get_param_id=("param",),
        ),
        *_rows(
            "deepspeed",
            "deepspeed.runtime.bf16_optimizer:BF16_Optimizer",
            "bf16_groups_flat",
            "fp32_groups_flat_partition",
            "real_dp_process_group",
            "update_lp_params",
        ),
        *_rows(
            "deepspeed",
            "deepspeed.runtime.fp16.unfused_optimizer:FP16_UnfusedOptimizer",
            "fp16_groups",
            "fp32_groups",
        ),
    ),
    "FSDP1": (
        *_rows("torch", _FSDP1, "_handle", "_state_dict_config", "_use_orig_params"),
        *_rows(
            "torch", "torch.distributed.fsdp._init_utils:_init_process_group_state_for_hybrid_shard", "_inter_node_pg"
        ),
        *_rows(
            "torch",
            f"{_FLAT}:FlatParamHandle",
            "_prefetched",
            "flat_param",
            "needs_unshard",
            "post_reshard",
            "process_group",
            "uses_sharded_strategy",
            reshard=("free_unsharded_flat_param",),
        ),
        *_rows(
            "torch",
            f"{_FLAT}:FlatParameter",
            "_fqns",
            "_full_param_padded",
            "_is_padding_mask",
            "_numels_with_padding",
            "_params",
            "_shapes",
            "_shard_param_infos",
            "_sharded_size",
        ),
        *_rows("torch", f"{_FLAT}:_ShardParamInfo", "in_shard", "intra_param_end_idx", "intra_param_start_idx"),
    ),
    "FSDP2": (
        *_rows("torch", "torch.distributed.fsdp:FSDPModule", _get_fsdp_state=(), reshard=()),
        *_rows("torch", f"{_FSDP2}_state:FSDPState", "_fsdp_param_group"),
        *_rows("torch", f"{_FSDP2}_param_group:FSDPParamGroup", "fsdp_params", "is_sharded"),
        *_rows("torch", f"{_FSDP2}_param:FSDPParam", "_unsharded_param", "sharded_param", "sharded_state"),
        *_rows(
            "torch",
            "torch.distributed.tensor:DTensor",
            "_local_tensor",
            "_spec",
            "device_mesh",
            "placements",
            "to_local",
        ),
        Override(
            "torch",
            "torch.distributed.device_mesh:DeviceMesh",
            "_get_root_mesh",
            (),
            "torch.distributed.device_mesh:_mesh_resources.get_root_mesh",
        ),
    ),
    "FSDP2, to owners": (
        *_rows("torch", f"{_FSDP2}_api:ReduceScatter", "__call__", "allocate"),
        *_rows(
            "torch",
            f"{_FSDP2}_param_group:FSDPParamGroup",
            "_reduce_scatter_comm",
            "is_unsharded",
            "mesh_info",
            "reduce_grads",
            post_backward=("unused",),
        ),
        *_rows(
            "torch",
            f"{_FSDP2}_param:FSDPParam",
            "_orig_size",
            "fsdp_placement",
            "is_dtensor",
            "offload_to_cpu",
            "unsharded_accumulated_grad",
            "unsharded_param",
            to_sharded_dtensor=("tensor",),
        ),
        *_rows("torch", "torch.autograd:Variable", "_execution_engine"),
    ),
    "torch.distributed.checkpoint": (
        *_rows(
            "torch",
            "torch.distributed.checkpoint.state_dict",
            _get_optim_state_dict=("model", "optimizers", "info"),
            _init_optim_state=("optim",),
            _load_optim_state_dict=("model", "optimizers", "state_dict", "info"),
        ),
        *_rows("torch", _FSDP1, "_optim_state_dict_impl", "_optim_state_dict_to_load_impl"),
        *_rows("torch", "torch.distributed.checkpoint:FileSystemReader", "read_metadata", "_get_metadata_path"),
        *_rows("torch", "torch.serialization", "skip_data"),
    ),
    "DDP": (
        *_rows(
            "torch",
            _DDP,
            "_comm_hooks",
            "_join_config",
            "find_unused_parameters",
            "logger",
            "mixed_precision",
            "process_group",
            "reducer",
            "static_graph",
            no_sync=(),
        ),
        *_rows("torch", f"{_C10D}.algorithms.join:Join", "_joinables"),
        *_rows("torch", f"{_C10D}.algorithms.join:_JoinConfig", "enable"),
        *_rows("torch", f"{_C10D}:Reducer", "_rebuild_buckets", "prepare_for_backward", "prepare_for_forward"),
        *_rows("torch", f"{_C10D}:Logger", "_set_uneven_input_join", "set_error_and_log", "set_runtime_stats_and_log"),
    ),
    "process groups": (
        *_rows("torch", f"{_C10D}.distributed_c10d", _hash_ranks_to_str=("ranks",), _get_split_source=("pg",)),
    ),
    "tensors without data": (
        *_rows("torch", "torch._subclasses.fake_tensor", "FakeTensor", "FakeTensorMode"),
        *_rows("torch", "torch.multiprocessing.reductions", "StorageWeakRef"),
        *_rows("torch", "torch:UntypedStorage", "_cdata"),
    ),
    "models of transformers": (
        *_rows("transformers", "transformers:PreTrainedModel", "_from_config", "_no_split_modules"),
    ),
}
"""By the name that ``check`` takes."""


@functools.cache
def check(integration: str) -> None:
    """Compare one part of the table with the installed package; once in a process. Every rank for itself.

    Args:
        integration: A key of ``TABLE``. The package has to be installed.

    Raises:
        UnsupportedError: The installed version lacks a name, or takes it differently.
    """
    rows = TABLE[integration]
    if found := differences(rows):
        package = rows[0].package
        first, last = VERSIONS[package]
        raise UnsupportedError(
            f"{package} {importlib.metadata.version(package)} is installed, and dist_optim changes or reads parts of "
            f"{integration} that are different there: {'; '.join(found)}. {package} {first} to {last} are known to "
            f"have them. Install one: pip install '{package}>={first},<={last}'."
        )


def differences(rows: tuple[Override, ...]) -> list[str]:
    """What the installed packages lack, or take differently; a line each."""
    return list(dict.fromkeys(line for row in rows if (line := _difference(row))))


def _difference(row: Override) -> str:
    name = f"{row.owner.replace(':', '.')}.{row.attribute}"
    try:
        owner = pkgutil.resolve_name(row.owner)
    except (AttributeError, ImportError) as error:
        return f"{row.owner.replace(':', '.')} is missing ({error})"
    if not _has(owner, row.attribute):
        return "" if row.in_older and _is_there(row.in_older) else f"{name} is missing"
    if row.parameters is None:
        return ""
    found = tuple(one for one in inspect.signature(getattr(owner, row.attribute)).parameters if one != "self")
    return "" if found == row.parameters else f"{name} takes {_listed(found)}, not {_listed(row.parameters)}"


def _is_there(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


def _listed(parameters: tuple[str, ...]) -> str:
    return f"({', '.join(parameters)})"


def _has(owner: Any, attribute: str) -> bool:
    """Whether the module or class has it, or the class gives it to its instances, or the function to an argument."""
    if hasattr(owner, attribute):
        return True
    if inspect.isfunction(owner):
        return attribute in _stored_by(owner)
    kinds = [kind for kind in getattr(owner, "__mro__", ()) if kind is not object]
    return any(attribute in kind.__dict__.get("__annotations__", {}) or attribute in _assigned(kind) for kind in kinds)


@functools.cache
def _assigned(kind: type) -> frozenset[str]:
    """Names of attributes that the methods of a class assign, on ``self`` or on what they are given."""
    return frozenset(name for member in vars(kind).values() for name in _stored_by(member))


def _stored_by(member: Any) -> Iterator[str]:
    for code in _codes_of(member):
        yield from (one.argval for one in dis.get_instructions(code) if one.opname == "STORE_ATTR")


def _codes_of(member: Any) -> Iterator[CodeType]:
    function = inspect.unwrap(getattr(member, "__func__", None) or getattr(member, "fget", None) or member)
    waiting = [code] if isinstance(code := getattr(function, "__code__", None), CodeType) else []
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
