"""What the engine itself costs.

    python -m simulations.benchmarks.engine            all three, some ten minutes on 2 cores
    python -m simulations.benchmarks.engine idle       500 clients with nothing to do: in process, and on Ray
    python -m simulations.benchmarks.engine bare       SmolLM2: a federated round over the same training without one
    python -m simulations.benchmarks.engine template   SmolLM2: the usual Flower template over ours
    python -m simulations.benchmarks.engine bare template model.path=FOLDER     of another model: any settings' words

Ratios are taken within one run. Seconds are this machine's and are printed to give them scale.
"""

import csv
import itertools
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from flwr.app import Context, Message, UserConfig
from flwr.clientapp import ClientApp
from rich.console import Console
from rich.table import Table

from clients.first_order import FirstOrder
from fedtune.config.compose import compose
from fedtune.config.schema import Experiment, MethodSpec
from fedtune.core.protocol import Instruction, Tensors, Update
from fedtune.core.seeds import derive_seed
from fedtune.runtime.app import make_client_app, make_server_app
from fedtune.runtime.local import LocalGrid, server_context
from fedtune.training.gradients import finished
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace, workspace_of


@dataclass(frozen=True)
class IdleState:
    rounds: int


@dataclass(frozen=True)
class Idle:
    """A method that sends nothing: what is left is the engine."""

    def init(self, layout: Any) -> IdleState:
        return IdleState(0)

    def configure(self, state: IdleState, round: int, peer: Any) -> Instruction:
        return _NOTHING

    def validate(self, state: IdleState, round: int, peer: Any, update: Update) -> None:
        pass

    def aggregate(self, state: IdleState, round: int, replies: Any) -> IdleState:
        return IdleState(state.rounds + len(replies))


@dataclass(frozen=True)
class IdleClient:
    def receive(self, model: Any, instruction: Instruction, memory: Tensors) -> None:
        pass

    def train(self, model: Any, batches: Any, instruction: Instruction, memory: Tensors, key: int) -> Update:
        return Update({}, batches.examples)


_NOTHING = Instruction({})
HERE = "simulations.benchmarks.engine"


def idle(words: Sequence[str] = (), clients: int = 500, ray: bool = True) -> list[tuple[str, ...]]:
    """A round of clients with empty work, in process and on Flower's Ray backend."""
    base = compose(
        [
            "model=tiny",
            "data.partition=iid",
            f"population.clients={clients}",
            f"population.cohort={clients}",
            "evaluate.every=0",
            *words,
        ]
    )
    method = MethodSpec({"_target_": f"{HERE}.Idle"}, {"_target_": f"{HERE}.IdleClient"})
    base = replace(base, method=method)

    rounds = local_rounds(replace(base, rounds=40))
    in_process = statistics.median(rounds)
    found = [
        (
            f"{clients} idle clients, in process",
            f"{in_process * 1000:.0f} ms a round, {min(rounds) * 1000:.0f} at best",
            "",
            "under 50 ms",
        )
    ]
    if not ray:
        return found
    on_ray = ray_round(replace(base, rounds=4))
    return [
        *found,
        (
            f"{clients} idle clients, on Ray",
            f"{on_ray * 1000:.0f} ms a round",
            f"{on_ray / in_process:.0f}x in process",
            "",
        ),
    ]


def local_rounds(experiment: Experiment) -> list[float]:
    """Seconds of each round in process, writing the run folder included: from one push of messages to the next."""
    pushes: list[float] = []

    class TimedGrid(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            pushes.append(time.perf_counter())
            return super().push_messages(messages)

    with tempfile.TemporaryDirectory() as folder:
        config: UserConfig = {"config": replace(experiment, out=f"{folder}/run").text()}
        grid = TimedGrid(make_client_app(), experiment.population.clients, config)
        make_server_app()(grid=grid, context=server_context(config))
    return [after - before for before, after in itertools.pairwise(pushes[1:])]  # the first push is the handshake


def ray_round(experiment: Experiment) -> float:
    """Seconds of a round of the same app on Flower's Ray backend, the first round left out."""
    from flwr.simulation import run_simulation

    with tempfile.TemporaryDirectory() as folder:
        text = replace(experiment, out=f"{folder}/run").text()
        run_simulation(
            server_app=make_server_app(text),
            client_app=make_client_app(text),
            num_supernodes=experiment.population.clients,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"include_dashboard": False, "_node_ip_address": "127.0.0.1"},
            },
        )
        with (Path(folder) / "run" / "metrics.csv").open(encoding="utf-8") as stream:
            return statistics.median(float(row["seconds"]) for row in list(csv.DictReader(stream))[2:])


