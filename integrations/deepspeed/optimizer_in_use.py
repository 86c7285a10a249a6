"""Which optimizer a DeepSpeed engine steps: said in the log, and another one in its place refused.

Accelerate, and the Trainer of transformers through it, hand DeepSpeed other settings than their user wrote:

- under optimizer offload Accelerate builds a `DeepSpeedCPUAdam` from the groups of an optimizer object;
- the Trainer fills `"auto"` in "optimizer.params" with Adam's hyper-parameters, among them a beta2 of 0.999;
- the Trainer drops an optimizer object (`optimizers=`) and goes on with AdamW. See also `huggingface`.

All of it is seen from DeepSpeed's side, so that neither framework need be imported.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Mapping
from typing import Any

import torch
from adax_triton.integrations.deepspeed.checkpoints.universal import Method
from deepspeed.ops.adam import DeepSpeedCPUAdam

from adax_triton.moment_optimizer import MomentOptimizer
from adax_triton.state.validation import LARGEST_ADAX_BETA2

_ADAM_EPS = 1e-8
_LOGGED = ("lr", "betas", "eps", "weight_decay", "states", "master_weights", "second_moment")

logger = logging.getLogger(__name__)


def replacement_to_wrap() -> tuple[type, str, Any]:
    """Return (owner, method name, function that wraps the method), for `deepspeed.register`."""
    return DeepSpeedCPUAdam, "add_param_group", _refuse_groups_of_ours


def _refuse_groups_of_ours(original: Method) -> Method:
    # The first thing its constructor does with groups, before it compiles anything.
    @functools.wraps(original)
    def add_param_group(self: torch.optim.Optimizer, param_group: dict[str, Any]) -> None:
        rule = param_group.get("second_moment")
        if rule is not None:
            raise ValueError(
                f"{type(self).__name__} was given parameter groups of adax_triton (second_moment={rule!r}) and would "
                "step Adam, which Accelerate puts in the place of an optimizer object under offload; "
                'set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration, or name the optimizer in its '
                '"optimizer" section (and in a loop of your own, put a DummyOptim in its place)'
            )
        original(self, param_group)

    return add_param_group


def refuse_betas_of_adam(name: str, params: Mapping[str, Any]) -> None:
    """Refuse `optimizer.params` whose beta2 is Adam's, which the Trainer writes in the place of "auto".

    Args:
        name: of the optimizer, for the message.
        params: the section "optimizer.params" of a DeepSpeed configuration.

    Raises:
        ValueError: naming the value and the remedy.
    """
    betas = params.get("betas")
    if params.get("second_moment", "adax") != "adax" or not isinstance(betas, (list, tuple)) or len(betas) != 2:
        return  # what else may be wrong with them the optimizer says
    if isinstance(betas[1], float) and betas[1] > LARGEST_ADAX_BETA2:
        eps = " and eps" if params.get("eps") == _ADAM_EPS else ""
        raise ValueError(
            f"optimizer.params.betas={list(betas)!r}: beta2={betas[1]} is too large for {name}, whose own is 1e-4 and "
            f"at most {LARGEST_ADAX_BETA2}. 0.999 is Adam's, which the Trainer of transformers writes in the place of "
            f'"auto": remove betas{eps} from optimizer.params, or set adam_beta2=1e-4 and adam_epsilon=1e-12 in '
            "TrainingArguments"
        )


def log_optimizer_in_use(engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """Log, on rank 0, what an engine is about to step.

    Args:
        engine: the DeepSpeed engine.
        optimizer: what it will step. For one of this package, a line at level INFO has its class, states and
            hyper-parameters, each beside the class's default where it is another. Another one that was made by the
            Trainer is a warning, since that drops optimizer objects.
    """
    if engine.global_rank != 0:
        return
    if isinstance(optimizer, MomentOptimizer):
        logger.info("DeepSpeed steps %s", _description(optimizer))
    elif engine.client_optimizer is not None and "transformers.trainer" in sys.modules:
        logger.warning(
            "DeepSpeed steps %s.%s, no optimizer of adax_triton. If the Trainer was given one, as optimizers= or by "
            'create_optimizer_and_scheduler, it has dropped it: name it in the "optimizer" section of the DeepSpeed '
            "configuration, or pass optimizer_cls_and_kwargs=(AdaX, {...})",
            type(optimizer).__module__,
            type(optimizer).__qualname__,
        )


def _description(optimizer: MomentOptimizer) -> str:
    parameters = inspect.signature(type(optimizer)).parameters
    parts = []
    for key in _LOGGED:
        values = list(dict.fromkeys(_plain(group[key]) for group in optimizer.param_groups))
        default = _plain(parameters[key].default) if key in parameters else values[0]
        parts.append(f"{key} {' and '.join(values)}" + ("" if values == [default] else f" (default {default})"))
    return f"{type(optimizer).__name__}: {', '.join(parts)}"


def _plain(value: Any) -> str:
    return str(tuple(value) if isinstance(value, list) else value)
