"""What every codec makes of an update: how many bytes, how fast on one core, and how near to it.

    python -m simulations.benchmarks.codecs              10 M values of made-up LoRA updates; a minute
    python -m simulations.benchmarks.codecs --quick      the same on few values, in a moment: do the parts still fit?
    python -m simulations.benchmarks.codecs --run DIR    and what a run learnt: DIR/adapter less DIR/start

Every conf/codec/*.yaml is taken, with the papers' 5 % where it sends few of the values, and those with a coder once
with each. Made-up updates are normal, with a scale for each tensor: those of "even" are 10 % apart, as those of the
lora_B are after a run of SmolLM2, and those of "uneven" 65 %. The entropy that ComPEFT is beside has no clusters:
every value is as likely as the others to be sent. Uneven scales do cluster what is sent, and codes of positions can
come below it.

Sizes are beside bfloat16, 2 bytes a value. MB/s are of float32, 4 bytes a value, there and back. "copies" is the time
there and back over that of copying the tensors, taken in the same run. All take turns, and the best of several counts.
Milliseconds are this machine's and are printed to give them scale.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from fedtune.codecs.sparse import CODERS
from fedtune.config.compose import CONF, choices
from fedtune.core.protocol import Codec, Tensors, is_lossless
from fedtune.lowrank.algebra import name_of
from fedtune.wire.delta_coding import build_codec
from simulations.benchmarks.seeded import best

COMPEFT = "compeft"
SPREADS = {"even": 0.1, "uneven": 0.5}  # standard deviations of the logarithm of the scales


@dataclass(frozen=True)
class Size:
    layers: int = 23
    width: int = 2048
    rank: int = 16
    repeats: int = 15


QUICK = Size(layers=2, width=64, rank=4, repeats=1)


@dataclass(frozen=True)
class Line:
    """A codec and what it made of an update."""

    name: str
    codec: Codec
    values: int
    size: int  # bytes
    encode: float  # seconds
    decode: float
    copy: float
    error: float

    @property
    def bits(self) -> float:
        return 8 * self.size / self.values

    @property
    def smaller(self) -> float:
        return 2 * self.values / self.size

    @property
    def speed(self) -> float:
        """Bytes a second."""
        return 4 * self.values / (self.encode + self.decode)

    @property
    def copies(self) -> float:
        return (self.encode + self.decode) / self.copy


PAPERS = {"density": 0.05, "scale": "global"}


def codecs() -> Iterator[tuple[str, Codec]]:
    """All of conf/codec, by name; those that send few of the values with the papers' 5 % and one magnitude."""
    for name in choices("codec"):
        spec: dict[str, Any] = dict(OmegaConf.load(CONF / "codec" / f"{name}.yaml"))
        spec |= {setting: value for setting, value in PAPERS.items() if setting in spec}
        if "coder" not in spec:
            yield name, build_codec(spec, name)[0]
            continue
        for coder in CODERS:
            yield f"{name}, {coder}", build_codec({**spec, "coder": coder}, name)[0]