def bare(words: Sequence[str] = (), clients: int = 20) -> list[tuple[str, ...]]:
    """A federated round of SmolLM2 over the same turns without federation.

    Each client trains twice in a row, bare and federated, in alternating order, so that a machine that slows down or
    warms up does so for both.
    """
    experiment = compose(
        [
            "model=smollm2",
            f"population.clients={clients}",
            f"population.cohort={clients}",
            "evaluate.every=0",
            "rounds=1",
            *words,
        ]
    )
    text = experiment.text()
    workspace = workspace_of({"config": text})
    inner = make_client_app()
    bare_seconds = [0.0]

    def bare_turn(index: int) -> None:
        begun = time.perf_counter()
        train_once(workspace, index)
        bare_seconds[0] += time.perf_counter() - begun

    app = ClientApp()
    app.query()(lambda message, context: inner(message, context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        if index % 2:
            bare_turn(index)
        reply = inner(message, context)
        if not index % 2:
            bare_turn(index)
        return reply

    train_once(workspace, 0)
    with tempfile.TemporaryDirectory() as folder:
        experiment = replace(experiment, out=f"{folder}/run")
        grid = LocalGrid(app, clients, {"config": text})
        workspace.experiment = experiment
        make_server_app()(grid=grid, context=server_context({"config": text}))
        with (Path(folder) / "run" / "metrics.csv").open(encoding="utf-8") as stream:
            federated = float(list(csv.DictReader(stream))[1]["seconds"]) - bare_seconds[0]
    ratio = federated / bare_seconds[0]
    return [
        (f"SmolLM2 LoRA, {clients} clients x 4 steps x 4, bare loop", f"{bare_seconds[0]:.1f} s", "", ""),
        ("the same as a federated round", f"{federated:.1f} s", f"{ratio:.3f}x bare", "at most 1.05x"),
    ]


def train_once(workspace: Workspace, index: int, steps: int | None = None) -> None:
    """A client's optimizer steps and nothing else; as many as the settings say, or `steps`."""
    client = workspace.client
    assert isinstance(client, FirstOrder)
    key = derive_seed(workspace.experiment.seed, "train", 1, index)
    batches = workspace.data.batches(index, workspace.experiment.train.batch_size, key)
    finished(replace(client, steps=steps or client.steps).fit(workspace.model, batches, key, None))


def template(words: Sequence[str] = (), turns: int = 4) -> list[tuple[str, ...]]:
    """A turn as the usual Flower LLM template takes it: the base is loaded and a Trainer built for every message.

    Twice: with everything else as ours has it, and with the template's own settings (github.com/adap/flower,
    examples/flowertune-llm: a 4-bit base quantized on loading, norms and embeddings in float32, activations
    checkpointed).
    """
    found = []
    for label, quantization in (("bfloat16", "none"), ("as the template is shipped, 4-bit", "nf4")):
        settings = ["model=smollm2", f"model.quantization={quantization}", "evaluate.every=0", *words]
        workspace = Workspace(compose(settings))
        received = Instruction(workspace.model.read())
        turn = partial(local_update, workspace, "0" * 16, round=1, instruction=received)
        usual = partial(usual_turn, workspace, received)
        turn(0), usual(0)
        pairs = [(timed(turn, index), timed(usual, index)) for index in range(1, turns + 1)]
        mine, theirs = (sum(side) / turns for side in zip(*pairs, strict=True))
        found += [
            (f"SmolLM2 turn of 4 steps x 4, ours, {quantization}", f"{mine:.2f} s", "", ""),
            (f"the same by the template, {label}", f"{theirs:.2f} s", f"{theirs / mine:.2f}x ours", "at least 2x"),
        ]
    return found


def timed(call: Callable[[int], object], index: int) -> float:
    begun = time.perf_counter()
    call(index)
    return time.perf_counter() - begun


def usual_turn(workspace: Workspace, received: Instruction, index: int) -> None:
    """Load, adapt, install, build a Trainer, train, read back."""
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        prepare_model_for_kbit_training,
        set_peft_model_state_dict,
    )
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    settings, four_bit = workspace.experiment.train, workspace.experiment.model.quantization == "nf4"
    quantized: dict[str, Any] = {}
    if four_bit:
        quantized = {
            "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
            "device_map": {"": workspace.model.device},
        }
    model = AutoModelForCausalLM.from_pretrained(workspace.model.origin.path, dtype=torch.bfloat16, **quantized)
    if four_bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    set_peft_model_state_dict(adapted, received.tensors)
    batches = itertools.islice(workspace.data.batches(index, settings.batch_size, 0), settings.steps)
    examples = [
        {"input_ids": tokens, "labels": tokens.masked_fill(~targets, -100)}
        for batch in batches
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True)
    ]

    def collate(picked: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([row["input_ids"] for row in picked], True, workspace.data.pad),
            "labels": pad([row["labels"] for row in picked], True, -100),
        }

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_checkpointing=four_bit,
            learning_rate=settings.lr,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=workspace.model.device.type == "cpu",
        )
        Trainer(model=adapted, args=arguments, train_dataset=examples, data_collator=collate).train()
    get_peft_model_state_dict(adapted)


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    known = {"idle": idle, "bare": bare, "template": template}
    words = [word for word in sys.argv[1:] if "=" in word]
    chosen = [word for word in sys.argv[1:] if "=" not in word] or list(known)
    table = Table(title="engine")
    for heading in ("what", "measured", "ratio", "aim"):
        table.add_column(heading)
    for name in chosen:
        if name not in known:
            sys.exit(f"no benchmark '{name}': expected {', '.join(known)}")
        for row in known[name](words):
            table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
