"""fedtune doctor: what it measures, what it refuses to believe, and the profile that it writes."""

import re
import signal
import subprocess
import sys
import time

import forked
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedtune.commands.main import main
from fedtune.config.devices import read_devices
from fedtune.core.text import first_line
from fedtune.device.benchmark import (
    Step,
    _int8,
    _nf4,
    device_name,
    fault,
    fit,
    matmul_rates,
    quantized,
    training_steps,
    usual_seconds,
)
from fedtune.device.memory import MemoryFound, host_memory

CPU = torch.device("cpu")
TOKENS = (32, 128, 1024)


def steps(flop_per_s, read_bytes_per_s, noise=(1, 1, 1)):
    """What a device of exactly these rates would take for 14 M weights of 2 bytes, times some noise."""
    work = [(4 * 14e6 * tokens, 2 * 28e6) for tokens in TOKENS]
    return [
        Step(tokens, flop, read, (flop / flop_per_s + read / read_bytes_per_s) * off)
        for tokens, (flop, read), off in zip(TOKENS, work, noise, strict=True)
    ]


@given(st.floats(1e9, 1e15), st.floats(0.02, 50))
def test_the_fit_finds_what_the_steps_were_made_of(flop_per_s, ratio):
    """Reading takes `ratio` times as long as computing 128 tokens: read / R = ratio x flop / F."""
    read_bytes_per_s = 2 * 28e6 / (ratio * 4 * 14e6 * 128 / flop_per_s)
    found = fit(steps(flop_per_s, read_bytes_per_s))
    assert found.flop_per_s == pytest.approx(flop_per_s, rel=1e-4)
    assert found.read_bytes_per_s == pytest.approx(read_bytes_per_s, rel=1e-4)


noises = st.tuples(*[st.floats(0.95, 1.05)] * 3)


@given(st.floats(1e9, 1e15), st.floats(0.02, 50), noises)
def test_the_fit_explains_noisy_steps(flop_per_s, ratio, noise):
    """Steps that are off by at most 5% each are explained within 10%: least squares over rates that aren't negative are
    no further off than the truth, which is off by at most sqrt(3) x 0.05 / 0.95 = 0.091 in all."""
    given_steps = steps(flop_per_s, 2 * 28e6 / (ratio * 4 * 14e6 * 128 / flop_per_s), noise)
    found = fit(given_steps)
    for step in given_steps:
        assert found.seconds(step.flop, step.read) == pytest.approx(step.seconds, rel=0.1)


@given(st.lists(st.tuples(*[st.floats(1e-6, 1e3)] * 3), min_size=1, max_size=5))
def test_whatever_the_clock_said_both_rates_are_positive(made):
    found = fit([Step(1, flop * 1e12, read * 1e9, seconds) for flop, read, seconds in made])
    assert 0 < found.flop_per_s < float("inf")
    assert found.read_bytes_per_s > 0


def test_steps_without_a_wait_for_weights():
    """Seconds in proportion to the work: all of it is computing. And growing faster than it: the same."""
    assert fit(steps(1e12, float("inf"))).flop_per_s == pytest.approx(1e12)
    faster = fit(steps(1e12, float("inf"), noise=(0.5, 1, 2)))
    assert faster.read_bytes_per_s == float("inf")


def test_steps_that_take_no_longer_for_more_tokens():
    """0.1 s, 0.1 s and 0.09 s: the device never had enough to do, so F is at least what the largest reached,
    4 x 14e6 x 1024 / 0.09, and R is the least squares of what is left. By pencil, 1 / s = (10, 10, 11.11), of which
    (0.972, 0.8875, 0) is left: read / R = 18.59 / 323.5 = 0.0575 s; the first step also computes 0.0028 s."""
    work = steps(1, 1)
    found = fit([Step(s.tokens, s.flop, s.read, t) for s, t in zip(work, (0.1, 0.1, 0.09), strict=True)])
    assert found.flop_per_s == pytest.approx(4 * 14e6 * 1024 / 0.09)
    assert found.seconds(work[0].flop, work[0].read) == pytest.approx(0.0603, rel=1e-3)


def weight_and_inputs():
    """A weight (96, 64) like a model's, and 8 inputs."""
    made = torch.Generator().manual_seed(0)
    return torch.randn(96, 64, generator=made) * 0.02, torch.randn(8, 64, generator=made)


