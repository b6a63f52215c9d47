"""Training on real rows: another version of fedfora, TRL's SFTTrainer and plain PEFT, in turns.

All arms train the same rows once, at rank 8 on all linear layers, each in a process of its own and
with its own default for the number format: `before` and `now` by `fedfora train --quantization
none`; `trl` with SFTTrainer in bfloat16 (padded: its padding-free batches need FlashAttention);
`peft` with transformers' Trainer in bfloat16. Tokens are those of the rows, without padding. Times
run from the start of the training to the end of its last step, without loading.

    OMP_NUM_THREADS=1 python benchmarks/training.py --before ../older/src \
        --model_name_or_path SMOLLM2 --train_file ade_train.json --batch 8
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import apart, available_gb, measured, speed
from record import ratio_of_pairs, write

RANK, RATE = 8, 1e-3


def short_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the first rows that are not longer than `--max_tokens`, as many as the steps take."""
    from fedfora.data.encoding import encode_examples, prompt_format_of
    from fedfora.data.loading import load_examples
    from fedfora.data.settings import DataArguments
    from fedfora.models.loading import load_tokenizer
    from fedfora.models.settings import ModelArguments

    tokenizer = load_tokenizer(ModelArguments(model_name_or_path=options.model_name_or_path))
    number = options.batch * options.steps
    examples = load_examples(options.train_file, DataArguments())[: 4 * number]
    encoded = encode_examples(examples, tokenizer, prompt_format_of(DataArguments(), tokenizer))
    both = zip(examples, encoded, strict=True)
    short = [(e, r) for e, r in both if len(r["input_ids"]) <= options.max_tokens][:number]
    return [{"instruction": e.prompt, "output": e.output, **row} for e, row in short]


def peer(options: argparse.Namespace) -> None:
    """Train with TRL or PEFT in this process, and write lines as fedfora does."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    place = Path(options.place)
    rows = json.loads((place / "encoded.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear",
                      task_type="CAUSAL_LM")  # fmt: skip
    common = {
        "output_dir": str(place / "trainer"), "per_device_train_batch_size": options.batch,
        "num_train_epochs": 1, "learning_rate": RATE, "bf16": True, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "gradient_checkpointing": False,
    }  # fmt: skip
    metrics = place / "out" / "metrics.jsonl"
    metrics.parent.mkdir()

    class Lines(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.line(event="started")

        def on_log(self, args: Any, state: Any, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                done = sum(len(row["input_ids"]) for row in rows)
                tokens = done * state.global_step // state.max_steps
                self.line(event="step", step=state.global_step, loss=logs["loss"], tokens=tokens)

        def line(self, **values: Any) -> None:
            with metrics.open("a") as file:
                file.write(json.dumps(values) + "\n")

    if options.arm == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        columns = [
            {"input_ids": row["input_ids"],
             "completion_mask": [int(label != -100) for label in row["labels"]]}
            for row in rows
        ]  # fmt: skip
        trainer: Any = SFTTrainer(
            model=model,
            args=SFTConfig(**common, max_length=None, completion_only_loss=True),
            train_dataset=Dataset.from_list(columns),
            processing_class=tokenizer,
            peft_config=lora,
        )
    else:
        trainer = Trainer(
            model=get_peft_model(model, lora),
            args=TrainingArguments(**common),
            train_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
        )
    trainer.add_callback(Lines())
    trainer.train()


def one_run(arm: str, options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the speed and memory of one training."""
    with tempfile.TemporaryDirectory() as place:
        text = [{k: row[k] for k in ("instruction", "output")} for row in rows]
        ids = [{k: row[k] for k in ("input_ids", "labels")} for row in rows]
        (Path(place) / "rows.json").write_text(json.dumps(text))
        (Path(place) / "encoded.json").write_text(json.dumps(ids))
        if arm in ("trl", "peft"):
            command = [__file__, *sys.argv[1:], "--arm", arm, "--place", place]
        else:
            command = (
                f"-m fedfora train --model_name_or_path {options.model_name_or_path} "
                f"--train_file {place}/rows.json --output_dir {place}/out --quantization none "
                f"--lora_rank {RANK} --num_train_epochs 1 --learning_rate {RATE} "
                f"--per_device_train_batch_size {options.batch} --gradient_accumulation_steps 1 "
                "--logging_steps 1"
            ).split()
        while available_gb() < options.limit_gb:  # other programs' memory is not to run out
            time.sleep(5)
        source = options.before if arm == "before" else None
        figures = measured(command, Path(place), source, options.limit_gb)
    return {**speed(figures.pop("lines")), **figures}


def main() -> None:
    """Measure all arms in turns and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--before", help="source tree of another fedfora")
    parser.add_argument("--arms", nargs="+", default=["before", "now", "trl", "peft"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=512, help="longer rows are left out")
    parser.add_argument("--limit_gb", type=float, default=12, help="a run waits for, and may take")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        peer(options)
        return
    rows = apart(short_rows, options)
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in options.arms}
    for _ in range(options.pairs):
        for arm, done in runs.items():
            done.append(one_run(arm, options, rows))
            print(arm, json.dumps(done[-1]), flush=True)
        write(f"training-batch-{options.batch}", figures_of(runs, rows))


def figures_of(runs: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of the pairs, and all runs; the clock counts what ran beside, too."""
    keys = ("tokens_per_processor_s", "tokens_per_s", "private_gb", "resident_gb")
    ratios = {
        f"now_to_{arm}": {
            key: ratio_of_pairs([run[key] for run in runs["now"]], [run[key] for run in done])
            for key in keys
        }
        for arm, done in runs.items()
        if arm != "now"
    }
    lengths = [len(row["input_ids"]) for row in rows]
    figures = {"rows": len(rows), "longest_row": max(lengths), "tokens": sum(lengths)}
    return {**figures, **ratios, "runs": runs}


if __name__ == "__main__":
    main()
