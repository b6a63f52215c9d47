"""A Trainer of a site's own in place of the built-in training.

It is `transformers.Trainer`, or inherits from it as TRL's trainers do, with a LoRA or FoRA adapter.
A round asks it for the same as it asks of the built-in training: some steps of a schedule from a
given adapter, in place. Loss, rows, batches and optimizer are its own; nothing that a coordinator
sends changes them. Who takes part, what travels, screening, secure aggregation: all of it is the
same code, which knows nothing about Trainers.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from peft import LoraConfig, PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, Trainer, set_seed

from fedfora.adapter import ForaConfig
from fedfora.adapter.state import AdapterState, fold, layers_of, read_state
from fedfora.config import ConfigParser, Scalar, refuse
from fedfora.data.encoding import IGNORED, Encoded, prompt_format_of
from fedfora.data.partition import site_name
from fedfora.data.settings import DataArguments
from fedfora.federated.preflight import resolve_settings
from fedfora.federated.settings import FederationSettings, from_run_config
from fedfora.federated.site_runtime import SiteData, SiteRuntime, own_runtimes
from fedfora.models.fingerprint import fingerprint
from fedfora.models.loading import Base
from fedfora.models.saving import read_adapter
from fedfora.models.settings import AdapterArguments, ModelArguments
from fedfora.seeds import derive_seed
from fedfora.training.checkpoints import Progress
from fedfora.training.local import LocalResult, ProximalTerm, release_model
from fedfora.training.schedule import StepWindow, started_at
from fedfora.training.settings import TrainArguments
from fedfora.training.trainer import AfterStep, StepReport

logger = logging.getLogger(__name__)

# What a LoRA adapter may not have: the federation knows only its two factors, of one rank.
PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # the others change the base
} | dict.fromkeys(
    (
        *("use_dora", "use_qalora", "use_bdlora", "modules_to_save", "trainable_token_indices"),
        *("rank_pattern", "alpha_pattern", "lora_bias", "target_parameters", "layer_replication"),
        *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
    ),
    (None,),
)
TRAINERS_OWN = {
    item.name
    for section in (ModelArguments, AdapterArguments, TrainArguments, DataArguments)
    for item in fields(section)
} - {"seed", "test_file", "template", "source_prefix", "max_source_length", "max_target_length"}
TRAINERS_OWN |= {"partition", "min_rows_per_site", "site_ranks"}
# The training arguments that both sides have, by the same name.
SHARED = (
    *("learning_rate", "lr_scheduler_type", "optim", "weight_decay", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "fp16", "bf16"),
)


@dataclass(eq=False)
class OwnSite:
    """A site with its Trainer, checked before any training; `where` names it in messages.

    Raises:
        ValueError: If a federation cannot use the Trainer.
    """

    trainer: Any
    where: str
    base: Base = field(init=False)
    base_fingerprint: str = field(init=False)
    fresh: AdapterState = field(init=False)
    site: SiteData = field(init=False)
    _opened: tuple[Mapping[str, Scalar], SiteRuntime] | None = None

    def __post_init__(self) -> None:
        _check(self.trainer, self.where)
        for chatty in (PrinterCallback, ProgressCallback):
            self.trainer.remove_callback(chatty)
        model = self.trainer.model
        base, config = model.get_base_model(), model.peft_config["default"]
        how = getattr(base.config, "quantization_config", None)
        held = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}
        quantized = [name for flag, name in held.items() if getattr(how, flag, False)]
        name = config.base_model_name_or_path or base.name_or_path
        self.base = Base(base, self.trainer.processing_class, name, *quantized or ["none"])
        self.base_fingerprint = fingerprint(self.base)
        self.fresh = fold(read_state(model))
        site = SiteData(0, "", self.trainer.train_dataset, [], config.r, "")
        self.site = replace(site, ledger=f"rows-{site.digest}")

    @property
    def options(self) -> dict[str, Any]:
        """The flags for this model, adapter and training, as far as there are any."""
        config, args = self.trainer.model.peft_config["default"], self.trainer.args
        choices = {name: get_args(hint) for name, hint in get_type_hints(TrainArguments).items()}
        said = {name: getattr(value := getattr(args, name), "value", value) for name in SHARED}
        return {
            "model_name_or_path": self.base.name,
            "quantization": self.base.quantization,
            "lora_rank": config.r,
            "lora_alpha": float(config.lora_alpha or 2 * config.r),
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "inner_dim": getattr(config, "inner_dim", None),
            "target_modules": sorted({name.split(".")[-1] for name in layers_of(self.fresh)}),
            **{n: v for n, v in said.items() if not isinstance(v, str) or v in choices[n]},
        }

    @property
    def most_weight(self) -> int:
        """The most tokens that one of its steps can train on, or the site's rows if more."""
        args = self.trainer.args
        most = getattr(self.base.model.config, "max_position_embeddings", 1)
        longest: int = max(
            sum(len(value) for name, value in row.items() if name.endswith("_ids")) or most
            for row in self.site.encoded
        )
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return max(int(rows) * longest, len(self.site.encoded))

    def runtime(self, run_config: Mapping[str, Scalar]) -> SiteRuntime:
        """Return the site's runtime; made once for the same settings."""
        if self._opened is None or self._opened[0] != run_config:
            settings = from_run_config(run_config)
            self.check(settings)
            runtime = SiteRuntime(
                settings,
                self.base,
                self.base_fingerprint,
                self.trainer.model,
                prompt_format_of(settings.data, self.base.tokenizer),
                self.fresh,
                partial(train_own, self.trainer),
                self.site,
            )
            self._opened = (dict(run_config), runtime)
        return self._opened[1]

    def check(self, settings: FederationSettings) -> None:
        """Raise for what this Trainer cannot do; log what it does differently from the settings.

        Raises:
            ValueError: Naming the flag.
        """
        check_settings(settings)
        config, options = self.trainer.model.peft_config["default"], self.options
        wanted = settings.adapter
        meant: dict[str, Any] = {
            "lora_rank": wanted.lora_rank,
            "lora_alpha": wanted.lora_alpha or 2.0 * wanted.lora_rank,
            "use_rslora": wanted.use_rslora,
        }
        if isinstance(config, ForaConfig):
            meant["inner_dim"] = wanted.inner_dim
        for name, value in meant.items():
            if options[name] != value:
                raise ValueError(f"{self.where}: {name} is {options[name]}, the run's is {value}")
        rule = settings.rule
        if isinstance(config, LoraConfig) and "D" in rule.frozen:
            raise ValueError(
                f"--aggregation {rule.name} trains only FoRA's core, and LoRA has none"
            )
        if rule.start == "svd" and config.init_weights != "svd":
            raise ValueError(f'--aggregation {rule.name} needs ForaConfig(init_weights="svd")')
        for name in SHARED:
            here, asked = options.get(name), getattr(settings.train, name)
            if name in options and asked is not None and here != asked:
                logger.warning("%s of the run is %s; the Trainer's, %s, applies", name, asked, here)


