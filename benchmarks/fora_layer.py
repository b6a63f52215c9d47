"""What a FoRA step costs beside a LoRA step of the same rank: time, and bytes kept for backward.

A block of a Llama, all linear layers adapted, forward and backward, in turns in one process with
one thread; processor time. Beside the folded form stands the five-product form (each factor applied
to the activations), which shows what folding the core is worth.

    OMP_NUM_THREADS=1 python benchmarks/fora_layer.py
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from fedfora import ForaConfig
from fedfora.adapter import ForaLinear
from fedfora.cli.console import silence_libraries
from record import ratio_of_pairs, write

RANK = 8


class FiveProducts(ForaLinear):
    """FoRA as the formula is written: every factor applied to the activations."""

    def _update(self, x_I: Tensor, name: str) -> Tensor:
        A, B, C, D, E = (self.factor(letter, name) for letter in "ABCDE")
        h_R = A(self.fora_dropout[name](x_I))
        update_O: Tensor = D(h_R + E(h_R) + C(B(h_R))) * self.scaling[name]
        return update_O


def block(hidden: int) -> LlamaModel:
    """One block of a Llama of the given width, with a tiny vocabulary."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=int(hidden * 2.75),
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaModel(config)


def adapted(form: str, hidden: int, dropout: float) -> nn.Module:
    """Return the block with LoRA, FoRA, or FoRA in five products."""
    if form == "lora":
        config: Any = LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules="all-linear"
        )
        return get_peft_model(block(hidden), config).train()
    config = ForaConfig(r=RANK, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(block(hidden), config).train()
    if form == "five products":
        for module in model.modules():
            if isinstance(module, ForaLinear):
                module.__class__ = FiveProducts
    return model


def step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward; the input needs its gradient, as in the middle of a model."""
    model(inputs_embeds=x).last_hidden_state.sum().backward()


def seconds(run: Callable[[], None]) -> float:
    """Return the processor time of one call, on which other programs have little influence."""
    started = time.process_time()
    run()
    return time.process_time() - started


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes of all different tensors that autograd keeps, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(inputs_embeds=x).last_hidden_state
    del output
    return sum(kept.values())


def extra_numbers(models: dict[str, nn.Module], hidden: int, tokens: int) -> float:
    """Return the numbers FoRA keeps beyond LoRA for each further token in each layer."""
    extra = []
    for length in (tokens, 2 * tokens):
        x = torch.randn(1, length, hidden, requires_grad=True)
        extra.append(saved_bytes(models["fora"], x) - saved_bytes(models["lora"], x))
    num_layers = sum(isinstance(module, ForaLinear) for module in models["fora"].modules())
    return (extra[1] - extra[0]) / 4 / tokens / num_layers


def measure(hidden: int, tokens: int, dropout: float, pairs: int) -> dict[str, Any]:
    """Return the ratios of one shape."""
    x = torch.randn(1, tokens, hidden, requires_grad=True)
    models = {f: adapted(f, hidden, dropout) for f in ("lora", "fora", "five products")}
    times: dict[str, list[float]] = {form: [] for form in models}
    for model in models.values():
        step(model, x)
    for _ in range(pairs):
        for form, model in models.items():
            times[form].append(seconds(lambda m=model: step(m, x)))  # type: ignore[misc]
    kept = {form: saved_bytes(model, x) for form, model in models.items()}
    return {
        "hidden": hidden,
        "tokens": tokens,
        "dropout": dropout,
        "rank": RANK,
        "lora_step_s": median(times["lora"]),
        "fora_over_lora_time": ratio_of_pairs(times["fora"], times["lora"]),
        "five_products_over_lora_time": ratio_of_pairs(times["five products"], times["lora"]),
        "saved_bytes": kept,
        "fora_over_lora_saved_bytes": kept["fora"] / kept["lora"],
        "extra_numbers_per_token_and_layer": extra_numbers(models, hidden, tokens),
    }


def main() -> None:
    """Measure all shapes and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    silence_libraries()
    shapes = [
        measure(hidden, tokens, dropout, options.pairs)
        for hidden, tokens in ((512, 512), (1024, 512), (1024, 1024), (2048, 512))
        for dropout in (0.0, 0.1)
    ]
    write("fora_layer", {"shapes": shapes})


if __name__ == "__main__":
    main()
