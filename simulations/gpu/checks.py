"""What a GPU is, and whether what holds on a CPU holds there."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

import torch

from fedtune.config.compose import compose
from fedtune.core.protocol import ClientInfo
from fedtune.device.benchmark import fit, matmul_rates, quantized, short, training_steps
from fedtune.models.base import pick_device, pick_dtype
from fedtune.random_directions.hash_noise import SIGMA, Table, accumulate_
from fedtune.runtime.local import run_local
from fedtune.workspace.client_handler import local_update
from fedtune.workspace.workspace import Workspace
from simulations.gpu.results import Row
from simulations.gpu.steps import Place, Unmeasured, has_cuda
from simulations.gpu.training import data, fresh, quietly, settle, smollm2_words

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "triton", "flwr")
TESTS = Path(__file__).resolve().parents[2] / "tests"


def machine(place: Place) -> Iterator[Row]:
    """Names, versions, and two rates to hold all else against."""
    device = pick_device("auto")
    if has_cuda():
        found = torch.cuda.get_device_properties(device)
        yield Row("card", found.name, beside=f"{found.total_memory / 1e9:.1f} GB, compute {found.major}.{found.minor}")
        yield Row("driver", _driver(), beside=f"CUDA {torch.version.cuda}")
    else:
        yield Row("card", None)
    for name in LIBRARIES:
        yield Row(name, _version(name))
    yield Row("python", sys.version.partition(" ")[0], beside=f"{os.cpu_count()} cores")
    size = 256 if place.tiny else 8192
    one, other = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = _seconds(lambda: one @ other, 10)
    yield Row("bfloat16 matrix product", 2 * size**3 / seconds / 1e12, "TFLOP/s", f"{size} x {size} x {size}")
    whole = torch.empty(size * size * (1 if place.tiny else 8), device=device)  # 2 GB
    there = torch.empty_like(whole)
    seconds = _seconds(lambda: there.copy_(whole), 10)
    yield Row("copy on the device", 2 * whole.nbytes / seconds / 1e9, "GB/s", "bytes read and written")


def tests(place: Place) -> Iterator[Row]:
    """The part of the test suite that needs a GPU."""
    if place.tiny:
        raise Unmeasured("tests have a GPU to themselves, or are skipped")
    yield from _pytest(place, "test_cuda.py", "-m", "cuda")


def contract(place: Place) -> Iterator[Row]:
    """What every method promises, as on a CPU: without a word on the device, all runs are on the GPU."""
    if place.tiny:
        raise Unmeasured("on a CPU that is a part of the test suite")
    yield from _pytest(place, "test_contract.py")


def resume(place: Place) -> Iterator[Row]:
    """Three rounds, the same again, and two that are gone on with."""
    model, which = smollm2_words(place)
    forms = {"bfloat16": [], "nf4": ["model.quantization=nf4"]}
    for form, more in forms.items():
        words = [*data(place, 4), *model, "model.dtype=bfloat16", *more]
        states = {}
        for name in ("whole", "again"):
            with quietly():
                run_local(compose([*words, "rounds=3", f"out={place.folder / form / name}"]))
            states[name] = _state(place.folder / form / name)
        parts = place.folder / form / "parts"
        with quietly():
            run_local(compose([*words, "rounds=2", f"out={parts}"]))
            run_local(compose([*words, "rounds=3", f"out={parts}"]), resume=str(parts))
        states["parts"] = _state(parts)
        for what, name in (("two runs of a seed", "again"), ("2 rounds and a resume, or 3 at once", "parts")):
            same = "the same bits" if states[name] == states["whole"] else "DIFFERENT"
            yield Row(f"{form}: {what}", same, beside=f"{which}; state {states['whole'][:12]}, {states[name][:12]}")


def seeded(place: Place) -> Iterator[Row]:
    """Noise on both devices, and what a step along it takes."""
    device = pick_device("auto")
    for kind in sorted(SIGMA):
        both = [_sums(where, kind) for where in (device, torch.device("cpu"))]
        same = "the CPU's bits" if torch.equal(*both) else "DIFFERENT"
        yield Row(f"{kind} noise", same if device.type == "cuda" else None, beside=f"{both[0].numel():,} sums of 8")
    model, which = smollm2_words(place)
    local_steps = 2 if place.tiny else 20
    words = [
        "method=fedkseed",
        "adapter=none",
        "model.dtype=bfloat16",
        f"method.strategy.rules.local_steps={local_steps}",
    ]
    fresh()
    workspace = Workspace(compose([*data(place, 1), *model, *words, f"out={place.folder / 'run'}"]))
    state = workspace.strategy.init(workspace.layout)
    told = workspace.strategy.configure(state, 1, ClientInfo(0, 8))
    for label in ("first turn, kernels compiled in it", "a turn after that"):
        begun = time.perf_counter()
        local_update(workspace, "0" * 16, 0, 1, told)
        settle()
        seconds = (time.perf_counter() - begun) / local_steps
        said = f"of {workspace.model.trainable / 1e6:.0f} M weights, {which}, 2 passes"
        yield Row(f"FedKSeed, {label}", seconds, "s a step", said)


def doctor(place: Place) -> Iterator[Row]:
    """What a plan would take this device for."""
    if place.tiny:
        raise Unmeasured("`fedtune doctor` says it of any device")
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    for found in matmul_rates(device):
        rate = None if found.reason else found.flop_per_s / 1e12
        yield Row(f"{short(found.dtype)} products", rate, "TFLOP/s", found.reason)
    able = fit(training_steps(device, dtype))
    yield Row("training, frozen weights", able.flop_per_s / 1e12, "TFLOP/s", short(dtype))
    read = able.read_bytes_per_s / 1e9
    yield Row("training, reading weights", read if isfinite(read) else "no part of the time", "GB/s", short(dtype))
    for kind in quantized(device, dtype):
        yield Row(f"a step of a layer in {kind.name}", kind.reason or kind.times, f"x of {short(dtype)}")


def _sums(device: torch.device, kind: str) -> torch.Tensor:
    table = Table({"a": 1_000_003, "b": 77}, device)
    sums = table.sums()
    accumulate_(table, sums, range(8), [3**n for n in range(8)], kind)
    return torch.cat([table.total(sums, name) for name in table.sizes]).cpu()


def _pytest(place: Place, file: str, *words: str) -> Iterator[Row]:
    if not TESTS.is_dir():
        raise Unmeasured("the tests are not here: they come with the repository, not with the package")
    several = ["-n", str(min(6, max(1, (os.cpu_count() or 2) // 2)))] if find_spec("xdist") is not None else []
    command = [sys.executable, "-m", "pytest", str(TESTS / file), *words, *several]
    trace = place.folder / "trace"  # while it runs, so that what was cut off has said something
    with trace.open("w", encoding="utf-8") as stream:
        options = ["--tb=short", "-rfE", "--durations=5", "-p", "no:cacheprovider"]
        code = subprocess.run(
            [*command, *options], cwd=TESTS.parent, stdout=stream, stderr=subprocess.STDOUT, check=False
        ).returncode
    said = trace.read_text(encoding="utf-8", errors="replace")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", _last(said))}
    for word in ("passed", "failed", "skipped"):
        yield Row(word, counts.get(word, 0), "tests", f"{file}; exit code {code}")
    for name, reason in re.findall(r"^(?:FAILED|ERROR) \S*?(test_\S+)(?: - (.*))?$", said, re.MULTILINE):
        yield Row("failed", name, beside=reason)
    if code == 0:
        trace.unlink()
    elif not counts.get("passed"):
        raise RuntimeError(f"pytest ended with {code}: {_last(said)}")


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _state(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["state_sha256"])


def _seconds(work: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        work()
    settle()
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    settle()
    return (time.perf_counter() - begun) / repeats


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
