"""A site's runtime: its base with an adapter on it, and its rows, opened once.

All sites simulated in one process share one base model: a site is its rows and its name; before it
trains, the received adapter is written into the shared model.
"""

import gc
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from fedfora.adapter.state import AdapterState, fold, read_state, set_trainable, unfold, write_state
from fedfora.config import Scalar
from fedfora.data.canaries import planted
from fedfora.data.encoding import (
    Encoded,
    PromptFormat,
    check_context,
    encode_examples,
    encode_prompts,
    prompt_format_of,
)
from fedfora.data.loading import Example, load_chosen
from fedfora.data.partition import site_name
from fedfora.evaluation.evaluate import Evaluation, evaluate
from fedfora.federated.aggregation.update import part, rank_of
from fedfora.federated.preflight import partition_sites, scored_rows
from fedfora.federated.settings import FederationSettings, from_run_config
from fedfora.federated.wire.transport import Layout, digest_of
from fedfora.models.adapter_base import add_adapter
from fedfora.models.fingerprint import describe, fingerprint
from fedfora.models.loading import Base, add_adapter_of_rank, context_length, load_base
from fedfora.models.saving import adapter_record
from fedfora.privacy.settings import check_num_rows
from fedfora.seeds import derive_seed
from fedfora.training.local import LocalResult, check_trainable, train_locally
from fedfora.training.preflight import ledger_of
from fedfora.training.settings import TrainArguments

SITE_NAME = "site-name"  # in the configuration of a real site's node


@dataclass(frozen=True, eq=False)
class SiteRuntime:
    """What the sites of a process share: a base with an adapter on it, and the prompt format.

    A site with a Trainer of its own (`fedfora.federated.own_trainer`) shares it with nobody.

    Args:
        model: The base with the adapter.
        fresh: The adapter as it was before any training, folded.
        local: What trains the adapter in place, with the arguments of `train_locally`.
        own_site: A site with a Trainer of its own; None where rows come from the settings.
    """

    settings: FederationSettings
    base: Base
    base_fingerprint: str
    model: Any
    prompts: PromptFormat
    fresh: AdapterState
    local: Callable[..., LocalResult] = train_locally
    own_site: "SiteData | None" = None

    @cached_property
    def layout(self) -> Layout:
        """Names and shapes of the adapter."""
        return Layout.of(self.fresh)

    @cached_property
    def fresh_digest(self) -> str:
        """Digest of the fresh adapter's numbers."""
        return digest_of(self.fresh, self.layout)

    def load(self, adapter: AdapterState) -> str:
        """Write an adapter of any rank into the model, as its only one; return its name there."""
        rank = rank_of(adapter)
        name = "default" if rank == self.settings.adapter.lora_rank else f"rank-{rank}"
        if name not in self.model.peft_config:
            add_adapter_of_rank(self.model, rank, name)
        self._write(adapter, name)
        self.model.set_adapter(name)
        return name

    def train(
        self,
        adapter: AdapterState,
        encoded: Encoded,
        train: TrainArguments,
        *,
        factors: str = "ABCDE",
        **piece: Any,
    ) -> tuple[AdapterState, LocalResult]:
        """Train an adapter, folded or not, on some rows; return all five factors and what was done.

        Of the factors that are trained, E stands for the core. The rest is for `train_locally`:
        which steps of which schedule, the seed, and what else is asked for.
        """
        name = self.load(adapter)
        set_trainable(self.model, factors, name)
        result = self.local(self.model, encoded, train, **piece)
        return read_state(self.model, name), result

    def evaluate(self, examples: list[Example], on_batch: Callable[[int], None]) -> Evaluation:
        """Answer and score test rows with the adapter that is loaded."""
        evaluation = self.settings.evaluation
        return evaluate(
            self.model,
            self.base.tokenizer,
            examples,
            self.prompts,
            batch_size=evaluation.per_device_eval_batch_size,
            max_new_tokens=evaluation.max_new_tokens,
            on_batch=on_batch,
        )

    def _write(self, adapter: AdapterState, name: str) -> None:
        if not any(key.endswith(".E") for key in self.fresh):  # LoRA
            adapter = part(adapter, "AD")
        elif not any(key.endswith(".B") for key in adapter):
            seed, inner_dim = self.settings.train.seed, self.settings.adapter.inner_dim
            adapter = unfold(adapter, seed=seed, inner_dim=inner_dim)
        write_state(self.model, adapter, name)

    def record(self) -> dict[str, Any]:
        """Return what is saved beside an adapter's weights: prompt format and base."""
        return adapter_record(self.prompts, self.base_fingerprint, base=describe(self.base))


SITE_LEDGER = "site"  # the name of a real site's ledger


@dataclass(frozen=True)
class SiteData:
    """A participant: its place in the federation and its encoded rows.

    Args:
        index: Its number in the partition.
        name: Its name there.
        encoded: The rows that it trains on.
        validation: The rows that it holds out to judge a received adapter on.
        rank: Of its adapter.
        ledger: Name of the ledger of what is released about its rows.
    """

    index: int
    name: str
    encoded: Encoded
    validation: Encoded
    rank: int
    ledger: str

    @property
    def digest(self) -> str:
        """A short digest of the rows, by which a resumed run recognizes them."""
        rows = (list(self.encoded), self.validation)
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


OpenOwn = Callable[[Mapping[str, Scalar], int], SiteRuntime]
_own: list[OpenOwn] = []


