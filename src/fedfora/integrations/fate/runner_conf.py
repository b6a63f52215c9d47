"""A party's settings to the configuration that FATE-LLM's Seq2SeqRunner takes.

Plain values only: FATE finds classes by module and name. `fedfora fate` builds its party from the
same configuration and writes it to the run directory, for FATE-Flow.
"""

from dataclasses import asdict
from typing import Any

from fedfora.integrations.fate.settings import FateSettings
from fedfora.models.loading import adapter_options
from fedfora.training.settings import LEARNING_RATE

NOT_FOR_FATE = ("train_file", "test_file")  # FATE binds files to a party by its own means


def runner_conf(settings: FateSettings, *, seed: int) -> dict[str, Any]:
    """Return the keyword arguments of `fate_llm.runner.homo_seq2seq_runner.Seq2SeqRunner`.

    Args:
        settings: The party's.
        seed: The federation's, from which the fresh adapter is drawn.
    """
    name, train, fate = settings.model.model_name_or_path, settings.train, settings.fate
    base = {k: v for k, v in asdict(settings.model).items() if k != "model_name_or_path"}
    data = {k: v for k, v in asdict(settings.data).items() if k not in NOT_FOR_FATE}
    package = "fedfora.integrations.fate"
    return {
        "algo": "fedavg",
        "model_conf": _item(
            f"{package}.pellm",
            "ForaCausalLM",
            pretrained_path=name,
            peft_type="ForaConfig",
            peft_config=peft_options(settings),
            seed=seed,
            **base,
        ),
        "dataset_conf": _item(
            f"{package}.dataset", "AnswerRows", tokenizer_name_or_path=name, **data
        ),
        "data_collator_conf": _item(
            f"{package}.dataset", "answer_collator", tokenizer_name_or_path=name
        ),
        "training_args_conf": {
            "max_steps": fate.num_rounds * fate.local_steps,
            "per_device_train_batch_size": train.per_device_train_batch_size,
            "gradient_accumulation_steps": train.gradient_accumulation_steps,
            "learning_rate": LEARNING_RATE if train.learning_rate is None else train.learning_rate,
            "lr_scheduler_type": train.lr_scheduler_type,
            "weight_decay": train.weight_decay,
            "max_grad_norm": train.max_grad_norm,
            "optim": train.optim,
            "seed": seed,
            "remove_unused_columns": False,
            "report_to": "none",
        },
        "fed_args_conf": {
            "aggregate_strategy": "steps",
            "aggregate_freq": fate.local_steps,
            "aggregator": fate.aggregator,
        },
        "task_type": "causal_lm",
        "save_trainable_weights_only": True,
    }


def peft_options(settings: FateSettings) -> dict[str, Any]:
    """Return the options of `ForaConfig`; a core alone starts from the base weight."""
    first = settings.fate.trained_in(0)
    return {
        **adapter_options(settings.adapter),
        "init_weights": "svd" if first == "core" else True,
        "trainable": first,
    }


def _item(module_name: str, item_name: str, **kwargs: Any) -> dict[str, Any]:
    return {"module_name": module_name, "item_name": item_name, "kwargs": kwargs}
