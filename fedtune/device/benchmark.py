"""What this device can do, measured: `fedtune doctor`.

How long a training step takes is modelled as `flop / F + read / R`. F is what training sustains when there are many
tokens; R is how fast a step gets through the weights, which is what it waits for when there are few. Both come from the
steps of a small Llama, as a client would take them with LoRA: frozen weights, forward and backward, gradients to the
inputs alone. What is multiplied is drawn from torch's own generator: only the clock is read.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.core.errors import ModelError
from fedtune.core.text import first_line
from fedtune.models.base import quiet
from fedtune.models.requantize import dequantized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYERS = 4
CLOSE = 0.05  # of a tensor's norm: what 16-bit sums and int8 inputs may be off
COARSE = 0.2  # of a weight's norm: what four bits lose of a normal weight is 0.09


@dataclass(frozen=True)
class Shape:
    """What the measured model is like. A GPU gets a wider one, since a narrow one keeps it waiting for its host."""

    width: int
    inner: int
    batches: tuple[tuple[int, int], ...]  # examples and their length


SHAPES = {
    "cpu": Shape(576, 1536, ((1, 32), (1, 128), (4, 256))),
    "cuda": Shape(2304, 6144, ((1, 32), (2, 256), (16, 256))),
}


@dataclass(frozen=True)
class Matmul:
    """What multiplying two square matrices reached: the rate in FLOP/s, or why there is none."""

    dtype: torch.dtype
    flop_per_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Step:
    """A training step: its tokens, its work, the bytes of weights that it reads, and how long it took."""

    tokens: int
    flop: float
    read: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Speeds in seconds = flop / flop_per_s + read / read_bytes_per_s; inf: no part of the time was of that kind."""

    flop_per_s: float
    read_bytes_per_s: float

    def seconds(self, flop: float, read: float) -> float:
        return flop / self.flop_per_s + read / self.read_bytes_per_s


@dataclass(frozen=True)
class Quantized:
    """Whether training through a quantized layer works here.

    Attributes:
        times: how much longer than through a layer of the plain dtype.
        reason: why it doesn't work; "" if it does.
    """

    name: str
    times: float = 0.0
    reason: str = ""


def device_name(device: torch.device) -> str:
    """The GPU's, board's or processor's name, as a label for a capability."""
    import platform

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _board() or _processor() or platform.processor() or platform.machine() or "device"
    shown = "".join(letter if letter.isprintable() else " " for letter in name)
    return " ".join(shown.split())[:64]


def matmul_rates(device: torch.device, seconds: float = 0.5) -> Iterator[Matmul]:
    """Rates 2 n^3 / best time of n x n products, one dtype after another.

    Args:
        seconds: about how long each takes.
    """
    largest = 8192 if device.type == "cuda" else 2048
    for dtype in DTYPES:
        try:
            size = 128
            while (taken := _square(size, dtype, device, 0)) < seconds / 10 and size < largest:
                size *= 2
            best = min(taken, _square(size, dtype, device, seconds))
            yield Matmul(dtype, 2 * size**3 / best)
        except (RuntimeError, NotImplementedError) as error:
            yield Matmul(dtype, reason=first_line(error))


def training_steps(device: torch.device, dtype: torch.dtype, seconds: float = 1.2) -> list[Step]:
    """Steps of a small Llama with few and with many tokens.

    Args:
        dtype: of its weights, as a run would choose it.
        seconds: about how long each size takes.

    Raises:
        ModelError: if the device can't take such a step.
    """
    shape = SHAPES["cuda" if device.type == "cuda" else "cpu"]
    try:
        model = _llama(shape, device, dtype)
        held = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() > 1)
        read = 2.0 * sum(p.numel() * p.element_size() for p in model.layers.parameters())
        steps = []
        for examples, length in shape.batches:
            tokens = examples * length
            inputs = torch.randn(examples, length, shape.width, device=device, dtype=dtype, requires_grad=True)
            taken = usual_seconds(lambda: _step(model, inputs), device, seconds)  # noqa: B023
            flop = 4.0 * held * tokens + 12.0 * tokens * length * shape.width * LAYERS
            steps.append(Step(tokens, flop, read, taken))
    except RuntimeError as error:  # too little memory is one too
        raise ModelError(f"a training step doesn't run on {device} in {short(dtype)}: {first_line(error)}") from error
    return steps


def fit(steps: Sequence[Step]) -> Fit:
    """F and R with the least squares of relative error over `steps`, both above zero.

    Where the steps tell of no time for reading, R is inf. Where they tell of none for computing, which is when even the
    largest step waited for something else, F is what that one reached at least, and R explains the rest.
    """
    work = [step.flop / step.seconds for step in steps]
    reads = [step.read / step.seconds for step in steps]
    ww, rr = sum(w * w for w in work), sum(r * r for r in reads)
    wr, w1, r1 = sum(w * r for w, r in zip(work, reads, strict=True)), sum(work), sum(reads)
    determinant = ww * rr - wr * wr
    if determinant > 1e-9 * ww * rr:
        per_flop, per_byte = (w1 * rr - r1 * wr) / determinant, (r1 * ww - w1 * wr) / determinant
        if per_flop > 0 and per_byte > 0:
            return Fit(1 / per_flop, 1 / per_byte)
        if per_flop <= 0:
            fastest = max(work)
            rest = sum(r * (1 - w / fastest) for w, r in zip(work, reads, strict=True))
            return Fit(fastest, rr / rest if rest > 0 else float("inf"))
    return Fit(ww / w1, float("inf"))