@contextmanager
def own_runtimes(open_own: OpenOwn) -> Iterator[None]:
    """Let `load_runtime` return what `open_own` returns for settings and a site, in the block."""
    _own.append(open_own)
    try:
        yield
    finally:
        _own.remove(open_own)


def load_runtime(run_config: Mapping[str, Scalar], site: int = 0) -> SiteRuntime:
    """Load the base and put a fresh adapter on it; once per process for the same settings."""
    if _own:
        return _own[-1](run_config, site)
    return _runtime(tuple(sorted(run_config.items())))


def release() -> None:
    """Drop what this process keeps of the last federation: base model, adapter, encoded rows.

    A program that continues gets the memory back, and its next federation reads its rows again.
    """
    for cached in (_runtime, _sites, _own_rows):
        cached.cache_clear()
    gc.unfreeze()  # as simulate() froze it


def check_rows(runtime: SiteRuntime) -> None:
    """Encode the rows of all sites, and check that they and the test rows fit the model's context.

    Raises:
        ValueError: Naming the file and the longest row.
    """
    if runtime.own_site is None:
        _sites(runtime)
    data, evaluation = runtime.settings.data, runtime.settings.evaluation
    answer = evaluation.max_new_tokens or data.max_target_length
    prompts = encode_prompts(scored_rows(runtime.settings), runtime.base.tokenizer, runtime.prompts)
    lengths = [len(prompt) + answer for prompt in prompts]
    check_context(context_length(runtime.base.model.config), lengths, str(data.test_file))


def open_site(runtime: SiteRuntime, index: int) -> SiteData:
    """Return site `index` of the partition, as every process of the run computes it."""
    return _site(runtime, index, *_sites(runtime)[index])


def site_of(runtime: SiteRuntime, node_config: Mapping[str, Scalar]) -> SiteData:
    """Return the site that a node's configuration describes.

    A real site has a name there, and all rows of its files. A simulated one has its part of the
    partition.
    """
    index = int(node_config["partition-id"])
    # A real site has one ledger, whatever becomes of its rows and whatever number it has.
    name, ledger = str(node_config.get(SITE_NAME, "")), SITE_LEDGER
    if (own := runtime.own_site) is not None:
        if not name:
            name = site_name(index, int(node_config["num-partitions"]))
            ledger = own.ledger
        return replace(own, index=index, name=name, ledger=ledger)
    if not name:
        return open_site(runtime, index)
    return _site(runtime, index, name, _own_rows(runtime), ledger)


def _site(runtime: SiteRuntime, index: int, name: str, rows: Encoded, ledger: str) -> SiteData:
    settings = runtime.settings
    ranks = settings.aggregation.site_ranks or [settings.adapter.lora_rank]
    held_back = _rows_kept_back(settings, index, len(rows))
    secrets = planted(settings.data, site=index, seed=settings.train.seed)
    canaries = encode_examples(secrets, runtime.base.tokenizer, runtime.prompts)
    return SiteData(
        index,
        name,
        encoded=[row for i, row in enumerate(rows) if i not in held_back] + canaries,
        validation=[rows[i] for i in sorted(held_back)],
        rank=ranks[index % len(ranks)],
        ledger=ledger,
    )


@lru_cache(maxsize=1)
def _runtime(items: tuple[tuple[str, Scalar], ...]) -> SiteRuntime:
    settings = from_run_config(dict(items))
    base = load_base(settings.model)
    base_fingerprint = fingerprint(base)
    model = add_adapter(
        base,
        settings.adapter,
        seed=settings.train.seed,
        init_weights=True if settings.rule.start == "zero" else "svd",
    )
    prompts = prompt_format_of(settings.data, base.tokenizer)
    return SiteRuntime(settings, base, base_fingerprint, model, prompts, fold(read_state(model)))


def _rows_kept_back(settings: FederationSettings, index: int, num_rows: int) -> set[int]:
    """Draw the rows of a site that it does not train on; at least one is left to train on."""
    share = settings.rounds.validation_fraction
    if share == 0:
        return set()
    count = min(max(1, round(share * num_rows)), num_rows - 1)
    rng = random.Random(derive_seed(settings.train.seed, "validation", index))
    return set(rng.sample(range(num_rows), count))


@lru_cache(maxsize=1)
def _own_rows(runtime: SiteRuntime) -> Encoded:
    data = runtime.settings.data
    examples = load_chosen(data.train_file, data, flag="--train_file")
    check_num_rows(runtime.settings.privacy, len(examples))
    return _encoded(runtime, examples)


@lru_cache(maxsize=1)
def _sites(runtime: SiteRuntime) -> list[tuple[str, Encoded, str]]:
    examples, parts = partition_sites(runtime.settings)
    encoded = _encoded(runtime, examples)
    return [
        (name, [encoded[row] for row in rows], ledger_of(examples[row] for row in rows))
        for name, rows in parts.items()
    ]


def _encoded(runtime: SiteRuntime, examples: list[Example]) -> Encoded:
    """Encode a site's rows."""
    data, base = runtime.settings.data, runtime.base
    encoded = encode_examples(examples, base.tokenizer, runtime.prompts)
    lengths = [len(row["input_ids"]) for row in encoded]
    source = str(data.train_file or data.dataset)
    check_context(context_length(base.model.config), lengths, source)
    settings = runtime.settings
    check_trainable(runtime.model, base.tokenizer, settings.train, settings.privacy)
    return encoded
