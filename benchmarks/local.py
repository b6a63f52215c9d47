"""Training on one device: tokens per second against the original's recipe and against TRL's LoRA.

The data are the real car-repair rows, the tokenizer is trained on their text, the model is a random
Llama of hidden size 256. All arms train the same rows at the same rank on all linear layers:

- fedfora: `train_locally`, random batches without padding;
- original: one row at a time, padded to 1,024 tokens, every factor applied to the activations;
- TRL: SFTTrainer with PEFT's LoRA, batches of like length.

What counts is tokens of prompts and answers, padding left out, per second of processor time of one
thread. The arms take turns.

    OMP_NUM_THREADS=1 python benchmarks/local.py --train_file spo_train.json
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedfora.adapter import ForaLinear
from fedfora.cli.console import silence_libraries
from fedfora.data.encoding import Encoded, encode_examples, prompt_format_of
from fedfora.data.loading import load_examples
from fedfora.data.settings import DataArguments
from fedfora.models.adapter_base import add_adapter
from fedfora.models.loading import Base
from fedfora.models.settings import AdapterArguments
from fedfora.training.local import train_locally
from fedfora.training.schedule import StepWindow
from fedfora.training.settings import TrainArguments
from fora_layer import FiveProducts
from record import ratio_of_pairs, write

RANK = 8
PADDED = 1024
RATE = 1e-3


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer of 4,000 pieces on the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=4000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def base_model(tokenizer: Any) -> LlamaForCausalLM:
    """A random Llama of hidden size 256 and four blocks."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
        )
    )
    return model.requires_grad_(False)


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one call: one thread, so that other programs do not count."""
    started = time.process_time()
    run()
    return time.process_time() - started


def fedfora_arm(model: LlamaForCausalLM, tokenizer: Any, batch: int) -> Callable[[Encoded], float]:
    """Return the function that trains rows with fedfora and returns the seconds."""
    base = Base(model, tokenizer, "benchmark", "none")
    adapted = add_adapter(base, AdapterArguments(lora_rank=RANK, lora_dropout=0.1), seed=0)
    settings = TrainArguments(
        learning_rate=RATE,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
    )

    def run(rows: Encoded) -> float:
        steps = -(-len(rows) // batch)
        stretch = StepWindow(0, steps, steps)
        return seconds(lambda: train_locally(adapted, rows, settings, stretch=stretch, seed=1))

    return run


def original_arm(model: LlamaForCausalLM, tokenizer: Any) -> Callable[[Encoded], float]:
    """Return the function that trains rows one by one, padded, in five products."""
    base = Base(model, tokenizer, "benchmark", "none")
    adapted = add_adapter(base, AdapterArguments(lora_rank=RANK, lora_dropout=0.1), seed=0)
    for module in adapted.modules():
        if isinstance(module, ForaLinear):
            module.__class__ = FiveProducts
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE)

    def padded(row: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        size = len(row["input_ids"])
        missing = PADDED - size
        return {
            "input_ids": torch.tensor([row["input_ids"] + [0] * missing]),
            "attention_mask": torch.tensor([[1] * size + [0] * missing]),
            "labels": torch.tensor([row["labels"] + [-100] * missing]),
        }

    def train(rows: Encoded) -> None:
        adapted.train()
        for number, row in enumerate(rows, start=1):
            (adapted(**padded(row)).loss / 4).backward()
            if number % 4 == 0:
                torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
                optimizer.step()
                optimizer.zero_grad()

    return lambda rows: seconds(lambda: train(rows))


def trl_arm(model: LlamaForCausalLM, tokenizer: Any, batch: int) -> Callable[[Encoded], float]:
    """Return the function that trains rows with TRL and PEFT's LoRA."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import SFTConfig, SFTTrainer

    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.1, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = get_peft_model(model, config)

    def run(rows: Encoded) -> float:
        columns = [
            {
                "input_ids": row["input_ids"],
                "completion_mask": [int(label != -100) for label in row["labels"]],
            }
            for row in rows
        ]
        with tempfile.TemporaryDirectory() as scratch:
            arguments = SFTConfig(
                output_dir=scratch,
                max_length=None,
                per_device_train_batch_size=batch,
                num_train_epochs=1,
                learning_rate=RATE,
                train_sampling_strategy="group_by_length",
                gradient_checkpointing=False,
                bf16=False,
                logging_steps=10,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                dataloader_pin_memory=False,
                disable_tqdm=True,
            )
            trainer = SFTTrainer(
                model=adapted,
                args=arguments,
                train_dataset=Dataset.from_list(columns),
                processing_class=tokenizer,
            )
            return seconds(trainer.train)

    return run


def main() -> None:
    """Measure all arms in turns and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--original_rows", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    silence_libraries()
    examples = load_examples(options.train_file, DataArguments())
    tokenizer = tokenizer_of([f"{e.prompt}\n{e.output}" for e in examples])
    prompt_format = prompt_format_of(DataArguments(), tokenizer)
    chosen = examples[: options.rows]
    rows = encode_examples(chosen, tokenizer, prompt_format)
    model = base_model(tokenizer)
    arms = {
        "fedfora": (fedfora_arm(copy.deepcopy(model), tokenizer, options.batch), rows),
        "trl": (trl_arm(copy.deepcopy(model), tokenizer, options.batch), rows),
        "original": (
            original_arm(copy.deepcopy(model), tokenizer),
            rows[: options.original_rows],
        ),
    }
    for run, some in arms.values():
        run(some[: options.batch])  # imports and first calls
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(options.pairs):
        for name, (run, some) in arms.items():
            tokens = sum(len(row["input_ids"]) for row in some)
            times[name].append(run(some) / tokens)
    characters = sum(len(e.prompt) + len(e.output or "") for e in chosen)
    tokens = sum(len(row["input_ids"]) for row in rows)
    write(
        "local",
        {
            "rows": options.rows,
            "batch": options.batch,
            "rank": RANK,
            "mean_tokens_per_row": tokens / len(rows),
            "tokens_per_character": tokens / characters,
            "seconds_per_token": times,
            "times_the_originals_tokens_per_second": ratio_of_pairs(
                times["original"], times["fedfora"]
            ),
            "times_trls_tokens_per_second": ratio_of_pairs(times["trl"], times["fedfora"]),
        },
    )


if __name__ == "__main__":
    main()
