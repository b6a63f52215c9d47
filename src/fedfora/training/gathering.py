"""The adapter of a model whose weights lie in several processes, as one state on the CPU."""

from typing import Any

from fedfora.adapter.state import AdapterState, read_state, state_from_dict


def gather_adapter(trainer: Any) -> AdapterState:
    """Return all factors, whole; every process of the training must call this.

    Under DeepSpeed ZeRO-3 only the adapter's weights are gathered, under FSDP the model's, on the
    CPU. In all other cases every process has the whole adapter.

    Args:
        trainer: A `Trainer` that has been prepared for its processes.
    """
    if trainer.is_deepspeed_enabled and _zero_stage(trainer) == 3:
        import deepspeed

        adapter = [p for p in trainer.model.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(adapter):
            return read_state(trainer.model)
    if trainer.is_fsdp_enabled:
        return state_from_dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))
    return read_state(trainer.accelerator.unwrap_model(trainer.model))


def _zero_stage(trainer: Any) -> int:
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage)
