"""Real devices: what their data sheets say, and what of it a client that trains can count on.

A data sheet's numbers are limits. Training keeps a share of the peak busy (`efficiency`), and gets a share of the
memory (`usable`), since a system and its other programs have the rest. Both shares are assumptions and are named so;
`source` says of each peak whether it is published or computed from what is. docs/devices.md has the table.

No torch here: the schema asks for the names.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.core.checks import nearest
from fedtune.core.errors import ConfigError
from fedtune.core.files import write_atomically

if TYPE_CHECKING:
    from fedtune.core.protocol import DeviceProfile

GIB = 2**30  # data sheets write GB and mean this, of memory

# Shares of the memory that training may take: assumptions, not of any data sheet
PHONE, BOARD, LAPTOP, GPU = 0.3, 0.75, 0.6, 0.95

# Worldwide medians of Ookla's Speedtest Global Index, first quarter of 2023, in bytes per second: up, down
MOBILE, FIXED = (10.4e6 / 8, 41.5e6 / 8), (34.9e6 / 8, 79.0e6 / 8)
ON_MOBILE = "mobile: Ookla's Speedtest Global Index, Q1 2023, worldwide median: 10.4 Mbit/s up, 41.5 down"
ON_FIXED = "fixed broadband: the same index, Q1 2023, worldwide median: 34.9 Mbit/s up, 79.0 down"


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        name: what `population.devices` calls it.
        title: its name and memory, and the precision that its peak is of.
        memory_bytes: all its memory, as the data sheet has it.
        peak_flop_per_s: dense floating-point operations per second of the precision that training would use.
        peak_read_bytes_per_s: what its memory delivers, in bytes per second.
        up_bytes_per_s: what its link sends, in bytes per second.
        down_bytes_per_s: what its link receives, in bytes per second.
        source: where memory and peaks come from, and how a peak was computed if it isn't published.
        network: where the link's rates come from.
        usable: share of the memory that training may take.
    """

    name: str
    title: str
    memory_bytes: float
    peak_flop_per_s: float
    peak_read_bytes_per_s: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    source: str
    network: str
    usable: float = 1.0

    def capability(self, efficiency: float) -> "DeviceProfile":
        """The device as a client.

        Args:
            efficiency: share of both peaks that training sustains, above 0 up to 1.
        """
        from fedtune.core.protocol import DeviceProfile  # which imports torch

        return DeviceProfile(
            device=self.name,
            memory_bytes=self.memory_bytes * self.usable,
            flop_per_s=self.peak_flop_per_s * efficiency,
            read_bytes_per_s=self.peak_read_bytes_per_s * efficiency,
            up_bytes_per_s=self.up_bytes_per_s,
            down_bytes_per_s=self.down_bytes_per_s,
        )


_PI = (
    "Raspberry Pi 5 product brief: 4 Cortex-A76 at 2.4 GHz. Peak computed: 4 cores x 2.4 GHz x 2 NEON pipes "
    "(Arm's Cortex-A76 Software Optimization Guide) x 4 lanes x 2 = 153.6 GFLOP/s; float32, as the A76 has no bfloat16"
    ". Memory computed: LPDDR4X-4267 by the brief, 32 bits wide by Raspberry Pi's page on BCM2712: 4.267 GT/s x 4 "
    "bytes = 17.07 GB/s"
)
_ORIN = "a dense FP16 operation being a quarter of a sparse INT8 one on Ampere's tensor cores"