def check_settings(settings: FederationSettings) -> None:
    """Raise for what no Trainer of a site's own can do.

    Raises:
        ValueError: Naming the flag.
    """
    own = "with a Trainer of a site's own"
    refuse(
        (
            settings.privacy.privacy_unit == "record",
            f"--privacy_unit record clips every row's gradient, and {own} fedfora does not control "
            "the loss, which may mix rows: train with fedfora, or use --privacy_unit site",
        ),
        (bool(settings.aggregation.site_ranks), f"--site_ranks: not {own}; its adapter has a rank"),
        (
            settings.rounds.validation_fraction > 0,
            f"--validation_fraction: not {own}, which has its own rows (--test_file)",
        ),
    )


def _check(trainer: Any, where: str) -> None:
    if not isinstance(trainer, Trainer):
        raise ValueError(f"{where} is a {type(trainer).__name__}, not a transformers.Trainer")
    model = trainer.model
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    config = configs.get("default")
    if not isinstance(config, LoraConfig | ForaConfig) or trainer.model_init is not None:
        raise ValueError(
            f"{where}: its model needs a LoRA or FoRA adapter called 'default', made before the "
            "Trainer or by its peft_config"
        )
    for name, allowed in PLAIN_LORA.items():
        value = getattr(config, name, allowed[0])
        if not any(value == each for each in allowed) and (value or allowed[0]):
            raise ValueError(f"{where}: {type(config).__name__}({name}={value!r}) cannot federate")
    rows, processes = trainer.train_dataset, trainer.args.world_size
    refuse(
        (
            trainer.optimizer is not None or trainer.lr_scheduler is not None,
            f"{where}: every round starts a new optimizer; name it in the TrainingArguments "
            "(optim, lr_scheduler_type), or in optimizer_cls_and_kwargs, not in optimizers",
        ),
        (
            trainer.processing_class is None,
            f"{where}: the Trainer needs processing_class=TOKENIZER",
        ),
        (not hasattr(rows, "__len__") or not len(rows), f"{where}: no rows that can be counted"),
        (processes > 1, f"{where}: a site trains in one process, not in {processes}"),
    )


# Which site has which Trainer.


def open_sites(
    factory: Callable[[int], Any], values: Mapping[str, Any], parser: ConfigParser
) -> tuple[FederationSettings, list[OwnSite]]:
    """Return a simulation's settings and its sites, each with a Trainer; nothing is written.

    Args:
        factory: Makes the Trainer of a site, counted from 0.
        values: The given options of the federation, as the parser returns them.
        parser: Of all sections of a federation.

    Raises:
        ValueError: If an option is the Trainers' own, or a Trainer cannot be used.
    """
    if said := sorted(values.keys() & TRAINERS_OWN):
        raise ValueError(f"--{said[0]}: with trainer_factory, the Trainers decide that")
    typed = resolve_settings(values, parser)
    check_settings(typed)
    count = typed.federation.num_clients
    refuse(
        (count is None, "--num_clients is missing: trainer_factory needs the number of sites"),
        (bool(typed.federation.compare), "--compare: not with trainer_factory"),
    )
    sites = []
    for index in range(count or 0):
        set_seed(derive_seed(typed.train.seed, "adapter"))
        sites.append(OwnSite(factory(index), f"trainer_factory({index})"))
    rows = sum(len(each.site.encoded) for each in sites)
    options = {
        **sites[0].options,
        "train_file": f"trainer_factory in memory ({rows:,} rows)",
        "max_weight": float(typed.federation.local_steps * max(s.most_weight for s in sites)),
    }
    settings = resolve_settings({**parser.typed(options), **values}, parser)
    for each in sites:
        each.runtime(settings.run_config())
    return settings, sites


