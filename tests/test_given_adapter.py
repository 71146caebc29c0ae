"""adapter.path: a run goes on from an adapter, whose settings and tensors every party starts with."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import PAIRS, of_each_kind, rows, small
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from fedtune.config.compose import choices, load
from fedtune.config.compose import load_file as load_config
from fedtune.core.errors import ConfigError, FedtuneError, ModelError, WireError
from fedtune.core.protocol import ClientInfo
from fedtune.device.owner import Owner
from fedtune.models.tiny import tiny_model
from fedtune.wire.broadcast_chain import BroadcastChain
from fedtune.wire.messages import pack_greeting, unpack_greeting
from fedtune.workspace.downlink import Downlink
from fedtune.workspace.workspace import Workspace

# They begin at B = 0 by what they are
REFUSED = {"flora", "florist", "full_delta", "fed_sb", "hetlora", "fedpipe"}
TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def first(shared_run):
    return shared_run("adapter.rank=4", "adapter.alpha=12")


@pytest.fixture
def copied(first, tmp_path):
    """The adapter's folder, to be changed: `config` sets fields, `tensors` is a function of the tensors."""

    def copy(tensors=None, **config):
        folder = tmp_path / "given"
        shutil.copytree(first / "adapter", folder)
        said = json.loads((folder / "adapter_config.json").read_text()) | config
        (folder / "adapter_config.json").write_text(json.dumps(said))
        if tensors is not None:
            held = load_file(folder / "adapter_model.safetensors")
            save_file(tensors(held), folder / "adapter_model.safetensors")
        return folder

    return copy


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def losses(folder):
    return [float(row["eval_loss"]) for row in rows(folder, "metrics.csv")]


def test_a_run_starts_where_the_other_ended_and_resumes(first, small_run, tmp_path):
    """And is what plain PEFT makes of the folder. A resume finds the same adapter, or none."""
    second = small_run(f"adapter.path={first}", rounds=1)
    assert losses(second)[0] == losses(first)[-1]
    stored = load_config(second / "config.yaml").adapter
    assert (stored.rank, stored.alpha, stored.targets) == (4, 12.0, ["q_proj", "v_proj"])
    start = Workspace(small(f"adapter.path={first}", out=tmp_path / "unused")).model
    torch.testing.assert_close(logits(start.module), logits(PeftModel.from_pretrained(tiny_model(), first / "adapter")))
    changed = replace(load_config(second / "config.yaml"), adapter=replace(stored, sha256="0" * 64))
    with pytest.raises(ConfigError, match="and the run goes on from one with 0000"):
        Workspace(changed)


def test_an_adapter_of_plain_peft_is_taken_in_its_own_dtype(tmp_path):
    """bfloat16 numbers are float32 ones too: nothing is rounded."""
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["k_proj"], init_lora_weights=False, use_rslora=True)
    adapted = get_peft_model(tiny_model(), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    adapted.save_pretrained(tmp_path / "peft")
    workspace = Workspace(small(f"adapter.path={tmp_path / 'peft'}", "adapter.dropout=0.1", out=tmp_path))
    spec, held = workspace.experiment.adapter, load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert (spec.kind, spec.rank, spec.alpha, spec.dropout) == ("rslora", 2, 8.0, 0.1)
    assert all(torch.equal(tensor.float(), workspace.model.layout.initial[name]) for name, tensor in held.items())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["adapter.rank=8"], "adapter.rank=8, and the adapter in adapter.path=.* has 4"),
        (["adapter=dora"], "adapter.kind=dora, and the adapter in .* has lora"),
        (["adapter.targets=[k_proj]"], r"adapter.targets=\['k_proj'\], and the adapter in"),
        (["population.ranks=[4,2]", "method=flexlora"], "is of one rank, and population.ranks"),
        (["method=flora"], "begins with something in B A: .*without adapter.path"),
        (["method=fed_sb"], "B has to start at zero: .*without adapter.path"),
    ],
)
def test_what_is_typed_has_to_agree(first, words, said, tmp_path):
    def begun():
        workspace = Workspace(small(f"adapter.path={first}", *words, out=tmp_path))
        return workspace.strategy.init(workspace.layout)

    with pytest.raises(ConfigError, match=said):
        begun()


