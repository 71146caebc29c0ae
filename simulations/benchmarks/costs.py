"""How true the model of memory and time is (fedtune/core/costs.py): predicted beside measured, on SmolLM2.

    python -m simulations.benchmarks.costs                  a process for each setting; about 4 minutes
    python -m simulations.benchmarks.costs --threads 1

The speeds are those that `fedtune doctor` measures: a small Llama made at random, not SmolLM2. Measured memory is the
peak of the process while it trains, less what it held before the model was loaded; measured time is the median of the
steps after the first two. A quiet machine, please: the last column is how much the predictions are off.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
QV, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
STEPS = 7


@dataclass(frozen=True)
class Setting:
    batch: int
    tokens: int  # of every example, of which the second half is learnt
    quantization: str
    targets: tuple[str, ...]
    blocks: int  # adapted, from the output
    rank: int


SETTINGS = (
    Setting(1, 32, "none", QV, 2, 8),
    Setting(1, 64, "none", QV, 30, 8),
    Setting(4, 64, "none", QV, 30, 8),
    Setting(4, 128, "none", ALL, 30, 8),
    Setting(4, 128, "none", ALL, 10, 8),
    Setting(4, 128, "none", ALL, 2, 64),
    Setting(8, 128, "none", ALL, 30, 64),
    Setting(4, 256, "none", QV, 30, 8),
    Setting(4, 128, "nf4", ALL, 30, 8),
    Setting(4, 128, "nf4", ALL, 10, 8),
    Setting(4, 128, "int8", QV, 30, 8),
)


def resident(what: str = "VmRSS") -> float:
    """Bytes of this process in memory; "VmHWM" for the most since the counter was reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(what)).split()[1])


def measure(setting: Setting, threads: int, base: str = SMOLLM2) -> dict[str, float]:
    """Predicted and measured bytes, and seconds of a step in terms of the doctor's two rates."""
    import bitsandbytes  # noqa: F401 (before the memory is read: it is no part of the model)
    import peft  # noqa: F401
    import transformers  # noqa: F401

    from fedtune.config.schema import AdapterSpec, ModelSpec
    from fedtune.core.heap import trim
    from fedtune.core.protocol import Batch
    from fedtune.data.corpus import Corpus
    from fedtune.data.federated_data import FederatedData
    from fedtune.models.adapted_model import LocalModel
    from fedtune.models.base import load_base
    from fedtune.planning.cost_probe import costs_of, weights_of
    from fedtune.training.first_order import loss_of, make_optimizer

    torch.set_num_threads(threads)
    torch.randn(64, 64) @ torch.randn(64, 64)
    gc.collect()
    trim()  # what loading gives back is the model's alone then, and not what this process had let go of before
    before = resident()
    spec = ModelSpec(name="smollm2", path=base, quantization=setting.quantization)
    model = LocalModel(
        load_base(spec, torch.device("cpu")), AdapterSpec(rank=setting.rank, targets=list(setting.targets)), 0
    )
    weights = weights_of(model)
    blocks = 1 + max(weight.block for weight in weights)
    chosen = [weight for weight in weights if weight.block >= blocks - setting.blocks]
    model.adapt_only([weight.module for weight in chosen])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    learnt = torch.arange(setting.tokens).expand(setting.batch, -1) >= setting.tokens // 2
    parameters = model.parameters()
    optimizer = make_optimizer("adamw", parameters, 1e-3, 0.0)
    model.module.train()
    times = []
    for _ in range(STEPS):
        tokens = torch.randint(5, 40000, (setting.batch, setting.tokens), generator=generator)
        begun = time.perf_counter()
        loss = loss_of(model.module, Batch(tokens, learnt))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    peak = resident("VmHWM") - before

    rows = 8
    corpus = Corpus(
        np.zeros(rows * setting.tokens, np.int32),
        np.tile(learnt[0].numpy(), rows),
        np.arange(rows + 1, dtype=np.int64) * setting.tokens,
    )
    data = FederatedData(corpus, (np.arange(rows),), (np.arange(0),), np.arange(0), 0, 0)
    costs = costs_of(model, data, setting.batch, 0)
    # Without quantization as the base is held: 16 or 32, by what this machine multiplies
    bits = {"none": max(map(int, costs.base_bytes)), "nf4": 4, "int8": 8}[setting.quantization]
    block = min(weight.block for weight in chosen)
    numbers = sum(setting.rank * (weight.rows + weight.columns) for weight in chosen)
    per_token = sum(costs.input_bytes * weight.columns + costs.inner_bytes * setting.rank for weight in chosen)
    inf = float("inf")
    return {
        "bytes": peak,
        "predicted_bytes": float(costs.memory(setting.batch, bits, block, numbers, per_token, 16)),
        "seconds": float(np.median(times[2:])),
        "flop": float(costs.compute(setting.batch, bits, 1, block, numbers, 1.0, inf)),
        "read": float(costs.compute(setting.batch, bits, 1, block, numbers, inf, 1.0)),
    }


def rates(threads: int) -> dict[str, float]:
    """What training sustains here, as the doctor measures it."""
    from fedtune.device.benchmark import fit, training_steps
    from fedtune.models.base import pick_dtype

    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    found = fit(training_steps(cpu, pick_dtype("auto", cpu)))
    return {"flop_per_s": found.flop_per_s, "read_bytes_per_s": found.read_bytes_per_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one == "rates":
        print(json.dumps(rates(options.threads)))
        return
    if options.one is not None:
        print(json.dumps(measure(SETTINGS[int(options.one)], options.threads)))
        return

    def apart(what: str) -> dict[str, float]:
        command = [sys.executable, "-m", __spec__.name, "--threads", str(options.threads), "--one", what]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    report(SETTINGS, options.threads, apart("rates"), lambda place: apart(str(place)))


def report(
    settings: Sequence[Setting],
    threads: int,
    speed: Mapping[str, float],
    measured: Callable[[int], Mapping[str, float]],
) -> None:
    """Print what was predicted beside what was `measured` of each setting, at a speed as `rates` has it."""
    console = Console()
    console.print(
        f"{threads} threads: {speed['flop_per_s'] / 1e9:.1f} GFLOP/s, "
        f"{speed['read_bytes_per_s'] / 1e9:.2f} GB/s of weights"
    )
    table = Table(box=None, header_style="dim")
    for heading in (*asdict(settings[0]), "MB", "predicted", "off", "s a step", "predicted", "off"):
        table.add_column(heading, justify="right")
    worst = [0.0, 0.0]
    for place, setting in enumerate(settings):
        found = measured(place)
        seconds = found["flop"] / speed["flop_per_s"] + found["read"] / speed["read_bytes_per_s"]
        off = [found["predicted_bytes"] / found["bytes"] - 1, seconds / found["seconds"] - 1]
        worst = [max(a, abs(b)) for a, b in zip(worst, off, strict=True)]
        said = ["+".join(name[0] for name in setting.targets) if value is setting.targets else str(value)
                for value in vars(setting).values()]  # fmt: skip
        table.add_row(
            *said,
            f"{found['bytes'] / 1e6:.0f}", f"{found['predicted_bytes'] / 1e6:.0f}", f"{off[0]:+.0%}",
            f"{found['seconds']:.3f}", f"{seconds:.3f}", f"{off[1]:+.0%}",
        )  # fmt: skip
    console.print(table)
    console.print(f"worst: memory {worst[0]:.0%}, time {worst[1]:.0%} (aim: 25 %)")


if __name__ == "__main__":
    main()
