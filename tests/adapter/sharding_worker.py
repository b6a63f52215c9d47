"""One of two processes that train a sharded FoRA model; run by test_sharding.py under torchrun.

Trains three steps on its half of the rows, and compares losses and gathered weights with an
unsharded model that sees all rows. Exits with an error where they differ.
"""

import copy
import sys

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from transformers import LlamaConfig, LlamaForCausalLM

from fedfora import ForaConfig

STEPS = 3


def make():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=80,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    model = get_peft_model(copy.deepcopy(base), ForaConfig(r=2, task_type="CAUSAL_LM"))
    return base, model


def shard(model, how):
    if how == "fsdp2":
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    # PEFT's own policy; accelerate uses it for every PEFT model.
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=how == "fsdp1-orig",
        device_id=torch.device("cpu"),
    )


def gather(sharded, how):
    if how == "fsdp2":
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(sharded, options=options)
    with FullyShardedDataParallel.state_dict_type(
        sharded, StateDictType.FULL_STATE_DICT, FullStateDictConfig(offload_to_cpu=False)
    ):
        return sharded.state_dict()


def train(model, rows):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def main(how, directory):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    rows = torch.randint(0, 80, (4, 9), generator=torch.Generator().manual_seed(1))
    base, whole = make()
    expected_losses = train(whole, rows)
    expected = get_peft_model_state_dict(whole)

    _, model = make()
    sharded = shard(model, how)
    losses = train(sharded, rows[2 * rank : 2 * rank + 2])
    dist.all_reduce(losses)
    torch.testing.assert_close(losses / 2, expected_losses, rtol=1e-4, atol=1e-5)

    full = gather(sharded, how)
    if rank == 0:
        gathered = get_peft_model_state_dict(whole, state_dict=full)
        assert gathered.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(gathered[name], tensor, rtol=1e-4, atol=1e-5)
        whole.load_state_dict(full, strict=False)
        whole.save_pretrained(directory)
        again = PeftModel.from_pretrained(base, directory)
        norms = {n: t.norm() for n, t in get_peft_model_state_dict(again).items()}
        assert all(torch.equal(norms[n], t.norm()) for n, t in gathered.items())
        assert sum(norms.values()) > 0
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
