"""AdaX in the Trainer of transformers, with DeepSpeed.

    import adax_triton.integrations.huggingface  # also registers the types of DeepSpeed configurations

    config = {"optimizer": {"type": "AdaX", "params": {"lr": "auto"}}, ...}
    trainer = Trainer(model, TrainingArguments(deepspeed=config, learning_rate=1.5e-3), ...)

Without DeepSpeed the Trainer steps the optimizer that you pass as `optimizers=`. With DeepSpeed it drops that object
and steps AdamW, or the optimizer of the configuration. Importing this module turns that into an error: it replaces
`transformers.trainer.deepspeed_init`. Without the replacement the run goes on with AdamW, and only the log says so; see
tests/frameworks/test_huggingface.py::test_dropped_optimizer_is_logged.

All other checks of the Trainer and of Accelerate need only `adax_triton.integrations.deepspeed`.

Tested with transformers 5.24.0 and accelerate 1.15.0.
"""

import functools
from collections.abc import Callable
from typing import Any

import transformers.trainer
from adax_triton.integrations import deepspeed as deepspeed_adapter

from adax_triton.moment_optimizer import MomentOptimizer

__all__ = ["register", "unregister"]

# The original `deepspeed_init`; empty when not registered.
_originals: list[Callable[..., Any]] = []


def register() -> None:
    """Make the Trainer raise instead of dropping an optimizer of this package.

    Idempotent; importing this module calls it. It also registers `adax_triton.integrations.deepspeed`, which stays
    registered after `unregister`.

    Raises:
        ImportError: DeepSpeed is older than the oldest tested version.
    """
    deepspeed_adapter.register()
    if not _originals:
        _originals.append(transformers.trainer.deepspeed_init)
        transformers.trainer.deepspeed_init = _raise_if_dropped(transformers.trainer.deepspeed_init)


def unregister() -> None:
    """Undo what `register` did to the Trainer. Idempotent."""
    while _originals:
        transformers.trainer.deepspeed_init = _originals.pop()


def _raise_if_dropped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def deepspeed_init(trainer: Any, num_training_steps: int, inference: bool = False) -> Any:
        given = trainer.optimizer
        optimizer, lr_scheduler = original(trainer, num_training_steps, inference)
        if not inference and isinstance(given, MomentOptimizer) and not isinstance(optimizer, MomentOptimizer):
            name = type(given).__name__
            raise ValueError(
                f"optimizers=({name}, ...): with DeepSpeed the Trainer drops an optimizer object and steps another "
                f"optimizer; pass optimizer_cls_and_kwargs=({name}, {{...}}) instead, or override create_optimizer, or "
                f'name "{name}" in the "optimizer" section of the DeepSpeed configuration'
            )
        return optimizer, lr_scheduler

    return deepspeed_init


register()
