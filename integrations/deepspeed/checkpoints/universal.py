"""Fix saving and loading of DeepSpeed's universal checkpoints.

`registration` lists what fails without these fixes. States are loaded through the optimizer's own `load_state_dict`. It
raises for a second moment of another rule, and keeps states in the precision that the optimizer is configured with.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils import fragment_address, lazy_init_hp_params_optimizer_state
from torch import Tensor, nn

from adax_triton.moment_optimizer import MomentOptimizer
from adax_triton.state.allocation import MOMENTS
from adax_triton.state.precision import is_quantized

Method = Callable[..., Any]

# Classes in DeepSpeed's optimizer files, in addition to tensors and plain values.
_SAVED_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def allowing_saved_classes() -> Iterator[None]:
    """Let `torch.load(weights_only=True)` read DeepSpeed's files within the block, which may be nested."""
    allowed = torch.serialization.get_safe_globals()
    # At its end an inner safe_globals block also removes the classes of an outer block. So add only new classes.
    with torch.serialization.safe_globals([saved for saved in _SAVED_CLASSES if saved not in allowed]):
        yield


def read_optimizer_file(path: str) -> Any:
    """Return the contents of a DeepSpeed file, by `torch.load(weights_only=True)`."""
    with allowing_saved_classes():
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def partitions_in_groups(zero: Any) -> Iterator[None]:
    """Put ZeRO 3's partitions into the parameter groups within the block.

    ZeRO removes them between steps.
    """
    zero._set_fp32_optimizer_param_groups()
    try:
        yield
    finally:
        zero._clear_fp32_optimizer_param_groups()


def load_universal_stage_1_2(original: Method) -> Method:
    """Replace `load_hp_checkpoint_state_from_checkpoint_dir` of ZeRO 1 and 2 and of BF16_Optimizer."""

    @functools.wraps(original)
    def load_hp_checkpoint_state_from_checkpoint_dir(self: Any, lp_groups_name: str, checkpoint_dir: str) -> None:
        if not isinstance(self.optimizer, MomentOptimizer):
            original(self, lp_groups_name, checkpoint_dir)
            return
        groups = _saved_groups(checkpoint_dir)
        loaded = _load_groups(self.optimizer, groups)
        lp_groups = getattr(self, lp_groups_name)
        mappings = [lp._hp_mapping for lp_params in lp_groups for lp in lp_params if lp._hp_mapping is not None]
        weights = [mapping.hp_fragment for mapping in mappings]
        with _padding_as_parameters(self, lp_groups_name) as name:
            original(self, name, checkpoint_dir)
        for mapping, fragment in zip(mappings, weights, strict=True):
            mapping.hp_fragment = fragment  # DeepSpeed 0.19.1 replaces it by a moment
        _load_states(self.optimizer, groups, loaded)
        for lp_params, group in zip(lp_groups, self.optimizer.param_groups, strict=True):
            lazy_init_hp_params_optimizer_state(lp_params, group["params"][0], self.optimizer.state)

    return load_hp_checkpoint_state_from_checkpoint_dir


def load_universal_stage_3(original: Method) -> Method:
    """Replace `load_hp_checkpoint_state_from_checkpoint_dir_stage3` of ZeRO 3."""

    @functools.wraps(original)
    def load_hp_checkpoint_state_from_checkpoint_dir_stage3(self: Any, checkpoint_dir: str) -> None:
        if not isinstance(self.optimizer, MomentOptimizer):
            original(self, checkpoint_dir)
            return
        groups = _saved_groups(checkpoint_dir)
        with partitions_in_groups(self):
            loaded = _load_groups(self.optimizer, groups)
        original(self, checkpoint_dir)
        with partitions_in_groups(self):
            _load_states(self.optimizer, groups, loaded)

    return load_hp_checkpoint_state_from_checkpoint_dir_stage3


def save_own_paddings(original: Method) -> Method:
    """Replace `BF16_Optimizer.state_dict`, so that the last rank saves its own padding only."""

    @functools.wraps(original)
    def state_dict(self: Any) -> dict[str, Any]:
        saved: dict[str, Any] = original(self)
        if isinstance(self.optimizer, MomentOptimizer):
            sizes = [partition.numel() for partition in self.fp32_groups_flat_partition]
            saved["group_paddings"] = [
                min(padding, size) for padding, size in zip(self.group_paddings, sizes, strict=True)
            ]
        return saved

    return state_dict


def restore_frozen_and_buffers(engine: Any, path: str) -> None:
    """Restore frozen parameters and buffers from a universal checkpoint.

    Args:
        engine: the engine, after DeepSpeed has loaded the checkpoint.
        path: the file of model states that DeepSpeed has read.
    """
    # Read as DeepSpeed does, because the file may hold objects of the user.
    paths = [path.replace("zero_pp_rank_0_", f"zero_pp_rank_{rank}_") for rank in _saved_ranks(engine)]
    saved = [engine.checkpoint_engine.load(name, map_location="cpu") for name in paths]
    fragments = [states.get("frozen_param_fragments") or {} for states in saved]
    stepped = {id(param) for group in _stepped_groups(engine.optimizer) for param in group}
    with torch.no_grad():
        for name, tensor in engine.module.state_dict(keep_vars=True).items():
            if id(tensor) in stepped:
                continue
            if isinstance(tensor, nn.Parameter) and hasattr(tensor, "ds_tensor"):
                if name in fragments[0]:
                    _copy_partition([part[name] for part in fragments], tensor.ds_tensor, engine.optimizer)
            elif name in saved[0]["module"]:
                tensor.copy_(saved[0]["module"][name])


