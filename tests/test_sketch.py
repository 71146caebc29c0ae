"""A base without its weights: plans made of it are those of the base itself, and loading takes what it says."""

import json
import sys

import forked
import pytest
import torch
from conftest import small

from fedtune.commands.main import main
from fedtune.commands.plan import made, plans, table_of
from fedtune.config.schema import ModelSpec
from fedtune.models.base import pick_device
from fedtune.models.sketch import sketch_base
from fedtune.workspace.workspace import Workspace

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("method=fedit", "model.quantization=nf4", "train.checkpoint_activations=true"),
        ("method=flora", "model.quantization=int8"),
        ("method=fedpipe", "population.deadline=30"),
        ("method=fedprox", "adapter.kind=pissa"),
    ],
    ids=lambda words: words[0].removeprefix("method="),
)
def test_a_plan_without_weights_is_the_plan(short_smollm2, tmp_path, words):
    experiment = small(f"model.path={short_smollm2}", "population=mixed", *words, out=tmp_path / "unused")
    workspace, sketch, (planned, trouble) = made(experiment)
    loaded = Workspace(experiment)
    assert sketch is not None
    assert trouble is None
    assert table_of(workspace, planned) == table_of(loaded, plans(loaded)[0])
    assert workspace.costs == loaded.costs
    assert sketch.base.model.device == loaded.model.device == pick_device("cpu")


@pytest.mark.slow
def test_no_weights_need_be_there(short_smollm2, tmp_path, capsys):
    """As with a model of a hub's, of which nothing but its config and its tokenizer is downloaded."""
    for file in short_smollm2.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert main(["plan", f"model.path={tmp_path}", "model.quantization=nf4", "population.clients=2"]) == 0
    assert "memory   loading the base in 4 bits takes at most" in capsys.readouterr().out


@pytest.mark.slow
def test_a_base_that_is_quantized_in_its_files_has_to_be_loaded(short_smollm2, tmp_path):
    for file in short_smollm2.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((short_smollm2 / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    asked = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": asked}))
    assert sketch_base(ModelSpec(name="custom", path=str(tmp_path)), CPU) is None


LOADED = """
import json, sys, threading, time, torch
from pathlib import Path
from fedtune.config.schema import ModelSpec
from fedtune.models.base import load_base
import bitsandbytes, transformers.models.llama.modeling_llama

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.002)

before = most = held()
threading.Thread(target=watch, daemon=True).start()
spec = ModelSpec(name="custom", path=sys.argv[-2], quantization=sys.argv[-1], dtype="bfloat16")
base = load_base(spec, torch.device("cpu"))
at_most = most
print(json.dumps({"most": at_most - before, "left": held() - before, "held": base.model.get_memory_footprint()}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory a process holds")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loading_takes_no_more_than_was_said(tmp_path, kind):
    """The anonymous memory of a process; a file's pages, which are mapped, the system takes back as it likes. Half of
    this model is vocabulary, which stays as it is."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(vocab_size=4000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    from fedtune.models.tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path)
    spec = ModelSpec(name="custom", path=str(tmp_path), quantization=kind, dtype="bfloat16")
    done = forked.run([sys.executable, "-c", LOADED, str(tmp_path), kind], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    sketch = sketch_base(spec, CPU)
    assert sketch is not None
    said = sketch.loading_bytes(measured["held"], {"nf4": 4, "int8": 8}[kind])
    print(kind, {**measured, "said": said})
    assert measured["most"] < said + 16e6  # of libraries that are first used
    assert measured["left"] < 1.1 * measured["held"] + 16e6