@pytest.mark.parametrize("method", sorted({*of_each_kind(choices("method"))} - REFUSED))
def test_methods_of_each_kind_start_from_it(first, method, tmp_path):
    """What a newcomer is sent in round 1 is the adapter, whatever the method sends; fedsvd in other factors."""
    workspace = Workspace(small(f"adapter.path={first}", f"method={method}", out=tmp_path))
    state, downlink = workspace.strategy.init(workspace.layout), Downlink(workspace)
    sent = downlink.next_broadcast(BroadcastChain(), state, 1)
    workspace.install(downlink.broadcast(sent, state, 1), memory={})
    assert workspace.evaluate().loss == pytest.approx(losses(first)[-1], abs=1e-6)


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"rank_pattern": {"q_proj": 2}}, None, "rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save="),
        ({"peft_type": "LOHA"}, None, "is a LOHA adapter"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights=pissa"),
        ({"target_modules": ["q_proj", "nowhere"]}, None, "is no adapter for this base: .*nowhere"),
        ({"target_modules": "q.*"}, None, "'target_modules' .* should be a list"),
        ({"use_dora": True, "use_rslora": True}, None, "use_rslora=True"),
        ({"lora_bias": True}, None, "lora_bias=True"),
        ({"r": "4"}, None, "'r' .* should be a number"),
        ({"r": 2, "lora_alpha": 6}, None, "should be .* numbers, and is"),
        ({}, lambda held: {**held, "more": torch.zeros(1)}, "has 'more'"),
        ({}, lambda held: dict(list(held.items())[1:]), "it lacks '"),
        ({}, lambda held: {name: tensor / 0 for name, tensor in held.items()}, "aren't finite"),
    ],
)
def test_another_adapter_is_refused_by_what_is_other(copied, config, tensors, said, tmp_path):
    with pytest.raises(FedtuneError, match=said):
        Workspace(small(f"adapter.path={copied(tensors, **config)}", out=tmp_path)).model  # noqa: B018


def test_a_damaged_folder_is_named(copied, tmp_path):
    folder = copied()
    (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ModelError, match="get the adapter again, whole"):
        Workspace(small(f"adapter.path={folder}", out=tmp_path)).model  # noqa: B018
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"Pickles .* are not opened"):
        Workspace(small(f"adapter.path={folder}", out=tmp_path))
    with pytest.raises(ConfigError, match=r"no adapter_config.json is there"):
        Workspace(small(f"adapter.path={tmp_path}", out=tmp_path))


def test_a_device_opens_its_owners_folders_alone_and_its_start_is_in_its_greeting(first, copied, tmp_path):
    """The server's text names the tensors' hash, so a device with others stops; one that told another start would be
    noticed at the handshake."""
    server = Workspace(small(f"adapter.path={first}", out=tmp_path))
    text = server.experiment.text()
    with pytest.raises(ConfigError, match=r"adapter.path=.*: this device opens only files in folders"):
        Workspace(load(text), Owner(folders=(str(PAIRS.parent),)))
    device = Workspace(load(text), Owner(folders=(str(PAIRS.parent), str(first.parent))))
    assert device.model.layout.sha256 == server.model.layout.sha256
    other = copied(lambda held: {name: tensor + 1 for name, tensor in held.items()})
    elsewhere = load(text.replace(f"path: {first}\n", f"path: {other}\n"))
    with pytest.raises(ConfigError, match="put that there"):
        Workspace(elsewhere, Owner(folders=(str(PAIRS.parent), str(tmp_path))))
    liar = Workspace(small(f"adapter.path={other}", out=tmp_path))
    greeting = pack_greeting(ClientInfo(0, 9), liar.model.layout.sha256)
    with pytest.raises(WireError):
        unpack_greeting(greeting, 4, server.model.layout.sha256)