class Odd(nn.Linear):
    """A linear layer whose backward pass is as a kernel without one may leave it."""

    def __init__(self, weight, how):
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.how = how

    def forward(self, inputs):
        out = super().forward(inputs.detach())
        if self.how == "zero":
            return out + 0 * super().forward(inputs)
        if self.how == "twice":
            return 2 * super().forward(inputs) - out
        if self.how == "wrong":
            return out * 1.5 + 0 * super().forward(inputs)
        if self.how == "nan":
            return out + inputs.sum() * (inputs.sum() - inputs.sum().detach()).sqrt()
        return out if self.how == "none" else super().forward(inputs)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("fine", ""),
        ("zero", "the gradient that reaches the layer's input is zero"),
        ("none", "no gradient reaches the layer's input"),
        ("twice", "the gradient that reaches the layer's input is 100% off"),
        ("wrong", "what comes out is 50% off"),
        ("nan", "off"),
    ],
)
def test_a_layer_that_only_seems_to_train_is_found_out(how, said):
    weight, inputs = weight_and_inputs()
    found = fault(Odd(weight, how), weight, inputs)
    assert found == said or (how == "nan" and said in found)


def test_a_layer_that_holds_another_weight_is_found_out():
    weight, inputs = weight_and_inputs()
    assert fault(Odd(weight * 1.5, "fine"), weight, inputs) == "the weight that it holds is 50% off"


def test_bitsandbytes_repacked_kernel_counts_as_not_running():
    """With the repacking left on, a first evaluation leaves a kernel that has no backward pass."""
    from bitsandbytes.nn.modules import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("only CPUs with AVX512-BF16 repack")
    plain = nn.Linear(64, 96, bias=False)
    layer = _nf4(plain).to(CPU).eval().requires_grad_(False)
    inputs = torch.randn(8, 64, dtype=torch.bfloat16)
    assert fault(layer, plain.weight.detach(), inputs) == ""
    layer.support_avx512bf16_for_cpu = True
    try:
        said = fault(layer, plain.weight.detach(), inputs)
    except Exception as error:  # which the doctor reports as well
        said = first_line(error)
    assert said


@pytest.mark.parametrize("make", [_nf4, _int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_layers_train(make, dtype):
    plain = nn.Linear(192, 320, bias=False)
    layer = make(plain).to(CPU).eval().requires_grad_(False)
    assert fault(layer, plain.weight.detach(), torch.randn(16, 192, dtype=dtype)) == ""


@pytest.mark.slow
def test_a_kernel_that_raises_is_a_reason(monkeypatch):
    """bitsandbytes without its NF4 layer: that is said of it, and int8 is tried all the same."""
    import bitsandbytes

    monkeypatch.delattr(bitsandbytes.nn, "Linear4bit")
    nf4, int8 = quantized(CPU, torch.float32, 0.05)
    assert "Linear4bit" in nf4.reason
    assert (int8.reason, int8.times > 0) == ("", True)


@pytest.mark.slow
def test_matmul_rates_are_rates():
    """By another clock, 2 x 512^3 operations of a product of 512 x 512; a busy machine may need a second look."""
    one, ratios = torch.randn(512, 512), []
    while not ratios or (len(ratios) < 20 and not 0.1 < ratios[-1] < 20):
        rates = {found.dtype: found for found in matmul_rates(CPU, 0.1)}
        seconds = usual_seconds(lambda: one @ one, CPU, 0.1)
        ratios.append(rates[torch.float32].flop_per_s / (2 * 512**3 / seconds))
    assert rates.keys() == {torch.float32, torch.bfloat16, torch.float16}
    assert 0.1 < ratios[-1] < 20, ratios


@pytest.mark.slow
def test_training_steps_count_their_work():
    """A block's layers: 576 x (576 + 2 x 192 + 576) + 3 x 576 x 1536 = 3,538,944; of 4 blocks and 32 tokens
    4 x 4 x 3,538,944 x 32, and attention's 12 x 32 x 32 x 576 x 4; two passes read 4 bytes each."""
    found = training_steps(CPU, torch.float32, 0.05)
    assert [step.tokens for step in found] == list(TOKENS)
    assert found[0].flop == 4 * 4 * 3_538_944 * 32 + 12 * 32 * 32 * 576 * 4
    assert found[0].read == pytest.approx(2 * 4 * 4 * 3_538_944, rel=0.001)  # besides, norms
    assert 0 < found[0].seconds < found[2].seconds


def test_the_device_has_a_label():
    name = device_name(CPU)
    assert 0 < len(name) <= 64
    assert name.isprintable()


GIB = 2**30


def system(tmp_path, **files):
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


MEMINFO = (
    "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nHugePages_Total:       0\n"
)
MOUNT_2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
MOUNT_1 = "36 25 0:31 {top} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"


def test_memory_of_a_plain_machine(tmp_path):
    root = system(tmp_path, proc__meminfo=MEMINFO)
    assert host_memory(root) == MemoryFound(16 * GIB, 8 * GIB, "the machine's")


def test_memory_of_a_container_of_version_2(tmp_path):
    """A limit of 4 GiB, 3 in use of which 1 is files that can go: 2 free. The group above allows 6."""
    root = system(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__mountinfo=MOUNT_2,
        proc__self__cgroup="0::/pod/inner\n",
        sys__fs__cgroup__pod__inner__memory_dot_max=f"{4 * GIB}\n",
        sys__fs__cgroup__pod__inner__memory_dot_current=f"{3 * GIB}\n",
        sys__fs__cgroup__pod__inner__memory_dot_stat=f"anon 5\ninactive_file {GIB}\n",
        sys__fs__cgroup__pod__memory_dot_max=f"{6 * GIB}\n",
        sys__fs__cgroup__pod__memory_dot_current=f"{3 * GIB}\n",
    )
    assert host_memory(root) == MemoryFound(4 * GIB, 2 * GIB, "the control group /sys/fs/cgroup/pod/inner")


def test_memory_of_a_container_of_version_1(tmp_path):
    """The host calls the group /docker/x; the container sees it as the top of the hierarchy."""
    root = system(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__mountinfo=MOUNT_1.format(top="/docker/x"),
        proc__self__cgroup="4:memory:/docker/x\n1:cpu:/\n",
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes=f"{2 * GIB}\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes=f"{GIB}\n",
        sys__fs__cgroup__memory__memory_dot_stat="inactive_file 7\ntotal_inactive_file 0\n",
    )
    assert host_memory(root) == MemoryFound(2 * GIB, GIB, "the control group /sys/fs/cgroup/memory")


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096), "", "rubbish", str(64 * GIB)])
def test_a_group_without_a_limit_limits_nothing(tmp_path, limit):
    root = system(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__self__mountinfo=MOUNT_2 + "a line that is none\n",
        proc__self__cgroup="0::/\nrubbish\n",
        sys__fs__cgroup__memory_dot_max=limit,
        sys__fs__cgroup__memory_dot_current="5",
    )
    assert host_memory(root) == MemoryFound(16 * GIB, 8 * GIB, "the machine's")


