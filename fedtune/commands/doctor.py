"""`fedtune doctor`: what a person reads of a device's measurements, and the profile that a run takes."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.commands import Subparsers
from fedtune.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

    from fedtune.core.protocol import DeviceProfile
    from fedtune.device import bandwidth
    from fedtune.device import benchmark as doctor
    from fedtune.device.memory import MemoryFound

BUSY = 0.5  # load per core from which other programs get in the way of measuring
MISSED = 0.4  # of a step's time: more than idle devices show
GIB = 2**30
TEXT = """\
Measure what this device can do, and write its profile: memory that is free, what training sustains, whether quantized
bases can be trained here, and, with --server, what the link to it carries. It takes about 20 seconds.

  fedtune doctor                                      to device.csv in this device's home, for population=measured
  fedtune doctor --server server.example.org:9000     and the network, if this runs there:
  fedtune doctor --listen 0.0.0.0:9000                the other end of it, until Ctrl-C
  fedtune doctor --write --data mine.jsonl            and device.toml: this device's own data, and what runs may do
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser("doctor", help="measure this device, and write its profile", description=TEXT)
    parser.add_argument("--out", metavar="FILE", help="the profile's file (default: device.csv in the device's home)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument(
        "--write",
        nargs="?",
        const="",
        metavar="FILE",
        help="also write device.toml: what runs may do here (in its home)",
    )
    parser.add_argument("--data", metavar="PATH", help="with --write: the file or folder that this device trains on")
    parser.add_argument("--name", default="", help="with --write: what this device is called")
    parser.add_argument("--index", type=int, metavar="N", help="with --write: which client it is")
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--server", metavar="HOST:PORT", help="measure the link to a fedtune doctor --listen there")
    ends.add_argument("--listen", metavar="[HOST:]PORT", help="be that other end (default host: 127.0.0.1)")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="for each direction (default: 3)")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if it can't be done.
    """
    if options.listen is not None:
        listen(options.listen)
    else:
        if options.write is None and (options.data, options.name, options.index) != (None, "", None):
            raise ConfigError("--data, --name and --index are what device.toml says: they want --write")
        target = prepare(options) if options.write is not None else None
        examine(Request(options.out, options.device, options.threads, options.server, options.seconds))
        if target is not None:
            write_device_file(*target)
    return 0


@dataclass(frozen=True)
class Request:
    """What a person asked of the doctor.

    Attributes:
        out: the profile's file; None: `device.csv` in this device's home, where population.devices=measured finds it.
        threads: 0 takes all cores, as runtime.threads does.
        server: HOST:PORT of a `fedtune doctor --listen`.
        seconds: of the bandwidth test, for each direction.
    """

    out: str | None = None
    device: str = "auto"
    threads: int = 0
    server: str | None = None
    seconds: float = 3.0


def examine(asked: Request) -> Path:
    """Measure this device, print what was found, and write its profile.

    Returns:
        Where the profile is.

    Raises:
        FedtuneError: if the device isn't there, can't train, or the server can't be reached; nothing is written then.
    """
    import torch

    from fedtune.core.protocol import DeviceProfile
    from fedtune.device import bandwidth
    from fedtune.device import benchmark as doctor
    from fedtune.device.home import home
    from fedtune.device.memory import memory_of

    page = _Page()
    device, server = _device(asked.device), None
    if asked.server is not None:
        server = bandwidth.parse_address("--server", asked.server)
        bandwidth.check_seconds(asked.seconds)
    if asked.threads < 0:
        raise ConfigError(f"--threads {asked.threads}: expected a number of CPU threads, or 0 for all")
    cores = os.cpu_count() or 1
    torch.set_num_threads(min(asked.threads or cores, cores))
    path = home() / "device.csv" if asked.out is None else Path(asked.out).expanduser()
    memory = memory_of(device)  # before the measurements take some of it
    name = doctor.device_name(device)
    threads = torch.get_num_threads()
    page.line("device", f"{name} ({device}, {threads} CPU thread{'s' * (threads > 1)})")
    if (load := _load()) > BUSY * cores:
        page.line("", f"busy: load {load:.1f} on {cores} cores; what follows is slower than the device is when idle")
    page.line("memory", _of_memory(memory))
    link = None
    if server is not None:  # first: what fails here would otherwise fail after the wait
        with page.waiting("measuring the network"):
            link = bandwidth.measure(*server, asked.seconds)
    fit = _compute(page, device)
    page.line("network", _of_link(link, asked.server))
    able = DeviceProfile(
        device=name,
        memory_bytes=float("inf") if memory is None else max(memory.free, 1),
        flop_per_s=_rounded(fit.flop_per_s),
        read_bytes_per_s=_rounded(fit.read_bytes_per_s),
        up_bytes_per_s=float("inf") if link is None else _rounded(link.up),
        down_bytes_per_s=float("inf") if link is None else _rounded(link.down),
    )
    _write(path, able)
    page.line("wrote", str(path))
    if asked.out is None:
        page.line("use", "on the server: fedtune run population=measured runtime=flower ...; nothing more to do here")
        page.line("", "in a simulation: its line is a row of any CSV for population.devices=FILE")
    else:
        page.line(
            "use", f"in a simulation: fedtune run population.devices={shlex.quote(str(path))} ...; each line a device"
        )
        page.line(
            "", f"on the server: as {home() / 'device.csv'} on the device, with population=measured runtime=flower"
        )
    return path


def prepare(options: argparse.Namespace) -> tuple[Path, str]:
    """Where device.toml goes, and its text; what is wrong with either is found before anything is measured.

    Raises:
        FedtuneError: if there is such a file, or the data can't be read.
    """
    from fedtune.config.data import DataSpec
    from fedtune.data.sources import load_examples
    from fedtune.device import device_file
    from fedtune.device.home import home

    path = Path(options.write).expanduser() if options.write else home() / device_file.FILE
    if path.exists():
        raise ConfigError(
            f"{path} is there already, and its owner's words are not overwritten: edit it, or name another"
        )
    if options.index is not None and options.index < 0:
        raise ConfigError(f"--index {options.index}: expected a client's number, from 0 up")
    data = device_file.DataHere()
    if options.data is not None:
        whole = os.path.abspath(os.path.expanduser(options.data))  # noqa: PTH100, PTH111 (it may be a pattern)
        count = len(load_examples(DataSpec(path=whole)))
        _Page().line("data", f"{count:,} rows in {options.data}; they stay here")
        data = device_file.DataHere((whole,))
    return path, device_file.written(device_file.DeviceFile(options.name, options.index, data))


def write_device_file(path: Path, text: str) -> None:
    """Write what `prepare` made.

    Raises:
        ConfigError: if it can't be written.
    """
    page = _Page()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror or error}. Give --write another FILE") from error
    page.line("wrote", f"{path}: what runs may do here, for its owner to edit")


def listen(address: str) -> None:
    """Be the other end of devices' bandwidth tests, one after another, until Ctrl-C.

    Raises:
        FedtuneError: if the address is none, or isn't to be had.
    """
    from fedtune.device import bandwidth

    host, port = bandwidth.parse_address("--listen", address, "127.0.0.1")
    page = _Page()
    with bandwidth.open_listener(host, port) as listener:
        bound = listener.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        page.line("listening", f"at {shown}:{bound}, until Ctrl-C; whoever reaches it can fill the link while it runs")
        page.line("device", f"fedtune doctor --server {_reached(shown)}:{bound}")
        try:
            bandwidth.serve(listener, lambda line: page.line("", line))
        except KeyboardInterrupt:
            page.line("stopped", "")


class _Page:
    """Lines under headings in the left margin: bold in a terminal, plain elsewhere, never wrapped."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)

    def line(self, head: str, text: str) -> None:
        from rich.markup import escape

        self._console.print(f"[bold]{head:<10}[/bold] {escape(text)}".rstrip())
        sys.stdout.flush()

    def waiting(self, what: str) -> AbstractContextManager[object]:
        return self._console.status(f"{what} ...")


