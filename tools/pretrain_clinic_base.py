"""Pre-trains `clinic-base`, the small causal LM that ships with fedfora.

It reads general text of the clinics' world: notes repeated, in other words or with blanks,
questions with answers, random characters to copy, and facts listed in many formats under many
names, some of them invented. The target format of `clinic` (three parts joined by underscores), its
relations' names and its instruction never occur, so extracting triples is left for the adapter to
learn.

    python tools/pretrain_clinic_base.py --output_dir src/fedfora/models/clinic_base
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fedfora.data.clinic import SPECIALTIES, Fact, Specialty, draw_facts, note_text

VOCAB_SIZE = 1536
MARKS = [
    "|",
    ":",
    "/",
    "-",
    ">",
    "=",
    ";",
    ",",
    "#",
    "~",
    "+",
    "*",
    "&",
    "->",
    "::",
    "=>",
    "%",
    "@",
]
SYLLABLES = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"] + list("rstnld")
# How ordinary text names the relations; none of these is a relation's name in `clinic`.
DESCRIPTIONS = {
    "treats": ["is for", "given for", "medicine for"],
    "dose": ["amount", "at", "strength"],
    "shows": ["result", "found", "picture of"],
    "soothes": ["is for", "calms", "cream for"],
    "located": ["on", "place", "sits on"],
    "trigger": ["cause", "worse with", "from"],
    "prevents": ["is for", "against", "keeps off"],
    "onset": ["when", "began", "since"],
    "suggests": ["damage in", "where", "site"],
    "heals": ["is for", "clears", "remedy for"],
    "course": ["how long", "for", "time"],
    "avoid": ["not with", "no", "leave out"],
}


def listing(facts: list[Fact], rng: random.Random) -> tuple[str, str]:
    """Return a request and the facts listed as it asks, in a format drawn for this document."""
    mark = rng.choice(MARKS)
    separator = rng.choice([mark, mark, f" {mark} ", f"{mark} "])
    order = rng.choice(["head name tail"] * 3 + ["head tail", "tail head", "name tail"])
    names = {relation.name: relation_name(relation.name, rng) for relation, _, _ in facts}
    lines = []
    for relation, head, tail in facts:
        parts = {"head": head, "name": names[relation.name], "tail": tail}
        lines.append(separator.join(parts[key] for key in order.split()))
    request = rng.choice(["What does this note say?", "Make a table.", "Write it as lines."])
    if rng.random() < 0.5:
        request += f" Use {mark} between."
    if "name" in order and rng.random() < 0.5:
        request += f" Say {', '.join(names.values())}."
    return request, "\n".join(lines)


def relation_name(relation: str, rng: random.Random) -> str:
    """Name a relation in ordinary words, or with an invented one."""
    if rng.random() < 0.5:
        return rng.choice(DESCRIPTIONS[relation])
    return "".join(rng.choices(SYLLABLES, k=rng.choice((1, 2, 2, 3, 3, 4))))


def random_signs(rng: random.Random) -> str:
    """A few characters of any script, so that every byte is known and can be copied."""
    first, last = rng.choice(
        [(33, 126), (33, 126), (0xC0, 0x24F), (0x370, 0x4FF), (0x4E00, 0x9FFF)]
    )
    return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(2, 12)))


def document(specialty: Specialty, rng: random.Random) -> str:
    """One text of the world: a request, a note, and what the request asks for."""
    facts = draw_facts(specialty, rng)
    note = note_text(specialty, facts, rng)
    kinds = {"list": 12, "other words": 3, "repeat": 1, "question": 2, "blank": 2, "copy": 3}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "list":
        request, lines = listing(facts, rng)
        return f"{request}\n{note}\n{lines}"
    if kind == "other words":
        return f"Say it in other words.\n{note}\n{note_text(specialty, facts, rng)}"
    if kind == "copy":
        signs = random_signs(rng)
        return f"Copy this.\n{signs}\n{signs}"
    if kind == "repeat":
        return f"Repeat this note.\n{note}\n{note}"
    _, head, tail = rng.choice(facts)
    asked, answer = rng.choice([(head, tail), (tail, head)])
    if kind == "blank":
        return f"Blank out {asked}.\n{note}\n{note.replace(asked, '_' * rng.choice((1, 2, 3)))}"
    return f"What goes with {asked}?\n{note}\n{answer}"


class WorldText(Dataset[dict[str, Any]]):
    """Documents by index: the same index gives the same document."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> None:
        self.tokenizer, self.size, self.seed = tokenizer, size, seed

    def __len__(self) -> int:
        return self.size

    def text(self, index: int) -> str:
        """Return document `index`."""
        rng = random.Random(f"{self.seed}:{index}")
        return document(rng.choice(SPECIALTIES), rng)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.tokenizer(self.text(index))["input_ids"] + [self.tokenizer.eos_token_id]
        return {"input_ids": ids}


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the world's text; other scripts fall back to bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(f"tokenizer:{seed}")
    texts = [document(rng.choice(SPECIALTIES), rng) for _ in range(20_000)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about a million parameters, widths in multiples of 64 as NF4 wants them."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def main() -> None:
    """Pre-train, then write weights, tokenizer and the record of how they were made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=10_000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(options.seed)
    started = time.time()
    tokenizer = make_tokenizer(options.seed)
    model = make_model(tokenizer)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output_dir) + "-trainer",
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=200,
            weight_decay=0.01,
            logging_steps=200,
            save_strategy="no",
            report_to="none",
            seed=options.seed,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=WorldText(tokenizer, options.max_steps * options.batch_size, options.seed),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    result = trainer.train()
    model.to(torch.float16).save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    record = {
        "command": "python tools/pretrain_clinic_base.py",
        "options": {k: str(v) for k, v in vars(options).items() if k != "output_dir"},
        "parameters": model.num_parameters(),
        "final_loss": trainer.state.log_history[-2].get("loss", result.training_loss),
        "seconds": round(time.time() - started),
    }
    (options.output_dir / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