def _saved_ranks(engine: Any) -> range:
    # Below ZeRO 3 all ranks have the same module, in one file.
    return range(engine.loaded_checkpoint_dp_world_size if engine.zero_optimization_partition_weights() else 1)


def _stepped_groups(zero: Any) -> list[list[Tensor]]:
    names = ("bit16_groups", "bf16_groups", "fp16_groups")  # ZeRO 1 and 2, BF16_Optimizer, ZeRO 3
    return next(getattr(zero, name) for name in names if hasattr(zero, name))


def _copy_partition(fragments: Sequence[Tensor], partition: Tensor, zero: Any) -> None:
    whole = torch.cat([fragment.flatten() for fragment in fragments])
    first = torch.distributed.get_rank(zero.dp_process_group) * partition.numel()
    part = whole[first : first + partition.numel()]
    partition.view(-1)[: part.numel()].copy_(part)  # the rest of the last partition is padding


def _saved_groups(checkpoint_dir: str) -> list[dict[str, Any]]:
    """Return each group's hyper-parameters from a universal checkpoint.

    Raises if the states of the checkpoint are incomplete.
    """
    groups = read_optimizer_file(os.path.join(checkpoint_dir, "zero", "optimizer_state.pt"))["param_groups"]
    for index, group in enumerate(groups):
        # The conversion slices states per element, which separates 8-bit values from their group exponents.
        if is_quantized(group.get("states", "float32")):
            raise ValueError(
                f"{checkpoint_dir} was converted from states={group['states']!r} (param_groups[{index}]); a universal "
                "checkpoint needs float32 or bfloat16. Load the original checkpoint at its own number of ranks into "
                'an optimizer with states="float32", save that, and convert it'
            )
        if group.get("master_weights") is not None:
            raise ValueError(
                f"{checkpoint_dir} was converted from master_weights={group['master_weights']!r} "
                f"(param_groups[{index}]); a universal checkpoint holds only the 16-bit weights. Load the original "
                "checkpoint at its own number of ranks"
            )
    return groups


def _load_groups(optimizer: MomentOptimizer, saved_groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Load parameter groups without states, and return them; raise before any change."""
    optimizer.load_state_dict({"state": {}, "param_groups": _with_own_params(optimizer, saved_groups)})
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _load_states(
    optimizer: MomentOptimizer, saved_groups: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]
) -> None:
    """Load the float32 states that DeepSpeed has set.

    Stores them in the optimizer's precision, and restores its groups.
    """
    groups = _with_own_params(optimizer, saved_groups)
    states = {}
    for own, group, loaded_group in zip(optimizer.param_groups, groups, loaded, strict=True):
        own.update(loaded_group)
        for param, key in zip(own["params"], group["params"], strict=True):
            states[key] = optimizer.state.pop(param)  # an existing state would keep its old precision
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def check_group_count(optimizer: torch.optim.Optimizer, saved_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless checkpoint and optimizer have equally many parameter groups."""
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} parameter groups, the optimizer {len(optimizer.param_groups)}; "
            "create the optimizer with the groups of the run that saved it"
        )


def _with_own_params(
    optimizer: torch.optim.Optimizer, saved_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    check_group_count(optimizer, saved_groups)
    # At ZeRO 3 the number of partitions in a group depends on their size and on the number of ranks.
    own_params = iter(torch.optim.Optimizer.state_dict(optimizer)["param_groups"])
    return [{**saved, "params": next(own_params)["params"]} for saved in saved_groups]


@contextmanager
def _padding_as_parameters(zero: Any, lp_groups_name: str) -> Iterator[str]:
    """Give each group without elements on this rank an empty parameter.

    The parameters exist only within the block. DeepSpeed's loading fails for a group if this rank holds only padding of
    it.

    Yields:
        The name of a temporary attribute of `zero` that lists the parameters of every group.
    """
    lp_groups, stand_ins = [], []
    for lp_params in getattr(zero, lp_groups_name):
        if all(lp_param._hp_mapping is None for lp_param in lp_params):
            stand_in = _Padding()
            zero.param_names[stand_in] = zero.param_names[lp_params[0]]
            stand_ins.append(stand_in)
            lp_groups.append([stand_in])
        else:
            lp_groups.append(lp_params)
    zero._lp_groups_with_padding = lp_groups
    try:
        yield "_lp_groups_with_padding"
    finally:
        del zero._lp_groups_with_padding
        for stand_in in stand_ins:
            del zero.param_names[stand_in]


class _Padding:
    """An empty parameter for a group with only padding on this rank."""

    def __init__(self) -> None:
        self.optim_fragment: dict[str, Tensor] = {}
        self._hp_mapping = self

    def load_hp_checkpoint_state(
        self, folder: str, tp_rank: int, tp_world_size: int, ep_rank: int = 0, ep_size: int = 1
    ) -> Any:
        return read_optimizer_file(os.path.join(folder, "step.pt"))

    def get_optim_state_keys(self) -> tuple[str, ...]:
        return MOMENTS

    def get_hp_fragment_address(self) -> fragment_address:
        return fragment_address(numel=0, start=0)

    def get_hp_fragment(self, optim_state_key: str) -> Tensor:
        return torch.empty(0)