def test_memory_where_there_is_no_proc(tmp_path):
    found = host_memory(tmp_path)
    assert found is not None
    assert 0 < found.free <= found.total


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--device", "tpu"], "--device tpu is not known: expected auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99 can't be used here"),
        (["--server", "nowhere"], "--server nowhere: expected HOST:PORT"),
        (["--server", "127.0.0.1:1", "--device", "cpu"], "nobody answers at 127.0.0.1:1"),
        (["--server", "127.0.0.1:1", "--seconds", "99"], "--seconds 99: expected more than 0 and at most 30"),
        (["--listen", "here"], "--listen here: expected PORT or HOST:PORT"),
        (["--listen", "203.0.113.7:0"], "--listen 203.0.113.7:0 can't be had"),
        (["--threads", "-1"], "--threads -1: expected a number"),
    ],
)
def test_what_the_doctor_cannot_do_is_one_message(capsys, monkeypatch, tmp_path, words, part):
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    assert main(["doctor", *words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fedtune: ")
    assert said.count("\n") == 1
    assert part in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_doctor_measures_and_writes_a_profile(fedtune, tmp_path):
    listener = forked.Popen(
        [sys.executable, "-m", "fedtune", "doctor", "--listen", "0"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        server = re.search(r"127\.0\.0\.1:\d+", listener.stdout.readline())[0]
        begun = time.monotonic()
        ended = fedtune(
            "doctor", "--device", "cpu", "--threads", "1", "--server", server, "--seconds", "0.5", "--out", "new/my.csv"
        )
        assert ended.returncode == 0, ended.stderr
        assert time.monotonic() - begun < 100
        listener.send_signal(signal.SIGINT)
        rest, _ = listener.communicate(timeout=20)
    finally:
        listener.kill()
    assert listener.returncode == 0
    assert "down: sent" in rest
    assert "stopped" in rest
    for word in ("float32", "bfloat16", "float16", "tokens", "4-bit (NF4): works", "int8: works", "B/s down", "wrote"):
        assert word in ended.stdout
    assert "\x1b" not in ended.stdout
    assert "kernels" not in ended.stderr
    header = "device,memory_bytes,flop_per_s,read_bytes_per_s,up_bytes_per_s,down_bytes_per_s,backprop,availability"
    assert (tmp_path / "new" / "my.csv").read_text().splitlines()[0] == header
    (able,) = read_devices(tmp_path / "new" / "my.csv")
    assert able.device == device_name(CPU)
    assert 1e8 < able.memory_bytes < 1e14
    assert 1e8 < able.flop_per_s < 1e14
    assert able.read_bytes_per_s > 1e6
    assert 1e6 < able.up_bytes_per_s < float("inf")
    assert 1e6 < able.down_bytes_per_s < float("inf")
    assert (able.backprop, able.availability) == (True, 1.0)