CATALOGUE: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "galaxy_a55",
            "Samsung Galaxy A55 5G, 8 GB; CPU, float16",
            8 * GIB,
            352e9,
            25.6e9,
            *MOBILE,
            "Samsung's pages on the phone and on Exynos 1480: 4 Cortex-A78 at 2.75 GHz. Peak computed: 4 cores x "
            "2.75 GHz x 2 NEON pipes (Arm's Cortex-A78 Software Optimization Guide) x 8 lanes x 2 = 352 GFLOP/s; the 4 "
            "small cores and the GPU, whose rate is not published, are not counted. Memory computed: LPDDR5 by "
            "Samsung's page, 6.4 GT/s (JEDEC JESD209-5) x 4 bytes = 25.6 GB/s, its width of 32 bits being assumed",
            ON_MOBILE,
            PHONE,
        ),
        Device(
            "galaxy_s24_ultra",
            "Samsung Galaxy S24 Ultra, 12 GB; CPU, float16",
            12 * GIB,
            710.4e9,
            76.8e9,
            *MOBILE,
            "Samsung's page on the phone, and Qualcomm's product brief of Snapdragon 8 Gen 3: 1 Cortex-X4 at 3.3 GHz, "
            "3 Cortex-A720 at 3.2 and 2 at 3.0 (Samsung's own edition is clocked a little higher). Peak computed: "
            "(3.3 GHz x 4 NEON pipes + 3 x 3.2 x 2 + 2 x 3.0 x 2) (pipes: Arm's Software Optimization Guides) x 8 "
            "lanes x 2 = 710.4 GFLOP/s; the small cores and the GPU, whose rate is not published, are not counted. "
            "Memory computed: LPDDR5X at 4.8 GHz by the brief, 9.6 GT/s x 8 bytes = 76.8 GB/s, its width of 64 bits "
            "being assumed",
            ON_MOBILE,
            PHONE,
        ),
        Device(
            "raspberry_pi_5_4gb",
            "Raspberry Pi 5, 4 GB; CPU, float32",
            4 * GIB,
            153.6e9,
            17.068e9,
            *FIXED,
            _PI,
            ON_FIXED,
            BOARD,
        ),
        Device(
            "raspberry_pi_5",
            "Raspberry Pi 5, 8 GB; CPU, float32",
            8 * GIB,
            153.6e9,
            17.068e9,
            *FIXED,
            _PI,
            ON_FIXED,
            BOARD,
        ),
        Device(
            "jetson_orin_nano",
            "NVIDIA Jetson Orin Nano 8GB (Super); GPU, FP16",
            8 * GIB,
            16.75e12,
            102e9,
            *FIXED,
            "NVIDIA's data sheet of the Jetson Orin Nano Super Developer Kit: 67 sparse INT8 TOPS. Peak computed: "
            f"67 / 4 = 16.75 TFLOP/s, {_ORIN}. Memory: 102 GB/s, published there",
            ON_FIXED,
            BOARD,
        ),
        Device(
            "jetson_agx_orin",
            "NVIDIA Jetson AGX Orin 64GB; GPU, FP16",
            64 * GIB,
            42.5e12,
            204.8e9,
            *FIXED,
            "NVIDIA's Jetson AGX Orin Technical Brief: 170 sparse INT8 TOPS of the GPU alone. Peak computed: "
            f"170 / 4 = 42.5 TFLOP/s, {_ORIN}. Memory: 204.8 GB/s, published there",
            ON_FIXED,
            BOARD,
        ),
        Device(
            "macbook_air_m2",
            "Apple MacBook Air (M2, 10-core GPU), 8 GB; GPU, float32",
            8 * GIB,
            3.6e12,
            100e9,
            *FIXED,
            "Apple's presentation of M2, June 2022: 3.6 teraflops of the 10-core GPU, published without a precision; "
            "taken as float32. Memory: 100 GB/s, published there",
            ON_FIXED,
            LAPTOP,
        ),
        Device(
            "rtx_4090",
            "NVIDIA GeForce RTX 4090, 24 GB; BF16",
            24 * GIB,
            165.2e12,
            1008e9,
            *FIXED,
            "NVIDIA Ada GPU Architecture white paper, appendix A: 165.2 TFLOPS of dense BF16 on tensor cores, summed "
            "in float32; published, as is the memory's 1008 GB/s",
            ON_FIXED,
            GPU,
        ),
        Device(
            "a100_80gb",
            "NVIDIA A100, 80 GB; BF16",
            80 * GIB,
            312e12,
            2039e9,
            1.25e9,
            1.25e9,
            "NVIDIA A100 Tensor Core GPU data sheet: 312 TFLOPS of dense BF16; published, as is the memory's 2039 GB/s "
            "(of the SXM form)",
            "data centre: the line rate of 10 Gbit/s Ethernet (IEEE 802.3ae), assumed; the data sheet names no network",
            GPU,
        ),
    )
}


def apportion(shares: Mapping[str, float], clients: int) -> dict[str, int]:
    """How many of `clients` each name gets, by largest remainder; of equal ones the first by name.

    Args:
        shares: above zero. They need not sum to one: only their ratios count.
    """
    exact = {name: Fraction(str(shares[name])) for name in sorted(shares)}  # 0.1 is a tenth, so that ties are ties
    whole = sum(exact.values())
    due = {name: share * clients / whole for name, share in exact.items()}
    counts = {name: math.floor(quota) for name, quota in due.items()}
    left = clients - sum(counts.values())
    for name in sorted(due, key=lambda name: counts[name] - due[name])[:left]:
        counts[name] += 1
    return counts