def _compute(page: _Page, device: torch.device) -> doctor.Fit:
    """Matrix products, training steps and quantized layers; what training sustains."""
    from fedtune.core.text import rate
    from fedtune.device import benchmark as doctor
    from fedtune.models.base import pick_dtype

    with page.waiting("multiplying matrices"):
        for number, product in enumerate(doctor.matmul_rates(device)):
            shown = f"not here: {product.reason}" if product.reason else f"{_flops(product.flop_per_s):>14}"
            page.line("" if number else "matmul", f"{doctor.short(product.dtype):<10}{shown}")
    dtype = pick_dtype("auto", device)
    with page.waiting("training a small Llama"):
        steps = doctor.training_steps(device, dtype)
        fit = doctor.fit(steps)
        reads = fit.read_bytes_per_s
        waits = "without a wait for weights" if reads == float("inf") else f"reading weights at {rate(reads)}"
        page.line("training", f"{doctor.short(dtype):<10}{_flops(fit.flop_per_s):>14}, {waits}")
        for step in steps:
            off = fit.seconds(step.flop, step.read) / step.seconds - 1
            page.line(
                "", f"{step.tokens:>10,} tokens {step.seconds * 1e3:8.1f} ms a step; as these rates have it {off:+.0%}"
            )
    if max(abs(fit.seconds(step.flop, step.read) / step.seconds - 1) for step in steps) > MISSED:
        page.line(
            "", "these steps don't go together: something else was running; measure again when the device is idle"
        )
    with page.waiting("trying quantized layers"):
        for number, layer in enumerate(doctor.quantized(device, dtype)):
            page.line("" if number else "quantized", _of_layer(layer, dtype))
    return fit


def _of_layer(layer: doctor.Quantized, dtype: torch.dtype) -> str:
    from fedtune.device import benchmark as doctor

    if layer.reason:
        return f"{layer.name}: DOES NOT RUN here: {layer.reason}"
    return f"{layer.name}: works, {layer.times:.1f} times the time of {doctor.short(dtype)}"


def _of_memory(memory: MemoryFound | None) -> str:
    if memory is None:
        return "unknown: this system doesn't say; the profile leaves it empty, which is unlimited"
    return f"{memory.free / GIB:.1f} GiB free now of {memory.total / GIB:.1f} GiB ({memory.limit})"


def _of_link(link: bandwidth.Bandwidth | None, server: str | None) -> str:
    from fedtune.core.text import rate

    if link is None:
        return "not measured: no --server; the profile leaves it empty, which is unlimited"
    return f"{rate(link.down)} down, {rate(link.up)} up, with {server}"


def _device(name: str) -> torch.device:
    from fedtune.models.base import pick_device

    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ConfigError(f"--device {name} is not known: expected auto, cpu, cuda or cuda:N")
    try:
        return pick_device(name)
    except ModelError as error:
        raise ModelError(str(error).replace("runtime.device=", "--device ")) from error


def _write(path: Path, able: DeviceProfile) -> None:
    from fedtune.config.devices import write_devices

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_devices(path, [able])
    except OSError as error:
        raise ConfigError(
            f"{path} can't be written: {error.strerror or error}. Give --out a file in a folder of your own"
        ) from error


def _reached(host: str) -> str:
    return "THIS-MACHINE" if host in ("0.0.0.0", "[::]") else host


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.1f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.1f} GFLOP/s"


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")


def _load() -> float:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # Windows has none
        return 0.0
