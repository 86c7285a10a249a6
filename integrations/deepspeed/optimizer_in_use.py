"""Log the optimizer in use; raise if Adam would replace AdaX.

Accelerate, and the Trainer of transformers through it, give DeepSpeed other settings than the user wrote:

- with optimizer offload, Accelerate builds a `DeepSpeedCPUAdam` from the groups of an optimizer object;
- the Trainer replaces `"auto"` in "optimizer.params" by Adam's hyper-parameters, among them beta2 = 0.999;
- the Trainer drops an optimizer object (`optimizers=`) and steps AdamW. See also `huggingface`.

The checks are made inside DeepSpeed, so neither framework is imported.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from adax_triton.moment_optimizer import MomentOptimizer
from adax_triton.update.coefficients import LARGEST_ADAX_BETA2

_ADAM_EPS = 1e-8
_LOGGED = ("lr", "betas", "eps", "weight_decay", "states", "master_weights", "second_moment")

logger = logging.getLogger(__name__)


def reject_adax_param_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `DeepSpeedCPUAdam.add_param_group`: raise for parameter groups of AdaX.

    The constructor calls it before the C++ extension is compiled, so the error comes early.
    """

    @functools.wraps(original)
    def add_param_group(self: torch.optim.Optimizer, param_group: dict[str, Any]) -> None:
        rule = param_group.get("second_moment")
        if rule is not None:
            raise ValueError(
                f"{type(self).__name__} got parameter groups of adax_triton (second_moment={rule!r}) and would step "
                "Adam: with optimizer offload, Accelerate replaces an optimizer object. Set "
                '"zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration, or name the optimizer in its '
                '"optimizer" section; without the Trainer also pass accelerate.utils.DummyOptim to prepare()'
            )
        original(self, param_group)

    return add_param_group


def check_betas(name: str, params: Mapping[str, Any]) -> None:
    """Raise if beta2 is Adam's.

    The Trainer of transformers fills it in for "auto".

    Args:
        name: class name of the optimizer, for the message.
        params: the section "optimizer.params" of a DeepSpeed configuration.

    Raises:
        ValueError: beta2 is above the largest that AdaX takes.
    """
    betas = params.get("betas")
    if params.get("second_moment", "adax") != "adax" or not isinstance(betas, (list, tuple)) or len(betas) != 2:
        return  # the optimizer checks the rest
    if isinstance(betas[1], float) and betas[1] > LARGEST_ADAX_BETA2:
        eps = " and eps" if params.get("eps") == _ADAM_EPS else ""
        raise ValueError(
            f"optimizer.params.betas={list(betas)!r}: beta2={betas[1]} is too large for {name}, which takes at most "
            f'{LARGEST_ADAX_BETA2} (default 1e-4). The Trainer of transformers fills in 0.999 for "auto": remove '
            f"betas{eps} from optimizer.params, or set adam_beta2=1e-4 and adam_epsilon=1e-12 in TrainingArguments"
        )


def log_optimizer_in_use(engine: Any) -> None:
    """Log on rank 0 which optimizer an engine steps.

    For an optimizer of this package, log its class, precision and hyper-parameters at INFO. A value that differs from
    the class's default is followed by the default. For another optimizer that comes from the Trainer, log a warning,
    because the Trainer drops optimizer objects.

    Args:
        engine: the DeepSpeed engine, with its optimizer.
    """
    optimizer = engine.basic_optimizer
    if engine.global_rank != 0:
        return
    if isinstance(optimizer, MomentOptimizer):
        logger.info("DeepSpeed steps %s", _description(optimizer))
    elif engine.client_optimizer is not None and "transformers.trainer" in sys.modules:
        logger.warning(
            "DeepSpeed steps %s.%s, which is not an optimizer of adax_triton. The Trainer drops an optimizer that it "
            'is given as optimizers= or by create_optimizer_and_scheduler: name it in the "optimizer" section of the '
            "DeepSpeed configuration, or pass optimizer_cls_and_kwargs=(AdaX, {...})",
            type(optimizer).__module__,
            type(optimizer).__qualname__,
        )


def _description(optimizer: MomentOptimizer) -> str:
    parameters = inspect.signature(type(optimizer)).parameters
    parts = []
    for key in _LOGGED:
        values = list(dict.fromkeys(_as_text(group[key]) for group in optimizer.param_groups))
        default = _as_text(parameters[key].default) if key in parameters else values[0]
        parts.append(f"{key} {' and '.join(values)}" + ("" if values == [default] else f" (default {default})"))
    return f"{type(optimizer).__name__}: {', '.join(parts)}"


def _as_text(value: Any) -> str:
    return str(tuple(value) if isinstance(value, list) else value)