REQUIRED = ("device", "memory_bytes", "flop_per_s", "up_bytes_per_s", "down_bytes_per_s")
OPTIONAL = ("read_bytes_per_s", "backprop", "availability", "max_rank")
MAX_FILE_BYTES = 10_000_000
_LOOK = "docs/devices.md shows one"


def read_devices(path: str | Path) -> "list[DeviceProfile]":
    """The devices of a CSV, a row each, under a header: `REQUIRED` in any order, and of `OPTIONAL` what one likes.

    An empty cell is the default: unlimited, or of a device that is always there, can take gradients and has no name.

    Raises:
        ConfigError: naming file, line and column of what is wrong.
    """
    path = Path(path).expanduser()
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        _check_header(path, header)
        found = [_device(f"{path}, line {rows.line_num}", header, row) for row in rows if row]
    except csv.Error as error:
        raise ConfigError(f"{path}, line {rows.line_num}: no CSV: {error}; {_LOOK}") from error
    if not found:
        raise ConfigError(f"{path} has a header and no device: expected a row each; {_LOOK}")
    return found


def write_devices(path: str | Path, devices: "Sequence[DeviceProfile]") -> None:
    """Write what `read_devices` reads, whole or not at all. `max_rank` is a column only where it limits somebody.

    Raises:
        OSError: if it can't be written; what was there is then untouched.
    """
    path = Path(path).expanduser()
    limited = any(device.max_rank != math.inf for device in devices)
    names = (*REQUIRED[:3], OPTIONAL[0], *REQUIRED[3:], *OPTIONAL[1:])  # what it computes, then its link
    header = [name for name in names if limited or name != "max_rank"]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(getattr(device, name)) for name in header] for device in devices)
    write_atomically(path, stream.getvalue().encode())


def _text(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"{path} is no file: expected a CSV of devices; {_LOOK}")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(
                f"{path} has more than {MAX_FILE_BYTES:,} bytes: expected a CSV with a line a device; they are taken "
                "in turn, so leave out what repeats"
            )
        return content.decode("utf-8-sig")  # spreadsheets put a mark before the text
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8 (byte {error.start}): save the table as CSV UTF-8") from error


def _check_header(path: Path, header: list[str]) -> None:
    known = [*REQUIRED, *OPTIONAL]
    expected = f"expected {','.join(REQUIRED)} and, if wanted, {','.join(OPTIONAL)}"
    if missing := [name for name in REQUIRED if name not in header]:
        raise ConfigError(f"{path}, line 1: column {', '.join(missing)} is missing: {expected}, divided by commas")
    for name in header:
        if name not in known:
            raise ConfigError(f"{path}, line 1: column '{name[:80]}' is not known: {expected}{nearest(name, known)}")
    if twice := [name for name in known if header.count(name) > 1]:
        raise ConfigError(f"{path}, line 1: column {', '.join(twice)} stands there twice: {expected}")


def _device(where: str, header: list[str], row: list[str]) -> "DeviceProfile":
    from fedtune.core.protocol import DeviceProfile  # which imports torch

    if len(row) != len(header):
        raise ConfigError(f"{where}: expected {len(header)} cells, as the header has, got {len(row)}")
    values: dict[str, Any] = {
        name: _value(f"{where}, column {name}", name, cell)
        for name, cell in zip(header, row, strict=True)
        if cell.strip() or name == "device"
    }
    try:
        return DeviceProfile(**values)
    except ValueError as error:  # it names the column
        raise ConfigError(f"{where}: {error}; an empty cell is unlimited") from error


def _value(where: str, name: str, cell: str) -> object:
    if name == "device":
        return cell
    if name == "backprop":
        if (word := cell.strip().lower()) not in ("true", "false"):
            raise ConfigError(f"{where}: expected true, false or nothing, got '{cell[:80]}'")
        return word == "true"
    try:
        return float(cell)
    except ValueError:
        raise ConfigError(
            f"{where}: expected a number above 0, as in 8e9, or nothing for unlimited, got '{cell[:80]}'"
        ) from None


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value == math.inf else str(value)
