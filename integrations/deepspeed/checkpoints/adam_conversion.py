"""Continue with AdaX from a DeepSpeed checkpoint of Adam, and back."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from adax_triton.convert.state_dicts import adam_from_adax, adax_from_adam, from_torch_adam, to_torch_adam
from adax_triton.moment_optimizer import MomentOptimizer

from .universal import check_group_count


@contextmanager
def switching_optimizer(engine: Any) -> Iterator[None]:
    """Within the block, `engine.load_checkpoint` converts between Adam and AdaX.

        with switching_optimizer(engine):
            engine.load_checkpoint(folder)

    An engine with AdaX or AdaXW loads checkpoints of DeepSpeed's and torch's Adam and AdamW. An engine with one of
    those loads checkpoints of AdaX and AdaXW. Weights, moments and step counts come from the checkpoint, all
    hyper-parameters from the engine's own configuration. With m, v normalised as in this package:

        Adam to AdaX:   m = exp_avg / (1 - b1^t),   v = exp_avg_sq / (1 - b2^t)     b1, b2 of the checkpoint
        AdaX to Adam:   exp_avg = m (1 - b1^t),     exp_avg_sq = v (1 - b2^t)       b1, b2 of the engine

    The number of ranks and the ZeRO stage must be those of the checkpoint, except that an engine with AdaX also loads
    universal checkpoints. DeepSpeed loads the state of the scheduler, too: pass `load_lr_scheduler_states=False` if
    the new run has another schedule.

    Args:
        engine: from `deepspeed.initialize`.

    Raises:
        ValueError: the engine has another optimizer, or a group with another `second_moment` than "adax". In the
            block, `load_checkpoint` raises if the checkpoint cannot be converted (see
            `adax_triton.convert.state_dicts`); the optimizer has not changed.

    Source: `adax_triton.convert.state_dicts.adax_from_adam` and its inverse.
    """
    optimizer = engine.basic_optimizer
    if isinstance(optimizer, MomentOptimizer):
        rules = {group["second_moment"] for group in optimizer.param_groups}
        if rules != {"adax"}:
            raise ValueError(f"the engine's groups have second_moment {sorted(rules)}; expected only 'adax'")
        convert = _to_adax
    elif type(optimizer).__name__ in ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam"):
        if engine.load_universal_checkpoint():
            raise ValueError(
                f"checkpoint.load_universal=true: DeepSpeed's {type(optimizer).__name__} cannot load a universal "
                "checkpoint of AdaX; load an ordinary checkpoint"
            )
        convert = _to_adam
    else:
        raise ValueError(f"the engine's optimizer is {type(optimizer).__name__}; expected AdaX, AdaXW, Adam or AdamW")
    handle = optimizer.register_load_state_dict_pre_hook(convert)
    try:
        yield
    finally:
        handle.remove()


def adax_from_deepspeed_adam(state_dict: Mapping[str, Any], *, beta2: float = 1e-4) -> dict[str, Any]:
    """Convert DeepSpeed's or torch's Adam states to warm-start AdaX or AdaXW.

    Args:
        state_dict: the inner optimizer's state dict, as in ZeRO's optimizer files. A group without
            "decoupled_weight_decay", as in DeepSpeed's Adam, gets AdaX's L2 weight decay.
        beta2: AdaX's growth rate. Default: 1e-4.

    Raises:
        ValueError: this package saved it, or `adax_triton.convert.state_dicts` cannot convert it.
    """
    groups = []
    for index, group in enumerate(state_dict["param_groups"]):
        if "second_moment" in group:
            raise ValueError(
                f"param_groups[{index}] was saved by adax_triton; load the checkpoint outside switching_optimizer"
            )
        groups.append({"decoupled_weight_decay": False, **group})
    return adax_from_adam(from_torch_adam({**state_dict, "param_groups": groups}), beta2=beta2)


def deepspeed_adam_from_adax(state_dict: Mapping[str, Any], betas: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Convert an AdaX state dict for DeepSpeed's and torch's Adam.

    Args:
        state_dict: the inner optimizer's state dict, as in ZeRO's optimizer files.
        betas: Adam's (beta1, beta2) of each group.

    Raises:
        ValueError: `adax_triton.convert.state_dicts` cannot convert it.
    """
    groups = [
        {**group, "betas": (beta1, group["betas"][1])}
        for group, (beta1, _) in zip(state_dict["param_groups"], betas, strict=True)
    ]
    adam = adam_from_adax({**state_dict, "param_groups": groups})
    for group, own in zip(adam["param_groups"], betas, strict=True):
        group["betas"] = tuple(own)
    converted = to_torch_adam(adam)
    for group in converted["param_groups"]:
        group["bias_correction"] = True
    for state in converted["state"].values():
        if state:
            state["step"] = int(state["step"])  # DeepSpeed's Adam needs an int; torch's converts it to a tensor
    return converted


def _to_adax(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    converted = adax_from_deepspeed_adam(state_dict)
    return {**converted, "param_groups": _groups_with_saved_params(optimizer, converted["param_groups"])}


def _to_adam(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    own = _groups_with_saved_params(optimizer, state_dict["param_groups"])
    converted = deepspeed_adam_from_adax(state_dict, [group["betas"] for group in own])
    return {**converted, "param_groups": own}


def _groups_with_saved_params(
    optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    check_group_count(optimizer, saved)
    return [{**own, "params": group["params"]} for own, group in zip(optimizer.param_groups, saved, strict=True)]
