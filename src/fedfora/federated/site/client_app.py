"""The site's side of the federation, as a Flower ClientApp: says what it has, trains, judges.

The app does not know which engine runs it. Its handlers turn messages into plain values, call
`fedfora.federated.site_runtime`, and turn the result back.
"""

import json
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedfora.federated.settings import FederationSettings, from_run_config
from fedfora.federated.site import secure_answers
from fedfora.federated.site.identity import sign_part
from fedfora.federated.site.local_round import carry_out, hide_result
from fedfora.federated.site.memory import memory_of, remembering
from fedfora.federated.site_runtime import SiteData, SiteRuntime, load_runtime, site_of, validate
from fedfora.federated.wire.messages import read_assignment
from fedfora.federated.wire.reply import ARRAYS, METRICS, ORIGIN, Origin, Report
from fedfora.federated.wire.transport import pack
from fedfora.training.trainer import StepReport

SiteReport = Callable[[str, StepReport], None]


def make_client_app(on_step: SiteReport = lambda site, report: None) -> ClientApp:
    """Return the app.

    Args:
        on_step: Called with the site's name after each of its optimizer steps, where the engine
            runs in the caller's process.
    """
    app = ClientApp()
    app.query()(describe)
    app.evaluate()(evaluate)

    @app.train(mods=[remembering])  # type: ignore[untyped-decorator]
    def train_and_report(message: Message, context: Context) -> Message:
        return train(message, context, on_step)

    @app.query("introduce")  # type: ignore[untyped-decorator]
    def introduce(message: Message, context: Context) -> Message:
        """Answer with the site's key of the run, for secure aggregation."""
        return Message(secure_answers.introduce(context, seed=_seed(context)), reply_to=message)

    @app.query("share")  # type: ignore[untyped-decorator]
    def share(message: Message, context: Context) -> Message:
        """Answer with a key and shares for one round."""
        content = secure_answers.share(message.content, context, seed=_seed(context))
        return Message(content, reply_to=message)

    @app.query("confirm")  # type: ignore[untyped-decorator]
    def confirm(message: Message, context: Context) -> Message:
        """Answer with a signature under the list of sites whose vectors arrived."""
        content = secure_answers.confirm(message.content, context, seed=_seed(context))
        return Message(content, reply_to=message)

    @app.query("reveal")  # type: ignore[untyped-decorator]
    def reveal(message: Message, context: Context) -> Message:
        """Answer with what takes the masks off the round's sum."""
        content = secure_answers.reveal(message.content, context, seed=_seed(context))
        return Message(content, reply_to=message)

    return app


def describe(message: Message, context: Context) -> Message:
    """Answer with what the coordinator must know before the first round."""
    workplace, site = _open(context)
    content = RecordDict({"site": _description(workplace, site)})
    own_part = sign_part(context.node_config, site.index, workplace.base_fingerprint)
    content["site"].update(own_part)
    if message.content["ask"]["adapter"]:
        config, record = workplace.form()
        content["fresh"] = pack(workplace.fresh, workplace.layout)
        content["form"] = ConfigRecord(
            {
                "layout": workplace.layout.to_json(),
                "adapter-config": json.dumps(config),
                "record": json.dumps(record),
            }
        )
    return Message(content, reply_to=message)


def train(message: Message, context: Context, on_step: SiteReport) -> Message:
    """Judge the received adapter on the rows kept back, then train it for one round."""
    workplace, site = _open(context)
    secure = _is_secure(workplace)
    if not secure:
        secure_answers.check_in_clear(context)
    assignment = read_assignment(message.content, context.state, workplace.fresh)
    validation_loss, validation_tokens = validate(workplace, site, assignment.adapter)
    arrays, result, private_loss = carry_out(
        workplace,
        site,
        assignment,
        context.state,
        seed=secure_answers.seed_of_order(context, assignment.round_index + 1),
        on_step=lambda report: on_step(site.name, report),
    )
    origin = Origin(assignment.round_index + 1, workplace.base_fingerprint, workplace.layout.digest)
    content = RecordDict({ARRAYS: arrays, ORIGIN: origin.to_record()})
    if secure:
        content[ARRAYS] = hide_result(
            message.content, context, workplace, site, assignment, arrays, result
        )
        return Message(content, reply_to=message)
    report = Report(
        loss=result.loss,
        answer_tokens=result.answer_tokens,
        tokens=result.tokens,
        rows=len(site.encoded),
        steps=result.steps,
        seconds=result.seconds,
        validation_loss=validation_loss,
        validation_tokens=validation_tokens,
        private_validation_loss=private_loss,
    )
    content[METRICS] = report.to_record()
    return Message(content, reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    """Judge the received adapter on the rows kept back."""
    secure_answers.check_in_clear(context)  # a loss tells something, too
    workplace, site = _open(context)
    round_index = int(message.content["config"]["round-index"])
    state = memory_of(context).read(before=round_index + 2)
    assignment = read_assignment(message.content, state, workplace.fresh)
    loss, tokens = validate(workplace, site, assignment.adapter)
    metrics = MetricRecord({"validation-loss": loss, "validation-tokens": tokens})
    return Message(RecordDict({METRICS: metrics}), reply_to=message)


def _open(context: Context) -> tuple[SiteRuntime, SiteData]:
    workplace = load_runtime(context.run_config)
    return workplace, site_of(workplace, context.node_config)


def _description(workplace: SiteRuntime, site: SiteData) -> ConfigRecord:
    return ConfigRecord(
        {
            "index": site.index,
            "name": site.name,
            "rows": 0 if _is_secure(workplace) else len(site.encoded),
            "rank": site.rank,
            "data-digest": public_digest(workplace.settings, site),
            "base-fingerprint": workplace.base_fingerprint,
            "layout-digest": workplace.layout.digest,
        }
    )


def public_digest(settings: FederationSettings, site: SiteData) -> str:
    """Return the digest of a site's rows; nothing where records, or sites from all, are hidden.

    It would tell whoever knows all rows but one which one that is.
    """
    unit = settings.privacy.privacy_unit
    hidden = unit == "record" or (unit == "site" and settings.secure.secure_aggregation)
    return "" if hidden else site.digest


def _is_secure(workplace: SiteRuntime) -> bool:
    return workplace.settings.secure.secure_aggregation


def _seed(context: Context) -> int:
    return from_run_config(context.run_config).train.seed


app = make_client_app()
