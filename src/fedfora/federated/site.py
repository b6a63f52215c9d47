"""What a site does with an adapter: open its base and rows once, train, fold the result.

Nothing here knows Flower. All sites that are simulated in one process share one base model: a site
is its rows and its name; before it trains, the received adapter is written into the shared model.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedfora._seeds import derive_seed
from fedfora.adapter.state import State, fold, read_state, unfold, write_state
from fedfora.config import Scalar
from fedfora.data.encoding import Encoded, PromptFormat, encode_examples, prompt_format
from fedfora.data.loading import Example, load_chosen
from fedfora.data.partition import partition
from fedfora.evaluation.loss import answer_loss
from fedfora.federated.settings import FederationSettings, from_run_config
from fedfora.models.fingerprint import fingerprint
from fedfora.models.loading import Base, add_adapter, load_base
from fedfora.models.saving import adapter_config, adapter_record
from fedfora.training.local import LocalResult, train_locally
from fedfora.training.privacy_plan import pay_for_steps, public_part
from fedfora.training.private_gradient import RecordPrivacy
from fedfora.training.schedule import Stretch
from fedfora.training.settings import TrainArguments
from fedfora.training.trainer import StepReport


@dataclass(frozen=True, eq=False)
class Workplace:
    """What the sites of a process share: a base with an adapter on it, and the prompt format."""

    settings: FederationSettings
    base: Base
    base_fingerprint: str
    model: Any
    prompts: PromptFormat
    fresh: State

    def load(self, folded: State) -> None:
        """Write a received adapter into the model."""
        seed, inner_dim = self.settings.train.seed, self.settings.adapter.inner_dim
        write_state(self.model, unfold(folded, seed=seed, inner_dim=inner_dim))

    def train(
        self,
        folded: State,
        encoded: Encoded,
        train: TrainArguments,
        *,
        stretch: Stretch,
        seed: int,
        on_step: Callable[[StepReport], None],
        privacy: RecordPrivacy | None = None,
    ) -> tuple[State, LocalResult]:
        """Train an adapter on some rows and return it folded, with what the training did."""
        self.load(folded)
        result = train_locally(
            self.model,
            self.base.tokenizer,
            encoded,
            train,
            stretch=stretch,
            seed=seed,
            on_step=on_step,
            privacy=privacy,
        )
        return fold(read_state(self.model)), result

    def form(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what is saved beside an adapter's weights: PEFT's configuration and our record."""
        return adapter_config(self.model), adapter_record(self.prompts, self.base_fingerprint)


@dataclass(frozen=True)
class Site:
    """A participant: its place in the federation and its encoded rows.

    Args:
        index: Its number in the partition.
        name: Its name there.
        encoded: The rows that it trains on.
        validation: The rows that it keeps back to judge a received adapter on.
    """

    index: int
    name: str
    encoded: Encoded
    validation: Encoded

    @property
    def digest(self) -> str:
        """A short digest of the rows, by which a resumed run knows them again."""
        return hashlib.sha256(repr((self.encoded, self.validation)).encode()).hexdigest()[:16]


def open_workplace(run_config: Mapping[str, Scalar]) -> Workplace:
    """Load the base and put a fresh adapter on it; once per process for the same settings."""
    return _workplace(tuple(sorted(run_config.items())))


def open_site(workplace: Workplace, index: int) -> Site:
    """Return site `index` of the partition, as every process of the run computes it."""
    name, rows = _sites(workplace)[index]
    kept = _rows_kept_back(workplace.settings, index, len(rows))
    return Site(
        index,
        name,
        encoded=[row for i, row in enumerate(rows) if i not in kept],
        validation=[rows[i] for i in sorted(kept)],
    )


def site_names(settings: FederationSettings) -> list[str]:
    """Return the names of the sites that the partition makes.

    Raises:
        ValueError: If the rows cannot be read or shared out so, or more sites are to be drawn for a
            round than there are.
    """
    _, parts = _partition(settings)
    drawn = settings.federation.clients_per_round
    if drawn is not None and drawn > len(parts):
        raise ValueError(f"--clients_per_round {drawn}: there are only {len(parts)} sites")
    return list(parts)


def validate(workplace: Workplace, site: Site, folded: State) -> tuple[float, int]:
    """Return an adapter's loss per answer token on a site's rows kept back, and their tokens."""
    if not site.validation:
        return 0.0, 0
    workplace.load(folded)
    return answer_loss(
        workplace.model,
        workplace.base.tokenizer,
        site.validation,
        batch_size=workplace.settings.evaluation.per_device_eval_batch_size,
    )


def train_round(
    workplace: Workplace,
    site: Site,
    folded: State,
    *,
    round_index: int,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> tuple[State, LocalResult]:
    """Take a site's steps of one round (counted from 0) and return its folded adapter."""
    federation, settings = workplace.settings.federation, workplace.settings
    total_steps = federation.num_rounds * federation.local_steps
    paid = pay_for_steps(
        settings.privacy,
        settings.train,
        output_dir=settings.run.output_dir,
        site=site.index,
        num_rows=len(site.encoded),
        num_steps=federation.local_steps,
        total_steps=total_steps,
        what=f"round {round_index}",
    )
    trained, result = workplace.train(
        folded,
        site.encoded,
        settings.train,
        stretch=Stretch(
            first_step=round_index * federation.local_steps,
            num_steps=federation.local_steps,
            total_steps=total_steps,
        ),
        seed=derive_seed(settings.train.seed, "train", round_index, site.index),
        on_step=on_step,
        privacy=None if paid is None else paid.privacy,
    )
    if paid is not None:
        paid.ledger.finish()
        result = public_part(result, paid.privacy)
    return trained, result


@lru_cache(maxsize=1)
def _workplace(items: tuple[tuple[str, Scalar], ...]) -> Workplace:
    settings = from_run_config(dict(items))
    base = load_base(settings.model)
    base_fingerprint = fingerprint(base)
    model = add_adapter(base, settings.adapter, seed=settings.train.seed)
    return Workplace(
        settings=settings,
        base=base,
        base_fingerprint=base_fingerprint,
        model=model,
        prompts=prompt_format(settings.data, base.tokenizer),
        fresh=fold(read_state(model)),
    )


def _partition(settings: FederationSettings) -> tuple[list[Example], dict[str, list[int]]]:
    examples = load_chosen(settings.data.train_file, settings.data, flag="--train_file")
    federation = settings.federation
    parts = partition(
        examples,
        federation.partition,
        num_clients=federation.num_clients,
        seed=derive_seed(settings.train.seed, "partition"),
    )
    return examples, parts


def _rows_kept_back(settings: FederationSettings, index: int, num_rows: int) -> set[int]:
    """Draw the rows of a site that it does not train on; at least one is left to train on."""
    share = settings.rounds.validation_fraction
    if share == 0:
        return set()
    count = min(max(1, round(share * num_rows)), num_rows - 1)
    rng = random.Random(derive_seed(settings.train.seed, "validation", index))
    return set(rng.sample(range(num_rows), count))


@lru_cache(maxsize=1)
def _sites(workplace: Workplace) -> list[tuple[str, Encoded]]:
    examples, parts = _partition(workplace.settings)
    encoded = encode_examples(examples, workplace.base.tokenizer, workplace.prompts)
    return [(name, [encoded[row] for row in rows]) for name, rows in parts.items()]
