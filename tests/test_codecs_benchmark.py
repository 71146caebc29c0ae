"""The benchmark of codecs runs from end to end; its figures are for a quiet machine."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedtune.codecs.compeft import ComPEFT
from fedtune.config.compose import choices
from simulations.benchmarks import codecs


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Those of the other tests stay."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


@pytest.mark.slow
def test_the_quick_form_prints_every_codec(capsys, tmp_path):
    folder = tmp_path / "my-run"
    learnt = torch.randn(50, 3)
    for place, tensor in (("start", learnt), ("adapter", learnt.bfloat16())):
        (folder / place).mkdir(parents=True)
        save_file({"w": tensor}, folder / place / "adapter_model.safetensors")
    assert torch.equal(codecs.read(folder)["w"], learnt.bfloat16().float() - learnt)
    assert codecs.main(["--quick", "--run", str(folder)]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in choices("codec"))
    assert "even: 6,784 values in 16 tensors" in told
    assert "my-run: 150 values in 1 tensors" in told
    for what in ("compeft, golomb", "compeft, range", "size over entropy", "at most 1.005x", "at least 200 MB/s"):
        assert what in told


def test_a_folder_that_is_no_run_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        codecs.main(["--quick", "--run", str(tmp_path)])
    assert "adapter_model.safetensors" in capsys.readouterr().err


def test_figures_by_hand():
    line = codecs.Line("a", ComPEFT(), values=1000, size=50, encode=0.2, decode=0.3, copy=0.1, error=0)
    assert line.bits == 0.4
    assert line.smaller == 40
    assert line.speed == 8000
    assert line.copies == pytest.approx(5)
    assert codecs.entropy(1000, 0.5) == 1000 * (0.5 + 0.5 * 2) + 32
    assert codecs.entropy(1000, 1) == 1000 + 32
    meant = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}
    assert codecs.apart(meant, meant) == 0
    assert codecs.apart({"a": torch.zeros(1), "b": torch.tensor([[4.0]])}, meant) == 0.6
    assert codecs.apart({"a": torch.zeros(1)}, {"a": torch.zeros(1)}) == 0


def test_ten_million_values_with_scales_of_their_own():
    size = codecs.Size()
    inputs_and_outputs = size.width * (2 + 1.25 + 5 + 5)
    assert size.layers * size.rank * inputs_and_outputs == pytest.approx(10e6, rel=2e-3)
    few = replace(codecs.QUICK, layers=30)
    scales = [math.log(float(tensor.std())) for tensor in codecs.made_up(few, 0.5).values()]
    assert np.std(scales) == pytest.approx(0.5, rel=0.2)