def quantized(device: torch.device, dtype: torch.dtype, seconds: float = 0.7) -> Iterator[Quantized]:
    """A training step through one layer of bitsandbytes, as a run holds it: NF4, then int8.

    Args:
        dtype: that the base computes in.
        seconds: about how long each takes.
    """
    quiet()  # before bitsandbytes is imported, which complains
    for name, make in (("4-bit (NF4)", _nf4), ("int8", _int8)):
        try:
            yield _quantized(name, make, device, dtype, seconds)
        except Exception as error:  # whatever a kernel does, a person is to know that it doesn't work
            yield Quantized(name, reason=first_line(error))


def fault(layer: nn.Module, weight: Tensor, inputs: Tensor) -> str:
    """What is wrong with a training step through a frozen `layer` that should compute with about this weight; "" if
    nothing is: what comes out, and the gradient that reaches the inputs, are those of the weight that the layer holds.

    Args:
        weight: (out, in), what the layer was made from.
        inputs: (tokens, in).
    """
    asked = inputs.detach().clone().requires_grad_()
    with torch.no_grad():
        layer(inputs)  # a run evaluates before it trains; some kernels change their layer then
    out = layer(asked)
    held = dequantized(layer).float()
    if (off := _off(held, weight.float())) > COARSE:
        return f"the weight that it holds is {off:.0%} off"
    if (off := _off(out.float(), inputs.detach().float() @ held.T)) > CLOSE:
        return f"what comes out is {off:.0%} off"
    if not out.requires_grad:
        return "no gradient reaches the layer's input"
    sent = torch.randn_like(out)
    out.backward(sent)
    if asked.grad is None:
        return "no gradient reaches the layer's input"
    if not asked.grad.any():
        return "the gradient that reaches the layer's input is zero"
    off = _off(asked.grad.float(), sent.float() @ held)
    return f"the gradient that reaches the layer's input is {off:.0%} off" if off > CLOSE else ""


def usual_seconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """What a call takes when nothing disturbs it: the lower quartile of as many as fit into `seconds`.

    The first call doesn't count, and there are three more, unless these take twice the time.
    """
    _timed(work, device)
    begun, taken = time.perf_counter(), [_timed(work, device)]
    while time.perf_counter() - begun < (seconds if len(taken) >= 3 else 2 * seconds):
        taken.append(_timed(work, device))
    return sorted(taken)[len(taken) // 4]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantized(
    name: str, make: Callable[[nn.Linear], nn.Module], device: torch.device, dtype: torch.dtype, seconds: float
) -> Quantized:
    shape = SHAPES["cuda" if device.type == "cuda" else "cpu"]
    plain = nn.Linear(shape.width, shape.inner, bias=False)
    nn.init.normal_(plain.weight, std=0.02)
    layer = make(plain).to(device).eval().requires_grad_(False)
    weight = plain.weight.detach().to(device)
    plain = plain.to(device, dtype).eval().requires_grad_(False)
    inputs = torch.randn(128, shape.width, device=device, dtype=dtype)
    inputs[:, ::100] *= 8  # a few features of a language model are far larger than the rest; int8 takes them apart
    if reason := fault(layer, weight, inputs):
        return Quantized(name, reason=reason)
    asked = inputs.requires_grad_()
    of_plain = usual_seconds(lambda: _step(plain, asked), device, seconds / 2)
    return Quantized(name, usual_seconds(lambda: _step(layer, asked), device, seconds / 2) / of_plain)


def _nf4(plain: nn.Linear) -> nn.Module:
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    layer = layers.Linear4bit(
        plain.in_features, plain.out_features, bias=False, quant_type="nf4", compress_statistics=True
    )
    layer.weight.data = plain.weight.data.clone()
    layer.support_avx512bf16_for_cpu = False  # as fedtune/models/base.py has it
    made: nn.Module = layer
    return made


def _int8(plain: nn.Linear) -> nn.Module:
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    layer = layers.Linear8bitLt(
        plain.in_features, plain.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )
    layer.weight.data = plain.weight.data.clone()
    made: nn.Module = layer
    return made


def _llama(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=LAYERS,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 192,
        max_position_embeddings=1024,
        use_cache=False,
    )
    quiet()
    with torch.random.fork_rng(devices=[]):
        model = LlamaModel(config)
    return model.to(device, dtype).eval().requires_grad_(False)


def _step(model: Any, inputs: Tensor) -> None:
    """Forward and backward to the inputs, weights frozen."""
    inputs.grad = None
    out = model(inputs) if isinstance(model, nn.Linear) else model(inputs_embeds=inputs).last_hidden_state
    out.backward(out.detach())


def _square(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """The best time of a product of two square matrices."""
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    _timed(lambda: torch.mm(one, other, out=out), device)
    begun, best = time.perf_counter(), float("inf")
    while best == float("inf") or time.perf_counter() - begun < seconds:
        best = min(best, _timed(lambda: torch.mm(one, other, out=out), device))
    return best


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device has done the work, and not only taken it on."""
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - begun, 1e-9)


def _off(found: Tensor, expected: Tensor) -> float:
    """Relative distance; inf where a number is none."""
    distance = float((found - expected).detach().norm() / expected.norm())
    return distance if distance == distance else float("inf")


def _board() -> str:
    try:
        return Path("/proc/device-tree/model").read_bytes().decode(errors="replace").strip("\0 ")
    except OSError:
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace", encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
