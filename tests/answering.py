"""A Flower app that answers with what it sees of its device, for tests of fleets: it imports nothing of ours, so its
processes are light."""

SETTINGS = """
[project]
name = "tiny-app"
version = "1.0.0"
description = "answers"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "fedtune.app:server"
clientapp = "fedtune.app:client"

[tool.flwr.app.config]
overrides = ""
mode = ""
nodes = 2
seconds = 0.0
"""

# The package has the name of one that is installed, to see whose code the nodes import
APP = """
import hashlib, json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    time.sleep(float(context.run_config["seconds"]))
    answer = {"file": __file__, "node": json.dumps(dict(context.node_config), sort_keys=True)}
    answer["text"] = hashlib.sha256(context.run_config["overrides"].encode()).hexdigest()
    return Message(RecordDict({"answer": ConfigRecord(answer)}), reply_to=message)

@server.main()
def main(grid, context):
    if context.run_config["mode"] == "fail":
        raise RuntimeError("asked to fail")
    while len(nodes := list(grid.get_node_ids())) < context.run_config["nodes"]:
        time.sleep(0.1)
    for reply in grid.send_and_receive([Message(RecordDict(), node, "train") for node in nodes]):
        answer = f"error {reply.error.code}" if reply.has_error() else json.dumps(dict(reply.content["answer"]))
        print("ANSWER", answer, flush=True)
"""


def write_app(folder):
    (folder / "pyproject.toml").write_text(SETTINGS)
    (folder / "fedtune").mkdir()
    (folder / "fedtune" / "__init__.py").touch()
    (folder / "fedtune" / "app.py").write_text(APP)
    return folder
