"""AdaX in the Trainer of transformers, with DeepSpeed.

    import adax_triton.integrations.huggingface  # registers the types of DeepSpeed configurations, too

    config = {"optimizer": {"type": "AdaX", "params": {"lr": "auto"}}, ...}
    trainer = Trainer(model, TrainingArguments(deepspeed=config, learning_rate=1.5e-3), ...)

Without DeepSpeed the Trainer steps the optimizer it is given. With it, it forgets an optimizer object passed as
`optimizers=` and makes an AdamW, or what the configuration names, in its place; importing this module makes that an
error. What `deepspeed_in_use` says of the Trainer and Accelerate needs `adax_triton.integrations.deepspeed` alone.

Run with transformers 5.24.0 and accelerate 1.15.0.
"""

import functools
from collections.abc import Callable
from typing import Any

import transformers.trainer
from adax_triton.integrations import deepspeed as deepspeed_adapter

from adax_triton.moment_optimizer import MomentOptimizer

__all__ = ["register", "unregister"]

# What `register` replaced; empty when not registered.
_originals: list[Callable[..., Any]] = []


def register() -> None:
    """Have the Trainer refuse to drop an optimizer of this package. Idempotent; importing this module calls it.

    Also registers `adax_triton.integrations.deepspeed`, which stays registered after `unregister`.

    Raises:
        ImportError: DeepSpeed is older than the oldest version its adapter was run with.
    """
    deepspeed_adapter.register()
    if not _originals:
        _originals.append(transformers.trainer.deepspeed_init)
        transformers.trainer.deepspeed_init = _refuse_to_drop(transformers.trainer.deepspeed_init)


def unregister() -> None:
    """Take back what `register` did to the Trainer. Idempotent."""
    while _originals:
        transformers.trainer.deepspeed_init = _originals.pop()


def _refuse_to_drop(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def deepspeed_init(trainer: Any, num_training_steps: int, inference: bool = False) -> Any:
        given = trainer.optimizer
        optimizer, lr_scheduler = original(trainer, num_training_steps, inference)
        if not inference and isinstance(given, MomentOptimizer) and not isinstance(optimizer, MomentOptimizer):
            name = type(given).__name__
            raise ValueError(
                f"optimizers=({name}, ...): with DeepSpeed the Trainer drops an optimizer object and would step "
                f"another; pass optimizer_cls_and_kwargs=({name}, {{...}}) instead, or override create_optimizer, or "
                f'name "{name}" in the "optimizer" section of the DeepSpeed configuration alone'
            )
        return optimizer, lr_scheduler

    return deepspeed_init


register()
