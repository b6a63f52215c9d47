"""One party run by FATE-LLM's own Seq2SeqRunner, with fedfora's model class.

usage: runner_worker.py DUMP_DIR IGNORED FLAGS...

With today's libraries that runner needs two shims, both here and neither in fedfora, which does not
use the runner: FATE's components declare their models for pydantic 1, and FATE-LLM's trainer hands
over a `tokenizer`, which transformers 5 calls `processing_class`.
"""

import logging
import sys
from pathlib import Path

import pydantic
import pydantic.v1
import transformers

modern = sys.modules["pydantic"]
sys.modules["pydantic"] = pydantic.v1
from fate.components.core import ARBITER, GUEST, HOST  # noqa: E402

sys.modules["pydantic"] = modern

original = transformers.Trainer.__init__


def with_tokenizer(self, *args, tokenizer=None, **kwargs):
    original(self, *args, processing_class=tokenizer, **kwargs)


transformers.Trainer.__init__ = with_tokenizer

from fate_llm.runner.homo_seq2seq_runner import Seq2SeqRunner  # noqa: E402

from fedfora.config import ConfigParser  # noqa: E402
from fedfora.integrations.fate.party import join  # noqa: E402
from fedfora.integrations.fate.settings import AGGREGATOR, SECTIONS, FateSettings  # noqa: E402


def configuration(settings):
    """What a user of FATE-LLM writes: the core alone trains, so the mean of tensors is exact."""
    name, train, fate = settings.model.model_name_or_path, settings.train, settings.fate

    def item(module, name, **kwargs):
        return {"module_name": module, "item_name": name, "kwargs": kwargs}

    core = {"task_type": "CAUSAL_LM", "r": 8, "init_weights": "svd", "trainable": "core"}
    return {
        "algo": "fedavg",
        "model_conf": item(
            "fedfora.integrations.fate.pellm",
            "ForaCausalLM",
            pretrained_path=name,
            peft_config=core,
            seed=7,
            quantization="none",
        ),
        "dataset_conf": item("runner_rows", "AnswerRows", model=name),
        "data_collator_conf": item("runner_rows", "collator", model=name),
        "training_args_conf": {
            "max_steps": fate.num_rounds * fate.local_steps,
            "per_device_train_batch_size": train.per_device_train_batch_size,
            "learning_rate": train.learning_rate,
            "remove_unused_columns": False,
            "report_to": "none",
            "seed": 7,
        },
        "fed_args_conf": {
            "aggregate_strategy": "steps",
            "aggregate_freq": fate.local_steps,
            "aggregator": AGGREGATOR,
        },
        "task_type": "causal_lm",
        "save_trainable_weights_only": True,
    }


def main(dump_dir, words):
    logging.disable(logging.WARNING)
    settings = FateSettings(*ConfigParser(SECTIONS.values()).parse(words))
    party = settings.fate.own_party()
    ctx, _ = join(settings.fate, party)
    runner = Seq2SeqRunner(**configuration(settings))
    runner.set_context(ctx)
    runner.set_role({"guest": GUEST, "host": HOST, "arbiter": ARBITER}[party[0]])
    Path(dump_dir).mkdir(parents=True)
    runner.train(settings.data.train_file, output_dir=str(dump_dir))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3:])
