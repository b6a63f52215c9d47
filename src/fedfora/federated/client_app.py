"""The site's side of the federation, as a Flower ClientApp: says what it has, and trains.

The app does not know which engine runs it. Its handlers turn messages into plain values, call
`fedfora.federated.site`, and turn the result back.
"""

import json
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedfora.federated.site import open_site, open_workplace, train_round
from fedfora.federated.transport import Layout, pack, unpack
from fedfora.training.trainer import StepReport

SiteReport = Callable[[str, StepReport], None]


def make_client_app(on_step: SiteReport = lambda site, report: None) -> ClientApp:
    """Return the app.

    Args:
        on_step: Called with the site's name after each of its optimizer steps, where the engine
            runs in the caller's process.
    """
    app = ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    def describe(message: Message, context: Context) -> Message:
        """Answer with what the coordinator must know before the first round."""
        workplace = open_workplace(context.run_config)
        site = open_site(workplace, int(context.node_config["partition-id"]))
        layout = Layout.of(workplace.fresh)
        content = RecordDict(
            {
                "site": ConfigRecord(
                    {
                        "index": site.index,
                        "name": site.name,
                        "rows": len(site.encoded),
                        "base-fingerprint": workplace.base_fingerprint,
                        "layout-digest": layout.digest,
                    }
                )
            }
        )
        if message.content["ask"]["adapter"]:
            config, record = workplace.form()
            content["fresh"] = pack(workplace.fresh, layout)
            content["form"] = ConfigRecord(
                {
                    "layout": layout.to_json(),
                    "adapter-config": json.dumps(config),
                    "record": json.dumps(record),
                }
            )
        return Message(content, reply_to=message)

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        """Train the received adapter for one round."""
        workplace = open_workplace(context.run_config)
        site = open_site(workplace, int(context.node_config["partition-id"]))
        layout = Layout.of(workplace.fresh)
        trained, result = train_round(
            workplace,
            site,
            unpack(message.content["arrays"], layout),
            round_index=int(message.content["config"]["round-index"]),
            on_step=lambda report: on_step(site.name, report),
        )
        metrics = MetricRecord(
            {
                "loss": result.loss,
                "answer-tokens": result.answer_tokens,
                "tokens": result.tokens,
                "rows": len(site.encoded),
                "steps": result.steps,
                "seconds": result.seconds,
            }
        )
        content = RecordDict({"arrays": pack(trained, layout), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


app = make_client_app()
