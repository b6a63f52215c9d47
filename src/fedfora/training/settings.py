"""The user's settings for training: steps, batches, optimizer."""

import os
from dataclasses import dataclass, fields
from typing import Literal

from fedfora.config import Options, flag, refuse
from fedfora.data.settings import DataArguments
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.privacy.accounting import Release
from fedfora.privacy.settings import PrivacyArguments, check_num_rows, noise_of
from fedfora.reporting.record import RunArguments

LEARNING_RATE, EPOCHS = 2e-4, 3.0
BATCH = (1, 4)  # the defaults of batch and accumulation
SAMPLING_RATE = 0.5  # of private steps: twice as fast as whole samples, for 5 to 12 % more noise
# Rows of a private step, at most: of 2,400 a third more noise for a quarter of the gradients.
PRIVATE_ROWS = 300
PRIVATE_STEPS = 120


@dataclass
class TrainArguments(Options):
    """Training; names and meanings as in transformers.TrainingArguments."""

    learning_rate: float | None = flag(
        None,
        "peak learning rate; default 2e-4, with --privacy_unit record one that suits noise and "
        "the model's width",
        least=0,
        often=True,
    )
    lr_scheduler_type: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
    ] = flag("cosine", "learning rate schedule after warm-up")
    warmup_ratio: float = flag(0.1, "share of the steps used for warm-up", within="[0, 1)")
    num_train_epochs: float | None = flag(
        None,
        "passes over the training rows; default 3, with --privacy_unit record 120 steps",
        often=True,
    )
    max_steps: int = flag(-1, "optimizer steps; if positive, in place of epochs", often=True)
    per_device_train_batch_size: int = flag(
        BATCH[0], "rows per optimizer step and device ...", least=1, often=True
    )
    gradient_accumulation_steps: int = flag(BATCH[1], "... times this", least=1)
    max_tokens_per_pass: int | None = flag(
        None,
        "tokens per forward pass: the rows of larger steps are split into several; "
        "default 2048 on a CPU, 16384 on a GPU",
        least=1,
    )
    optim: Literal["adamw_torch_fused", "adamw_torch", "sgd", "adamw_8bit", "paged_adamw_8bit"] = (
        flag("adamw_torch_fused", "optimizer; the 8-bit ones need a GPU")
    )
    weight_decay: float = flag(0.0, "weight decay of the optimizer", least=0)
    max_grad_norm: float = flag(1.0, "gradient clipping norm; 0 disables clipping", least=0)
    packing: bool = flag(
        False,
        "draw several rows in place of one, with --packing_length tokens together",
    )
    packing_length: int = flag(1024, "tokens of rows drawn together, if more than one", least=1)
    gradient_checkpointing: bool = flag(False, "save memory; a step takes half as long again")
    fp16: bool = flag(False, "float16 mixed precision")
    bf16: bool = flag(False, "bfloat16 mixed precision")
    logging_steps: int = flag(
        10, "steps between log lines; fewer if that gives less than ten lines", least=1
    )
    seed: int = flag(42, "seed of all randomness in the run")

    def __post_init__(self) -> None:
        super().__post_init__()
        epochs = self.num_train_epochs
        if self.max_steps == 0 or (epochs is not None and epochs <= 0):
            raise ValueError(
                "nothing to train: --max_steps must be positive (or -1 for epochs) and "
                f"--num_train_epochs above 0, got {self.max_steps} and {self.num_train_epochs}"
            )
        if self.fp16 and self.bf16:
            raise ValueError("--fp16 and --bf16 exclude each other")

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, for each device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def sampling_rate(self, privacy: PrivacyArguments, num_rows: int) -> float:
        """Return the probability with which a row is in a private step's sample.

        A batch that is named is a share of the site's rows. Where sites share the noise all have
        one rate, whatever their rows.
        """
        if privacy.sampling_rate is not None:
            return privacy.sampling_rate
        if self.names_batch:
            return min(1.0, self.rows_per_step / num_rows)
        most = 1.0 if privacy.shared_noise else PRIVATE_ROWS / num_rows
        return min(SAMPLING_RATE, most)

    @property
    def names_batch(self) -> bool:
        """Whether somebody chose how many rows a step has."""
        return (self.per_device_train_batch_size, self.gradient_accumulation_steps) != BATCH


@dataclass
class CheckpointArguments(Options):
    """Checkpoints."""

    save_steps: int = flag(500, "steps between checkpoints; the last step is always saved", least=1)
    save_total_limit: int | None = flag(
        None, "number of recent checkpoints to keep; default: all", least=1
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "checkpoint directory to resume from, or 'last' for the newest in output_dir, if any",
        often=True,
    )


