"""Growth of sharded models under torch.distributed: FSDP2 and tensor parallelism, and their checkpoints."""

from growformer.distributed.growth import Sharder, grow_sharded
from growformer.distributed.rates import load_rates, save_rates

__all__ = ["Sharder", "grow_sharded", "load_rates", "save_rates"]