def rows_of(sites: Sequence[OwnSite]) -> dict[str, int]:
    """Return the names of simulated sites, and how many rows each has."""
    return {site_name(i, len(sites)): len(own.site.encoded) for i, own in enumerate(sites)}


def taking_part(sites: Sequence[OwnSite]) -> AbstractContextManager[None]:
    """Let these sites train while the block runs: by their numbers, a single one by any number."""
    return own_runtimes(lambda run_config, index: sites[index % len(sites)].runtime(run_config))


def take_home(sites: Sequence[OwnSite], directory: str | Path) -> None:
    """Load the adapter of a run directory into the models of these sites' Trainers."""
    adapter = fold(read_adapter(directory))
    for each in sites:
        assert each._opened is not None
        each._opened[1].load(adapter)


# A round of a Trainer: as many steps as are asked for, and then it is as it was.


def train_own(
    trainer: Any,
    model: Any,
    encoded: Encoded,
    settings: TrainArguments,
    *,
    stretch: StepWindow,
    seed: int,
    on_step: Callable[[StepReport], None],
    proximal_mu: float = 0.0,
    privacy: None = None,
) -> LocalResult:
    """Train the active adapter in place, as `train_locally` does, with a site's own Trainer.

    Rows, loss and optimizer are the Trainer's; each round has a new optimizer, the seed of the
    round, and its piece of the whole federation's schedule. The Trainer saves and uploads nothing.
    """
    counter = _Counter(trainer.training_step)
    callbacks = [AfterStep(counter, on_step)] + [ProximalTerm(proximal_mu)] * bool(proximal_mu)
    args = copy(trainer.args)
    args.max_steps, args.seed, args.data_seed = stretch.num_steps, seed, None
    args.save_strategy, args.load_best_model_at_end, args.push_to_hub = "no", False, False
    args._n_gpu = min(1, args.n_gpu)
    for_a_round = {
        "args": args,
        "training_step": counter.training_step,
        "create_scheduler": _piece_of_schedule(trainer, stretch),
        "optimizer": None,
        "lr_scheduler": None,
    }
    loading = trainer.accelerator.dataloader_config
    with _changed(trainer, **for_a_round), _changed(loading, data_seed=seed):
        for callback in callbacks:
            trainer.add_callback(callback)
        try:
            set_seed(seed)
            output = trainer.train()
        finally:
            for callback in callbacks:
                trainer.remove_callback(callback)
            release_model(trainer, model)
    progress = counter.progress
    return LocalResult(
        steps=output.global_step,
        loss=progress.loss_sum / max(1, output.global_step),
        answer_tokens=progress.answer_tokens,
        tokens=progress.tokens,
        seconds=output.metrics["train_runtime"],
    )


def _piece_of_schedule(trainer: Any, stretch: StepWindow) -> Callable[..., Any]:
    whole = trainer.create_scheduler

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        schedule = whole(stretch.total_steps, optimizer)
        if not isinstance(schedule, LambdaLR):
            raise ValueError(
                f"lr_scheduler_type {trainer.args.lr_scheduler_type} cannot start in the middle"
            )
        trainer.lr_scheduler = started_at(schedule, stretch.first_step)
        return trainer.lr_scheduler

    return create_scheduler


class _Counter:
    """Counts what a Trainer's steps see; if a batch has no labels, rows stand in for tokens."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        self.progress, self.run = Progress(), None
        self._loss: Any = 0.0

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Take a step of the Trainer, which may change its inputs, and count them."""
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        rows = next(len(value) for value in inputs.values() if hasattr(value, "__len__"))
        trained = rows if labels is None else int((labels[..., 1:] != IGNORED).sum())
        self.progress.answer_tokens += trained
        self.progress.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        loss = self.step(model, inputs, *args, **kwargs)
        self._loss = self._loss + loss.detach()
        return loss

    def finish_step(self) -> float:
        """Return the loss of the step just finished."""
        loss, self._loss = float(self._loss), 0.0
        self.progress.loss_sum += loss
        return loss


@contextmanager
def _changed(target: Any, **values: Any) -> Iterator[None]:
    """Change attributes of an object while the block runs."""
    before = {name: vars(target)[name] for name in values if name in vars(target)}
    vars(target).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(target).pop(name, None)
        vars(target).update(before)
