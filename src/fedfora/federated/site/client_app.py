"""The site's side of the federation, as a Flower ClientApp: describes itself, trains, judges.

The app does not know which engine runs it. Its handlers turn messages into plain values, call
`fedfora.federated.site.training`, and turn the result back.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedfora.adapter.state import fold
from fedfora.federated.aggregation import Rule
from fedfora.federated.aggregation.update import AdapterState, absorb, part
from fedfora.federated.secure_aggregation.crypto import prompts_digest
from fedfora.federated.site import secure_answers
from fedfora.federated.site.identity import sign_part
from fedfora.federated.site.memory import answered_rounds, memory_of, remembering
from fedfora.federated.site.training import private_sum, train_round, validate
from fedfora.federated.site_runtime import SITE_NAME, SiteData, SiteRuntime, load_runtime, site_of
from fedfora.federated.wire.formats import FORMATS
from fedfora.federated.wire.messages import (
    ARRAYS,
    METRICS,
    ORIGIN,
    Assignment,
    Origin,
    Report,
    read_assignment,
)
from fedfora.federated.wire.transport import Layout, pack, pack_with_feedback
from fedfora.training.local import LocalResult
from fedfora.training.trainer import StepReport

logger = logging.getLogger(__name__)

SiteReport = Callable[[str, StepReport], None]


def make_client_app(on_step: SiteReport = lambda site, report: None) -> ClientApp:
    """Return the app; in the caller's process, `on_step` is called after each step of a site."""
    app = ClientApp()
    app.query()(describe)
    app.evaluate()(evaluate)
    app.train(mods=[remembering])(partial(train, on_step=on_step))
    for name in ("introduce", "share", "confirm", "reveal"):
        app.query(name)(partial(_answer_securely, name))
    return app


def _answer_securely(name: str, message: Message, context: Context) -> Message:
    """Answer one kind of message of secure aggregation."""
    return Message(getattr(secure_answers, name)(message.content, context), reply_to=message)


def describe(message: Message, context: Context) -> Message:
    """Answer with what the coordinator must know before the first round."""
    runtime, site = _open(context)
    content = RecordDict({"site": site_facts(context, runtime, site)})
    own_part = sign_part(context.node_config, site.index, runtime.base_fingerprint)
    content["site"].update(own_part)
    if message.content["ask"]["adapter"]:
        record = runtime.record()
        if SITE_NAME in context.node_config:  # where a real site's base lies is its own business
            record["base"]["name"] = Path(record["base"]["name"]).name
        content["fresh"] = pack(runtime.fresh, runtime.layout)
        content["form"] = ConfigRecord(
            {"layout": runtime.layout.to_json(), "record": json.dumps(record)}
        )
    return Message(content, reply_to=message)


