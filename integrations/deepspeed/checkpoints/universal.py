"""Universal checkpoints of DeepSpeed, for optimizers of this package: what DeepSpeed overwrites or leaves out.

- At ZeRO 3 every group would get the hyper-parameters of the first. Here each gets its own.
- At ZeRO 1 and 2 a rank that owns only padding of a group would fail, and the others wait for it. Here it gets states
  of zeros. `BF16_Optimizer` saves paddings that the conversion cannot take off; here they are those of the rank.
- Frozen parameters and buffers would keep their initial values. Here they are restored.

States are loaded through the optimizer's own `load_state_dict`, so that a second moment of another rule is refused, and
states are kept as the optimizer is configured to keep them.
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

# What DeepSpeed's optimizer files hold besides tensors and plain values.
_SAVED_CLASSES = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


@contextmanager
def allowing_saved_classes() -> Iterator[None]:
    """Within the block `torch.load(weights_only=True)` reads what DeepSpeed saves; also within another such block."""
    allowed = torch.serialization.get_safe_globals()
    # At its end the inner of two blocks of torch's would take the classes from the outer one, too.
    with torch.serialization.safe_globals([saved for saved in _SAVED_CLASSES if saved not in allowed]):
        yield


def read_optimizer_file(path: str) -> Any:
    """Return what DeepSpeed has saved, by `torch.load(weights_only=True)`."""
    with allowing_saved_classes():
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def partitions_in_groups(zero: Any) -> Iterator[None]:
    """Within the block a ZeRO 3 optimizer's partitions are in its groups, from which it keeps them between steps."""
    zero._set_fp32_optimizer_param_groups()
    try:
        yield
    finally:
        zero._clear_fp32_optimizer_param_groups()


def load_every_group(original: Method) -> Method:
    """Wrap `ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir`: ZeRO 1 and 2, and `BF16_Optimizer`."""

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
            mapping.hp_fragment = fragment  # DeepSpeed 0.19.1 leaves a moment in its place
        _load_states(self.optimizer, groups, loaded)
        for lp_params, group in zip(lp_groups, self.optimizer.param_groups, strict=True):
            lazy_init_hp_params_optimizer_state(lp_params, group["params"][0], self.optimizer.state)

    return load_hp_checkpoint_state_from_checkpoint_dir


def load_every_group_at_stage_3(original: Method) -> Method:
    """Wrap `DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3`."""

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


def save_paddings_of_the_rank(original: Method) -> Method:
    """Wrap `BF16_Optimizer.state_dict`, in which the last rank has the padding of all ranks."""

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
    """Restore from a universal checkpoint what no optimizer steps: frozen parameters, and buffers.

    Args:
        engine: that has loaded the checkpoint.
        path: the file of model states that it has read.
    """
    # DeepSpeed has read this file in the same way; it may hold the user's own objects.
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
    # Below ZeRO 3 every rank's modules are the same, and there is one file.
    return range(engine.loaded_checkpoint_dp_world_size if engine.zero_optimization_partition_weights() else 1)


def _stepped_groups(zero: Any) -> list[list[Tensor]]:
    names = ("bit16_groups", "bf16_groups", "fp16_groups")  # ZeRO 1 and 2, BF16_Optimizer, ZeRO 3
    return next(getattr(zero, name) for name in names if hasattr(zero, name))


def _copy_partition(fragments: Sequence[Tensor], partition: Tensor, zero: Any) -> None:
    whole = torch.cat([fragment.flatten() for fragment in fragments])
    first = torch.distributed.get_rank(zero.dp_process_group) * partition.numel()
    part = whole[first : first + partition.numel()]
    partition.view(-1)[: part.numel()].copy_(part)  # what is missing is padding


def _saved_groups(checkpoint_dir: str) -> list[dict[str, Any]]:
    """Return the hyper-parameters of each group of a universal checkpoint."""
    groups = read_optimizer_file(os.path.join(checkpoint_dir, "zero", "optimizer_state.pt"))["param_groups"]
    for index, group in enumerate(groups):
        # The conversion cuts states by elements of the weights, which tears codes from their group exponents.
        if is_quantized(group.get("states", "float32")):
            raise ValueError(
                f"{checkpoint_dir} was converted from states={group['states']!r} (param_groups[{index}]), which a "
                "universal checkpoint cannot hold: load the original checkpoint at its own number of ranks into an "
                'optimizer with states="float32", save that, and convert it'
            )
        if group.get("master_weights") is not None:
            raise ValueError(
                f"{checkpoint_dir} was converted from master_weights={group['master_weights']!r} "
                f"(param_groups[{index}]), of which a universal checkpoint holds the 16-bit weights alone: go on from "
                "the original checkpoint, at its own number of ranks"
            )
    return groups


def _load_groups(optimizer: MomentOptimizer, saved_groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Load groups without states, and return them as they are then; what does not fit is refused without a change."""
    optimizer.load_state_dict({"state": {}, "param_groups": _with_own_params(optimizer, saved_groups)})
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _load_states(
    optimizer: MomentOptimizer, saved_groups: Sequence[Mapping[str, Any]], loaded: Sequence[Mapping[str, Any]]
) -> None:
    """Load anew the float32 states that DeepSpeed has put into any optimizer, and undo what it did to the groups."""
    groups = _with_own_params(optimizer, saved_groups)
    states = {}
    for own, group, right in zip(optimizer.param_groups, groups, loaded, strict=True):
        own.update(right)
        for param, key in zip(own["params"], group["params"], strict=True):
            states[key] = optimizer.state.pop(param)  # one that is there would stay as it is kept
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _with_own_params(
    optimizer: torch.optim.Optimizer, saved_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    if len(saved_groups) != len(optimizer.param_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} parameter groups, the optimizer {len(optimizer.param_groups)}"
        )
    # At ZeRO 3 a group's number of partitions changes with their size and with the number of ranks.
    own_params = iter(torch.optim.Optimizer.state_dict(optimizer)["param_groups"])
    return [{**saved, "params": next(own_params)["params"]} for saved in saved_groups]


@contextmanager
def _padding_as_parameters(zero: Any, lp_groups_name: str) -> Iterator[str]:
    """Yield the name of an attribute with every group's parameters, of which each has one on this rank at least."""
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
    """Stands for the parameters of a group of which a rank owns only padding; DeepSpeed counts on one at least."""

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
