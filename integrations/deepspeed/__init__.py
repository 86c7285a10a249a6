"""AdaX and AdaXW as optimizer types of a DeepSpeed configuration.

    import adax_triton.integrations.deepspeed  # before deepspeed.initialize: registers the types

    config = {"optimizer": {"type": "AdaX", "params": {"lr": 1.5e-3}}, ...}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

`type` is case-insensitive. `params` takes the keyword arguments of `adax_triton.AdaX` or `AdaXW`. You can also pass an
optimizer object or a callable to `deepspeed.initialize`: it gets the same checks and patches.

The guide is docs/deepspeed.md. `register` lists the DeepSpeed methods that are replaced, and why.
"""

from .checkpoints.adam_conversion import switching_optimizer
from .config_checks import check_config
from .fused_step.fusion import describe
from .registration import register, unregister

__all__ = ["check_config", "describe", "register", "switching_optimizer", "unregister"]

register()