@dataclass
class ValidationArguments(Options):
    """Validation and early stopping."""

    validation_file: str | None = flag(
        None, "rows for measuring the validation loss during training", often=True
    )
    eval_steps: int | None = flag(None, "steps between validations; default: save_steps", least=1)
    per_device_eval_batch_size: int = flag(16, "rows per forward pass in validation", least=1)
    load_best_model_at_end: bool = flag(
        False, "keep the adapter with the lowest validation loss, not the last one"
    )
    early_stopping_patience: int | None = flag(
        None,
        "stop after this many validations without a lower loss, and keep the best adapter",
        least=1,
    )
    early_stopping_threshold: float = flag(
        0.0, "minimum decrease that counts as a lower loss", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_steps", "early_stopping_patience", "load_best_model_at_end"):
            if getattr(self, name) and self.validation_file is None:
                raise ValueError(f"--{name} needs --validation_file")

    @property
    def keeps_best(self) -> bool:
        """Whether the adapter with the lowest loss is kept; stopping early implies it."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None


@dataclass
class LaunchArguments:
    """Processes and trackers."""

    deepspeed: str | None = flag(None, "DeepSpeed configuration, e.g. configs/deepspeed_zero2.json")
    local_rank: int = flag(-1, "device index on this machine; set by launchers", "--local-rank")
    report_to: list[str] = flag(
        ["auto"], "tensorboard, wandb, mlflow, ... or none; auto: tensorboard if installed"
    )


@dataclass(frozen=True)
class TrainSettings:
    """All settings of `fedfora train`."""

    run: RunArguments
    model: ModelArguments
    data: DataArguments
    train: TrainArguments
    adapter: AdapterArguments
    checkpoint: CheckpointArguments
    validation: ValidationArguments
    launch: LaunchArguments
    privacy: PrivacyArguments

    def __post_init__(self) -> None:
        """Refuse flags that exclude each other; what needs the rows or the base comes later."""
        fill_in(self.train, self.privacy)
        check_record_privacy(self.privacy, self.train, self.model)
        many = self.launch.deepspeed is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1
        save, validate = self.checkpoint.save_steps, self.validation.eval_steps
        private = self.privacy.privacy_unit == "record"
        told = sorted(set(self.launch.report_to) - {"auto", "none", "tensorboard"})
        refuse(
            (
                private and self.validation.validation_file is not None,
                "--validation_file: losses of its rows, and an adapter chosen by them, have no "
                "noise; with --privacy_unit record evaluate afterwards, on rows that may be known",
            ),
            (
                private and bool(told),
                f"--report_to {' '.join(told)} sends losses of private rows elsewhere; with "
                "--privacy_unit record: tensorboard (kept under local) or none",
            ),
            (self.privacy.shared_noise, "--shared_noise is for several sites; train has one"),
            (
                self.privacy.privacy_unit == "site",
                "--privacy_unit site hides sites from each other; train has one (use record)",
            ),
            (private and many, "--privacy_unit record trains in one process, without DeepSpeed"),
            (
                self.validation.keeps_best and save % (validate or save) != 0,
                f"--save_steps {save} must be a multiple of --eval_steps {validate}: the best "
                "adapter comes from a checkpoint that was validated",
            ),
        )


SECTIONS = {field.name: field.type for field in fields(TrainSettings)}
NO_EFFECT = {"canary_site"}  # a training is site 0, and there is no other


def fill_in(train: TrainArguments, privacy: PrivacyArguments, *, passes: bool = True) -> None:
    """Write down the defaults of a training without noise; with noise its recipe chooses them.

    With `passes` the training is as long as its passes over the rows.
    """
    if privacy.privacy_unit != "record":
        train.learning_rate = LEARNING_RATE if train.learning_rate is None else train.learning_rate
        if passes and train.num_train_epochs is None:
            train.num_train_epochs = EPOCHS


def check_record_privacy(
    privacy: PrivacyArguments, train: TrainArguments, model: ModelArguments | None = None
) -> None:
    """Raise if a training flag takes from record privacy what it rests on, naming both."""
    if privacy.privacy_unit == "record":
        refuse(
            (
                privacy.sampling_rate is not None and train.names_batch,
                "--sampling_rate and a batch (--per_device_train_batch_size times "
                "--gradient_accumulation_steps) both say how large a sample is: name one",
            ),
            (
                train.packing,
                "--packing decides which rows meet in a batch; with --privacy_unit record chance "
                "alone does",
            ),
            (
                model is not None and model.quantization == "int8",
                "--quantization int8 rounds rows by their batch: not with --privacy_unit record",
            ),
            (
                train.fp16,
                "--fp16 scales gradients before they can be clipped: with --privacy_unit record "
                "use --bf16",
            ),
        )


def check_device(settings: TrainArguments, device: str) -> None:
    """Raise if the device cannot do what the settings ask for.

    Raises:
        ValueError: Naming the flag and what works instead.
    """
    if device != "cpu":
        return
    if settings.fp16:
        raise ValueError("--fp16 needs a GPU; use --bf16 on a CPU")
    if settings.optim.endswith("8bit"):
        raise ValueError(f"--optim {settings.optim} needs a GPU; use adamw_torch_fused")


def private_steps(train: TrainArguments, privacy: PrivacyArguments, num_rows: int) -> int:
    """Return the steps of a private training: those named, those of the passes named, or 120."""
    if train.max_steps > 0:
        return train.max_steps
    if train.num_train_epochs is None:
        return PRIVATE_STEPS
    return max(1, round(train.num_train_epochs / train.sampling_rate(privacy, num_rows)))


def planned_release(
    train: TrainArguments, privacy: PrivacyArguments, num_rows: int, num_steps: int | None = None
) -> Release:
    """Return what a private training is to release; raise, naming the flag, where it cannot."""
    check_num_rows(privacy, num_rows)
    rate = train.sampling_rate(privacy, num_rows)
    count = num_steps or private_steps(train, privacy, num_rows)
    return Release(rate, noise_of(privacy, count=count, sampling_rate=rate), count)
