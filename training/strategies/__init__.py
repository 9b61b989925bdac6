"""Ways to run a model over ranks, behind one interface (training/strategies/base.py)."""

from training.config import DDPConfig, DeepSpeedConfig, FSDPConfig, RunConfig
from training.distributed import Distributed
from training.strategies.base import Strategy


def build_strategy(config: RunConfig, distributed: Distributed) -> Strategy:
    """Build the strategy named by `strategy=`. An engine is imported only if chosen."""
    bf16, compile_model = config.train.precision == "bf16", config.train.compile is True
    # A central difference moves the weights by less than bf16 resolves.
    needs_float32 = config.estimator == "hutchinson_differences"
    match config.strategy:
        case DDPConfig():
            from training.strategies.ddp import DDP

            return DDP(distributed, bf16=bf16, compile_model=compile_model)
        case FSDPConfig():
            from training.strategies.fsdp import FSDP

            return FSDP(
                distributed, config.strategy, bf16=bf16, compile_model=compile_model, gather_bf16=not needs_float32
            )
        case DeepSpeedConfig():
            from training.strategies.deepspeed import DeepSpeed

            return DeepSpeed(
                distributed, config.strategy, bf16=bf16, compile_model=compile_model, engine_bf16=not needs_float32
            )
