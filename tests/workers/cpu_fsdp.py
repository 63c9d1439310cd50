"""FSDP2 through accelerate on a CPU, where accelerate trains with DDP instead and says nothing.

torch itself shards on a CPU. This sets what AcceleratorState sets for a GPU; everything after it
(wrapping, optimiser, checkpoints) is accelerate's and transformers' own.
"""

from accelerate.state import AcceleratorState, DistributedType, PartialState


def let_accelerate_shard_on_a_cpu() -> None:
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init
