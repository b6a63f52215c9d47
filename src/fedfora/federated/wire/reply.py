"""What a site answers in a round: one adapter, some numbers, and where the answer belongs.

Both sides use the names in this file, and the coordinator accepts no others.
"""

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

from fedfora.federated.aggregation import AdapterState
from fedfora.federated.wire.formats import Format
from fedfora.federated.wire.transport import FLOAT32, Layout

ARRAYS, METRICS, ORIGIN = "arrays", "metrics", "origin"
RECORDS = {ARRAYS, METRICS, ORIGIN}


@dataclass(frozen=True)
class Origin:
    """What an update starts from; an answer to anything else is of no use.

    Args:
        round_number: The round that was asked for, counted from 1.
        base_fingerprint: Of the site's base model.
        layout_digest: Of the names and shapes of the adapter that travels.
    """

    round_number: int
    base_fingerprint: str
    layout_digest: str

    def to_record(self) -> ConfigRecord:
        """Return it as it travels."""
        return ConfigRecord(
            {
                "round": self.round_number,
                "base-fingerprint": self.base_fingerprint,
                "layout-digest": self.layout_digest,
            }
        )


@dataclass(frozen=True)
class Report:
    """The numbers of a site's round.

    Args:
        loss: Mean training loss per answer token.
        answer_tokens: Tokens with a loss that were trained on.
        tokens: All tokens trained on, padding left out.
        rows: Training rows of the site.
        steps: Optimizer steps taken.
        seconds: Wall time of the training.
        validation_loss: Loss per answer token of the received adapter, before training, on the
            rows that the site keeps back; 0 where it keeps none.
        validation_tokens: Answer tokens of those rows.
        private_validation_loss: The same loss of the site's private adapter, where the round made
            one; it is kept where it is the lower one.
    """

    loss: float
    answer_tokens: int
    tokens: int
    rows: int
    steps: int
    seconds: float
    validation_loss: float = 0.0
    validation_tokens: int = 0
    private_validation_loss: float = 0.0

    def to_record(self) -> MetricRecord:
        """Return it as it travels."""
        return MetricRecord({_travel_name(name): value for name, value in vars(self).items()})

    @classmethod
    def from_record(cls, record: MetricRecord) -> "Report":
        """Return the inverse of `to_record`."""
        return cls(**{name: record[_travel_name(name)] for name in cls.__dataclass_fields__})


def _travel_name(name: str) -> str:
    return name.replace("_", "-")


METRIC_NAMES = {_travel_name(name) for name in Report.__dataclass_fields__}
VALIDATION_NAMES = {"validation-loss", "validation-tokens"}


@dataclass(frozen=True)
class ExpectedReply:
    """What an honest reply of a round looks like.

    Args:
        origin: What it must start from.
        layout: Names and shapes of the factors that must come.
        example: Arrays with the names, formats, shapes and sizes that must come.
        sent: What the sites trained from.
        form: Travel format of the reply.
    """

    origin: Origin
    layout: Layout
    example: ArrayRecord
    sent: AdapterState
    form: Format = FLOAT32