def made_up(size: Size, spread: float) -> Tensors:
    """The update of a LoRA of four modules a layer, 10 M values by default."""
    draw = torch.Generator().manual_seed(0)
    width = size.width
    modules = {"q": (width, width), "v": (width, width // 4), "up": (width, 4 * width), "down": (4 * width, width)}
    made = {}
    for layer in range(size.layers):
        for module, (inputs, outputs) in modules.items():
            for role, shape in (("lora_A", (size.rank, inputs)), ("lora_B", (outputs, size.rank))):
                scale = 1e-3 * math.exp(spread * torch.randn((), generator=draw).item())
                made[name_of(f"model.layers.{layer}.{module}_proj", role)] = scale * torch.randn(shape, generator=draw)
    return made


def read(folder: Path) -> Tensors:
    """What a run learnt: its adapter less the one that it began with."""
    learnt, start = (load_file(folder / place / "adapter_model.safetensors") for place in ("adapter", "start"))
    return {name: tensor.float() - start[name].float() for name, tensor in learnt.items() if tensor.is_floating_point()}


def measure(update: Tensors, repeats: int) -> list[Line]:
    """A line for every codec."""
    shapes = {name: tuple(tensor.shape) for name, tensor in update.items()}
    values = sum(tensor.numel() for tensor in update.values())
    known = dict(codecs())
    blobs = {name: codec.encode(update, 0) for name, codec in known.items()}

    def decode(name: str) -> Tensors:
        codec = known[name]
        return codec.decode(blobs[name]) if is_lossless(codec) else codec.decode(blobs[name], shapes)

    took = best(
        repeats,
        copy=lambda: {name: tensor.clone() for name, tensor in update.items()},
        **{f"encode {name}": partial(codec.encode, update, 0) for name, codec in known.items()},
        **{f"decode {name}": partial(decode, name) for name in known},
    )
    return [
        Line(
            name,
            codec,
            values,
            len(blobs[name]),
            took[f"encode {name}"],
            took[f"decode {name}"],
            took["copy"],
            apart(decode(name), update),
        )
        for name, codec in known.items()
    ]


def apart(found: Tensors, meant: Tensors) -> float:
    """||found - meant|| / ||meant||, over all tensors."""
    missed = sum(float((found[name].double() - tensor.double()).square().sum()) for name, tensor in meant.items())
    whole = sum(float(tensor.double().square().sum()) for tensor in meant.values())
    return math.sqrt(missed / whole) if missed else 0.0


def entropy(values: int, density: float) -> float:
    """Bits of independent values that are sent with this probability and sign, and of one float32."""
    sent = density * math.log2(density / 2) if density else 0.0
    left = (1 - density) * math.log2(1 - density) if density < 1 else 0.0
    return -values * (sent + left) + 32


def sizes(lines: Sequence[Line], title: str) -> Table:
    table = Table(title=title)
    for column in ("codec", "bytes", "bits a value", "bfloat16 over it"):
        table.add_column(column, justify="left" if column == "codec" else "right")
    for column in ("encode ms", "decode ms", "MB/s", "copies", "error"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(
            line.name,
            f"{line.size:,}",
            f"{line.bits:.4f}",
            f"{line.smaller:.2f}x",
            f"{line.encode * 1e3:.1f}",
            f"{line.decode * 1e3:.1f}",
            f"{line.speed / 1e6:,.0f}",
            f"{line.copies:.1f}",
            f"{line.error:.4f}",
        )
    return table


def aims(lines: Sequence[Line]) -> Table:
    """ComPEFT beside what it should do at 5 %."""
    table = Table(title="ComPEFT")
    for column in ("codec", "what", "found", "aim"):
        table.add_column(column)
    for line in lines:
        if not line.name.startswith(COMPEFT):
            continue
        codec: Any = line.codec
        over = 8 * line.size / entropy(line.values, codec.density)
        most = "1.02" if codec.coder == "golomb" else "1.005"
        table.add_row(line.name, "size over entropy", f"{over:.4f}x", f"at most {most}x")
        table.add_row(line.name, "bfloat16 over it", f"{line.smaller:.1f}x", "at least 40x")
        table.add_row(line.name, "encode + decode", f"{line.speed / 1e6:,.0f} MB/s", "at least 200 MB/s")
    return table


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--run", type=Path, metavar="DIR")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    size = QUICK if options.quick else Size()
    updates = {name: made_up(size, spread) for name, spread in SPREADS.items()}
    if options.run:
        try:
            updates[options.run.name] = read(options.run)
        except OSError as error:
            parser.error(f"--run {options.run}: {error}")
    console = Console(width=140)
    for name, update in updates.items():
        values = sum(tensor.numel() for tensor in update.values())
        lines = measure(update, size.repeats)
        console.print(sizes(lines, f"{name}: {values:,} values in {len(update)} tensors, one core"))
        console.print(aims(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