def train(message: Message, context: Context, on_step: SiteReport) -> Message:
    """Judge the received adapter on the held-out rows, then train it for one round."""
    runtime, site = _open(context)
    secure = runtime.settings.secure.secure_aggregation
    if not secure:
        secure_answers.check_in_clear(context)
    assignment = read_assignment(message.content, context.state, runtime.layout)
    validation = validate(runtime, site, assignment.adapter)
    number, arrays = assignment.round_index + 1, None
    result = LocalResult(steps=0, loss=0.0, answer_tokens=1, tokens=0, seconds=0.0)
    terms = secure_answers.begin(context, site, number) if secure else None
    try:
        seed, tell = secure_answers.seed_of_order(context, number), partial(on_step, site.name)
        arrays, result = carry_out(
            runtime, site, assignment, context.state, seed=seed, on_step=tell
        )
    except Exception:
        if not runtime.settings.shares_noise:
            raise
        logger.exception("round %d failed: it is paid for, and only the noise is sent", number)
    origin = Origin(number, runtime.base_fingerprint, runtime.layout.digest)
    content = RecordDict({ARRAYS: arrays or ArrayRecord(), ORIGIN: ConfigRecord(vars(origin))})
    if terms is not None:
        content[ARRAYS] = secure_answers.hide(
            *(message.content, context, site, runtime.base_fingerprint),
            *(assignment, terms, arrays, result),
        )
        return Message(content, reply_to=message)
    report = Report(**asdict(result), rows=len(site.encoded), **validation)
    content[METRICS] = MetricRecord(vars(report))
    return Message(content, reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    """Judge the received adapter on the held-out rows."""
    secure_answers.check_in_clear(context)  # a loss reveals something, too
    runtime, site = _open(context)
    round_index = int(message.content["config"]["round-index"])
    state = memory_of(context).read(before=round_index + 2)
    assignment = read_assignment(message.content, state, runtime.layout)
    metrics = MetricRecord(validate(runtime, site, assignment.adapter))
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


def _open(context: Context) -> tuple[SiteRuntime, SiteData]:
    runtime = load_runtime(context.run_config, int(context.node_config["partition-id"]))
    return runtime, site_of(runtime, context.node_config)


def site_facts(context: Context, runtime: SiteRuntime, site: SiteData) -> ConfigRecord:
    """Return what a site says of itself and its rows, as far as the settings let it."""
    secure, unit = runtime.settings.secure, runtime.settings.privacy.privacy_unit
    hidden = unit == "record" or (unit == "site" and secure.secure_aggregation)
    digest, answered = "" if hidden else site.digest, answered_rounds(context)
    if digest and secure.secure_aggregation and answered is not None:
        # Who knows all rows but one could find that one with a digest that anybody can compute.
        digest = answered.keyed(digest)
    return ConfigRecord(
        {
            "index": site.index,
            "name": site.name,
            "rows": 0 if secure.secure_aggregation else len(site.encoded),
            "rank": site.rank,
            "data-digest": digest,
            "base-fingerprint": runtime.base_fingerprint,
            "layout-digest": runtime.layout.digest,
            "size": runtime.layout.size,
            "fresh-digest": runtime.fresh_digest,
            "prompts-digest": prompts_digest(asdict(runtime.prompts)),
        }
    )


# What a site does with an assignment: train, and pack what travels.


def carry_out(
    runtime: SiteRuntime, site: SiteData, assignment: Assignment, state: RecordDict, **options: Any
) -> tuple[ArrayRecord, LocalResult]:
    """Train for one round; return what travels, and what the training did.

    What the travel format lost is kept in `state`, the site's memory. The options are `seed` and
    `on_step` of `train_round`.
    """
    rule, start = assignment.rule, assignment.adapter
    if runtime.settings.privacy.shared_noise:
        step, result = private_sum(runtime, site, start)
        layout = Layout.of(part(start, rule.travels))
        return pack(step, layout), result
    trained, result = train_round(
        runtime, site, start, factors=rule.trains, round_index=assignment.round_index, **options
    )
    adapter = fold(trained)
    if rule.absorbs:
        adapter = absorb(adapter)
    return _packed(runtime, rule, adapter, start, state), result


def _packed(
    runtime: SiteRuntime, rule: Rule, adapter: AdapterState, start: AdapterState, state: RecordDict
) -> ArrayRecord:
    """Return what travels; what its format loses is kept if the next round can use it.

    It can if the factors mean the same then, which they do not if each round makes new ones.
    """
    chosen = runtime.settings.aggregation
    update, reference = part(adapter, rule.travels), part(start, rule.travels)
    layout, form = Layout.of(update), FORMATS[chosen.update_dtype]
    feedback = state.get("lost", {})
    lost = feedback[layout.digest].numpy() if layout.digest in feedback else None
    record, lost = pack_with_feedback(update, reference, lost, layout, form)
    if lost is not None and rule.mean_of == "factors":
        state["lost"] = ArrayRecord({layout.digest: Array(lost)})
    else:
        state.pop("lost", None)
    return record
