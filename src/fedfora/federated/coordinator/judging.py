"""How good a round's adapter is: by the rows that sites hold out, or on the common test rows."""

from typing import Any

from fedfora.data.loading import Example
from fedfora.data.partition import JOINED
from fedfora.evaluation.output import PREDICTIONS
from fedfora.federated.aggregation.update import AdapterState
from fedfora.federated.coordinator.checkpoint import Selection
from fedfora.federated.coordinator.exchange import Folded, SiteExchange
from fedfora.federated.preflight import scored_rows
from fedfora.federated.site_runtime import load_runtime
from fedfora.metrics import headlines


def judge(
    exchange: SiteExchange, selection: Selection, number: int, folded: Folded
) -> tuple[Selection, dict[str, Any]]:
    """Judge the rounds that can be judged now; return the selection, and what to record.

    Sites judge the adapter they receive, so the loss that comes with a round is that of the round
    before; after the last round they are asked again.
    """
    federation = exchange.settings.federation
    last = number == federation.num_rounds
    line: dict[str, Any] = {"scores": {}}
    if number % federation.eval_rounds == 0 or last:
        line |= _scored(folded.adapter, exchange)
    if (received := folded.validation_loss) is not None:
        line["received_validation_loss"] = received
        if number > 1:
            selection = selection.judged(number - 1, received, lower_is_better=True)
        if last and (loss := exchange.validate(number, folded.adapter)) is not None:
            line["validation_loss"] = loss
            selection = selection.judged(number, loss, lower_is_better=True)
    elif names := headlines(line["scores"]):
        score = float(line["scores"][names[0]])
        selection = selection.judged(number, score, lower_is_better=False)
    return selection, line


def _scored(adapter: AdapterState, exchange: SiteExchange) -> dict[str, Any]:
    """Return the scores on the common test rows, and the main ones for each site's own kind.

    The answers are written beside the record. Without such rows there is nothing to return.
    """
    settings, record = exchange.settings, exchange.record
    if not (examples := scored_rows(settings)):
        return {}
    runtime = load_runtime(settings.run_config())
    runtime.load(adapter)
    result = runtime.evaluate(examples, lambda rows: record.announce("evaluated", rows=rows))
    sites = [site.name for site in exchange.sites.values()]
    groups = own_kind_of_rows(settings.federation.partition, examples, sites)
    result.write(record.directory / PREDICTIONS, examples, groups)
    scores = {site: result.scores_of(rows) for site, rows in groups.items()}
    own = {site: {name: of[name] for name in headlines(of)} for site, of in scores.items()}
    return {"scores": result.scores, **({"groups": own} if own else {})}


def own_kind_of_rows(
    partition: str, examples: list[Example], sites: list[str]
) -> dict[str, list[int]]:
    """Return the test rows of each site's own kind; none unless sites are values of a column."""
    how, _, column = partition.partition(":")
    if how != "by-column":
        return {}
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        value = str(example.columns.get(column))
        site = value if value in sites else JOINED
        if site in sites:
            groups.setdefault(site, []).append(index)
    return groups
