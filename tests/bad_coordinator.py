"""Run as a program: what an account on the coordinator's machine may try against the sites.

    python bad_coordinator.py client KIT DIRECTORY
    python bad_coordinator.py agent KIT DIRECTORY

`client`: as `fedfora coordinator run`, with a run whose code leaves a trace wherever it is run.
`agent`: beside `fedfora coordinator`, starts a run that has an AgentApp instead; it sends each
site a message, and leaves a trace wherever it is run.
"""

import os
import sys
from hashlib import sha256
from pathlib import Path

from fedfora.cli.main import main
from fedfora.deployment import run
from fedfora.deployment.run_state import KIT

AGENT = """
import json, os, time
from pathlib import Path
from flwr.agentapp import AgentApp

app = AgentApp()


@app.main()
def agent(agent, context):
    here = "coordinator" if {kit_variable!r} in os.environ else f"site-{{os.getpid()}}"
    Path({directory!r}, here).write_text("was here")
    if here != "coordinator":
        return

    def call(name, **arguments):
        words = {{"name": name, "call_id": name, "arguments": json.dumps(arguments)}}
        return json.loads(agent.grid.call({{"type": "function_call", **words}})["output"])

    nodes = call("get_nodes", sample_size=None)["nodes"]
    messages = [{{"dst_node_id": node["id"], "payload": "x"}} for node in nodes]
    call("push_messages", messages=messages)
    time.sleep(30)
"""


def start_agent(kit, directory):
    """Start a run with an AgentApp by the ordinary request."""
    os.environ["FLWR_HOME"] = str(Path(kit) / "state" / "flower")
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.utils import init_http_client_from_connection
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    connection = read_connection("fedfora")
    app = Path(directory).parent / "agent"
    run.write_app(app, {})
    text = AGENT.format(directory=directory, kit_variable=KIT)
    (app / run.PACKAGE / "agent.py").write_text(text)
    project = app / "pyproject.toml"
    kept = [line for line in project.read_text().splitlines() if ".server:" not in line]
    replaced = 'agentapp = "fedfora_app.agent:app"'
    lines = [replaced if ".client:" in line else line for line in kept]
    project.write_text("\n".join(lines) + "\n")
    content = build_fab_from_disk(app)
    fab = Fab(sha256(content).hexdigest(), content, {})
    request = StartRunRequest(fab=fab_to_proto(fab), user_prompt="go")
    return init_http_client_from_connection(connection).StartRun(request)


def read_connection(name):
    """The address of the SuperLink, as Flower's command finds it."""
    from flwr.cli.flower_config import read_superlink_connection

    return read_superlink_connection(name)


if __name__ == "__main__":
    mode, kit, directory = sys.argv[1:]
    if mode == "agent":
        print(start_agent(kit, directory))
        sys.exit()
    for name, text in list(run._FILES.items()):
        trace = f"__import__('pathlib').Path({directory!r}, {name!r}).write_text('was here')"
        run._FILES[name] = f"{text}{trace}\n"
    sys.exit(main(["coordinator", "run", "--kit", kit]))
