"""A run's model as files: the small one that makes it again, and the folder that everything else reads."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import rows, setting, summary_of
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.commands.main import main
from fedtune.config.compose import compose
from fedtune.config.schema import ADAPTERS, FULL, AdapterSpec, ModelSpec
from fedtune.config.targets import check
from fedtune.core.errors import ConfigError, ExportError
from fedtune.export.model_folder import PROMPTS, export
from fedtune.models.adapted_model import LocalModel
from fedtune.models.base import load_base
from fedtune.models.peft_fields import FIELDS, OLDEST, readable
from fedtune.models.tiny import tiny_model, tiny_tokenizer
from fedtune.runs.adapter_files import adapter_files
from fedtune.runs.checkpoint import load_checkpoint
from fedtune.runs.model_file import KEY, LONGEST, dump, read
from fedtune.workspace.downlink import Downlink
from fedtune.workspace.workspace import Workspace

K = 64
SEEDED = (
    "method=fedkseed",
    "codec=raw",
    f"method.strategy.directions={K}",
    "method.strategy.rules.local_steps=4",
    "method.strategy.rules.lr=1e-2",
)
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
TOKENS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def server_model(folder):
    """The server's own model after a run's last round, made from its checkpoint."""
    workspace = Workspace(compose([*summary_of(folder)["command"].split()[2:]]))
    state = workspace.strategy.init(workspace.model.layout)
    checkpoint = load_checkpoint(folder / "checkpoint" / "state.safetensors", state)
    workspace.install(Downlink(workspace).broadcast(checkpoint.sent, checkpoint.state, checkpoint.round + 1), memory={})
    return workspace.model.module


def served(folder):
    return logits(server_model(folder))


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture(scope="module")
def made(shared_run):
    """Runs of a few words, each played once for all tests, which write nowhere near them."""
    return partial(shared_run, "train.lr=0.02")


@pytest.fixture
def file(made, tmp_path):
    """A .fedtune file of a run's, for a test to harm."""
    return shutil.copy(made(*SEEDED) / "model.fedtune", tmp_path / "given.fedtune")


def test_a_model_of_its_own_weights_is_exported_to_the_bit(made, tmp_path):
    run = made(*SEEDED)
    done = export(str(run), str(tmp_path / "out"))
    assert torch.equal(logits(loaded(tmp_path / "out")), served(run))
    assert not torch.equal(served(run), logits(tiny_model()))
    assert done.round == 2
    assert done.bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(chat) == tiny_tokenizer().apply_chat_template(chat)


def test_the_small_file_makes_the_same_folder_as_the_run(made, tmp_path):
    run = made(*SEEDED)
    export(str(run), str(tmp_path / "a"))
    export(str(run / "model.fedtune"), str(tmp_path / "b"))
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_the_file_is_4_bytes_a_direction_and_some_text(made):
    """By hand: 8 bytes of length, the header, and K int32. The header is about 3 kB, most of it the config."""
    path = made(*SEEDED) / "model.fedtune"
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    assert len(content) == 8 + header + 4 * K
    assert 1_500 < header < 4_000
    assert load_file(path)["slopes"].shape == (K,)
    assert content == dump(read(path))


def test_the_file_says_nothing_of_where_it_was_made(made):
    run = made(*SEEDED)
    assert str(run) not in (run / "config.yaml").with_name("model.fedtune").read_bytes().decode("latin-1")
    experiment = read(run / "model.fedtune").experiment
    assert (experiment.out, experiment.overrides, experiment.runtime.threads) == (None, [], 1)


@pytest.mark.parametrize("method", ["decomfl", "mezo", "fedkseed_pro"])
def test_every_seeded_method_leaves_such_a_file(made, tmp_path, method):
    small = ["codec=raw", "method.strategy.rules.local_steps=2", "method.strategy.rules.lr=1e-3"]
    run = made(f"method={method}", *small)
    export(str(run / "model.fedtune"), str(tmp_path / "out"))
    assert torch.equal(logits(loaded(tmp_path / "out")), served(run))


def test_a_round_leaves_its_own_file(small_run):
    whole = small_run(*SEEDED, name="whole", rounds=2)
    half = small_run(*SEEDED, name="half", rounds=1)
    assert read(half / "model.fedtune").round == 1
    main(["run", f"resume={half}", "rounds=2"])
    first, second = read(half / "model.fedtune"), read(whole / "model.fedtune")
    assert first.round == second.round == 2
    assert torch.equal(first.instruction.tensors["slopes"], second.instruction.tensors["slopes"])


def test_a_seeded_adapter_is_merged(made, tmp_path):
    run = made(*SEEDED, "adapter=lora")
    for source in (run, run / "model.fedtune"):
        export(str(source), str(tmp_path / "out"))
        assert torch.allclose(logits(loaded(tmp_path / "out")), served(run), atol=1e-5)
        shutil.rmtree(tmp_path / "out")
    assert not torch.allclose(served(run), logits(tiny_model()), atol=1e-3)


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind not in (*PROMPTS, FULL)])
def test_every_kind_that_is_weights_is_merged(made, tmp_path, kind):
    run = made("method=fedit", f"adapter={kind}", "train.lr=0.05")
    assert not (run / "model.fedtune").exists()  # adapter/ is such a file already
    export(str(run), str(tmp_path / "out"))
    assert torch.allclose(logits(loaded(tmp_path / "out")), served(run), atol=2e-5)
    assert not torch.allclose(served(run), logits(tiny_model()), atol=1e-3)


@pytest.mark.parametrize("words", [("method=flora",), ("method=full_delta",), ("method=fedex_lora", "adapter=pissa")])
def test_a_change_of_the_base_is_merged_too(made, tmp_path, words):
    run = made(*words, "train.lr=0.05")
    export(str(run), str(tmp_path / "out"))
    assert torch.allclose(logits(loaded(tmp_path / "out")), served(run), atol=2e-5)


def test_averaged_weights_are_exported_to_the_bit(made, tmp_path):
    run = made("method=fedit", "adapter=none")
    assert not (run / "model.fedtune").exists()  # it would be as large as the model
    export(str(run), str(tmp_path / "out"))
    assert torch.equal(logits(loaded(tmp_path / "out")), served(run))


def test_a_bfloat16_base_stays_one_wherever_it_is_exported(made, tmp_path):
    run = made(*SEEDED, "model.dtype=bfloat16")
    export(str(run / "model.fedtune"), str(tmp_path / "out"))
    model, weights = loaded(tmp_path / "out"), server_model(run).state_dict()
    assert model.dtype == torch.bfloat16
    # Not the logits: the toy, made in code, has what isn't a weight (rotary frequencies) in bfloat16 too
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(weights["lm_head.weight"], tiny_model().lm_head.weight.bfloat16())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("method=fedsa_lora", "data.client_heldout=0.2"), "as many models as clients"),
        (("method=local_only", "data.client_heldout=0.2"), "as many models as clients"),
        (("method=fedit", "adapter=prompt_tuning"), "changes no weight"),
    ],
)
def test_what_is_no_one_model_is_refused_with_a_reason(made, tmp_path, words, part):
    with pytest.raises(ExportError, match=part):
        export(str(made(*words)), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_quantized_base_is_refused_before_it_is_loaded(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made(*SEEDED, "adapter=lora"), run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("quantization: none", "quantization: nf4"))
    with pytest.raises(ExportError, match=r"held in nf4.*adapter/ folder"):
        export(str(run), str(tmp_path / "out"))


def test_a_run_without_its_checkpoint(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made(*SEEDED), run)
    shutil.rmtree(run / "checkpoint")
    export(str(run), str(tmp_path / "out"))  # the small file is all that is needed
    assert torch.equal(logits(loaded(tmp_path / "out")), served(made(*SEEDED)))
    (run / "model.fedtune").unlink()
    with pytest.raises(ExportError, match="has no checkpoint"):
        export(str(run), str(tmp_path / "other"))
    (run / "config.yaml").unlink()
    with pytest.raises(ExportError, match="holds no run"):
        export(str(run), str(tmp_path / "other"))
    with pytest.raises(ExportError, match="does not exist"):
        export(str(tmp_path / "nowhere"), str(tmp_path / "other"))


def test_a_run_whose_settings_were_changed_is_refused(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made(*SEEDED), run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0\nname", "seed: 1\nname"))
    with pytest.raises(ExportError, match="other settings"):
        export(str(run), str(tmp_path / "out"))


@pytest.fixture
def base(tmp_path):
    """The toy model as a folder, as a user's own model would be."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_base_is_found_by_its_hash(base, tmp_path, small_run):
    run = small_run(*SEEDED, "model=custom", f"model.path={base}", rounds=1)
    moved = base.rename(tmp_path / "moved")
    given = str(run / "model.fedtune")
    with pytest.raises(ExportError, match=r"isn't to be had here.*--base"):
        export(given, str(tmp_path / "out"))
    export(given, str(tmp_path / "out"), base=str(moved))

    other = tiny_model()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other.save_pretrained(moved)
    here = load_base(ModelSpec(path=str(moved)), torch.device("cpu")).origin.sha256
    with pytest.raises(ExportError, match=f"tuned from folder:{base} .*here is folder:{moved} .sha256 {here[:16]}"):
        export(given, str(tmp_path / "again"), base=str(moved))
    assert {path.name for path in tmp_path.iterdir()} == {"moved", "out", "run"}


def test_what_is_there_already_is_left_alone(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for taken in (tmp_path / "out", tmp_path / "out" / "mine"):
        with pytest.raises(ExportError, match="is there already"):
            export(str(made(*SEEDED)), str(taken))
    (tmp_path / "empty").mkdir()
    export(str(made(*SEEDED)), str(tmp_path / "empty"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "empty"}


def test_a_disk_that_fills_up_leaves_nothing_half_written(made, tmp_path, monkeypatch):
    def full(self, folder, **_):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", full)
    with pytest.raises(ExportError, match="No space left"):
        export(str(made(*SEEDED)), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


# Files from strangers


def rewritten(path, change):
    """The file with its metadata's JSON changed by `change`, which alters it or returns another."""
    given = read(path)
    about = json.loads(json.dumps(_about(path)))
    about = change(about) or about
    save_file(given.instruction.tensors, path, metadata={KEY: about if isinstance(about, str) else json.dumps(about)})


def _about(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()[KEY])


def config(old, new):
    def change(about):
        assert old in about["config"]
        about["config"] = about["config"].replace(old, new)

    return change


TARGET = "_target_: clients.zeroth_order.ZerothOrder"
HOSTILE = {
    "another format": (setting("format", value=1), "is of format 1; this fedtune reads 2"),
    "a format that is text": (setting("format", value="1"), "with a 'format'"),
    "no object": (lambda about: "[]", "with a 'format'"),
    "no JSON": (lambda about: "{", "JSONDecodeError"),
    "deep JSON": (lambda about: "[" * 100_000, "RecursionError"),
    "no config": (setting("config", value=None), "'config' should be str"),
    "a config that is a list": (setting("config", value="[]"), "expected settings"),
    "a config that is no YAML": (setting("config", value="{"), "its config can't be read"),
    "a config that is empty": (setting("config", value="{}"), "wants None made"),
    "a config that grows": (
        setting("config", value="a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]"),
        "refers to parts of itself",
    ),
    "a config without end": (setting("config", value="#" * (LONGEST + 1)), "longer than"),
    "a config that asks for secrets": (config("name: tiny", "name: ${oc.env:HOME}"), "in it"),
    "an unknown setting": (config("rounds:", "rownds:"), "rownds"),
    "a setting out of range": (config("quantization: none", "quantization: nf5"), "nf5 is not known"),
    "settings that are a list": (setting("settings", value=[]), "'settings' should be dict"),
    "a setting that is a list": (setting("settings", "lr", value=[1]), "setting 'lr' should be"),
    "a setting that is text": (setting("settings", "lr", value="x"), "makes no model here"),
    "a setting that is infinite": (setting("settings", "lr", value=math.inf), "lr=inf"),
    "no setting": (lambda about: about["settings"].pop("lr") and None, "'lr' is missing"),
    "no base": (setting("base", value=None), "'base' should be dict"),
    "a hash that is none": (setting("base", "sha256", value="../../etc"), "expected the base's sha256"),
    "another base": (setting("base", "sha256", value="0" * 64), "whose weights are others"),
    "a dtype of no base": (setting("base", "dtype", value="int8"), "expected a base of float32"),
    "a hub id that is a number": (setting("base", "hub_id", value=7), "expected a base of float32"),
    "a round that is none": (setting("round", value=True), "'round' should be int"),
    "code": (config(TARGET, "_target_: os.system\n    command: touch /tmp/owned"), "wants 'os.system' made"),
    "code behind our name": (
        config(TARGET, "_target_: fedtune.models.base.os.system"),
        "wants 'fedtune.models.base.os.system'",
    ),
    "code deeper down": (config(TARGET, f"{TARGET}\n    x: [{{_target_: builtins.eval}}]"), "should be a plain value"),
    "a class that takes other words": (config(TARGET, "_target_: strategies.fedit.FedIT"), "can't be made"),
    "a method that is no method": (
        config("clients.zeroth_order.ZerothOrder", "fedtune.core.protocol.ClientInfo"),
        "ClientInfo",
    ),
}


@pytest.mark.parametrize(("change", "part"), HOSTILE.values(), ids=HOSTILE)
def test_a_strangers_metadata_ends_in_one_message(file, tmp_path, change, part):
    rewritten(file, change)
    with pytest.raises((ExportError, ConfigError), match=part):
        export(str(file), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "fedtune.models.base.os.system",
        "fedtune.models.base.shutil",
        "fedtune.models.base.Path",
        "fedtune.runs.checkpoint.write_atomically",
        "fedtune.runs.run_folder.RunFolder",
        "fedtune",
        "fedtuned.x.Y",
        "strategies.nothing.Nothing",
        "..fedit.FedIT",
        "",
        None,
        ["os.system"],
    ],
)
def test_only_dataclasses_of_ours_are_made(target):
    with pytest.raises(ConfigError, match="and nothing else"):
        check({"_target_": target}, "method.client")


def test_every_class_that_our_methods_name_may_be_made():
    for target in (
        "strategies.mezo.MeZO",
        "fedtune.codecs.raw.Raw",
        "fedtune.training.zeroth_order.Rules",
        "clients.rolora.KeepsAdapter",
    ):
        check({"_target_": target}, "method.client")


TENSORS = {
    "none": {},
    "other names": {"weights": torch.zeros(K, dtype=torch.int32)},
    "not a number": {"slopes": torch.full((K,), math.nan)},
    "two dimensions": {"slopes": torch.ones(K, 2, dtype=torch.int32)},
    "too large": {"slopes": torch.full((K,), 2**31 - 1, dtype=torch.int32)},
    "fractions": {"slopes": torch.full((K,), 1e300, dtype=torch.float64)},
}


@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS)
def test_a_strangers_tensors_end_in_one_message(file, tmp_path, tensors, capsys):
    given = read(file)
    file.write_bytes(dump(replace(given, instruction=replace(given.instruction, tensors=tensors))))
    assert main(["export", str(file), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fedtune: ")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_file_that_was_cut_or_is_none_at_all(file, tmp_path):
    whole = file.read_bytes()
    for place in (0, 4, 8, 100, len(whole) - 1):
        file.write_bytes(whole[:place])
        with pytest.raises(ExportError, match=r"can't be read as a \.fedtune file"):
            export(str(file), str(tmp_path / "out"))
    file.write_bytes(struct.pack("<Q", 2**63) + whole[8:])
    with pytest.raises(ExportError, match="can't be read"):
        export(str(file), str(tmp_path / "out"))
    save_file({"slopes": torch.zeros(K)}, file)
    with pytest.raises(ExportError, match=r"is no \.fedtune file"):
        export(str(file), str(tmp_path / "out"))


def test_the_real_command(fedtune, made, tmp_path):
    run = made(*SEEDED)
    done = fedtune("export", str(run / "model.fedtune"), "tuned")
    assert done.returncode == 0, done.stderr
    sha256 = summary_of(run)["base"]["sha256"]
    for part in ("wrote    tuned  (2", "method=fedkseed after round 2", f"sha256 {sha256}", 'from_pretrained("tuned")'):
        assert part in done.stdout
    assert torch.equal(logits(loaded(tmp_path / "tuned")), served(run))
    again = fedtune("export", str(run), "tuned")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "is there already" in again.stderr
    assert len(rows(run, "metrics.csv")) == 3


def test_help_says_how(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "fedtune export model.fedtune tuned" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != FULL])
def test_an_adapters_settings_are_those_that_the_oldest_supported_peft_knows(kind):
    """A newer PEFT writes a dozen more, at their defaults, and an older one refuses unknown names."""
    assert f'"peft>={OLDEST.removesuffix(".0")}"' in PYPROJECT.read_text()
    written = config_of(kind)
    config_class = make_dataclass("Config", [(name, Any, None) for name in FIELDS[written["peft_type"]]])
    assert config_class(**written).peft_type == written["peft_type"]
    assert kind in PROMPTS or written["target_modules"] or kind == "adaption_prompt"
    # What is not at its default stays, whoever knows it: it is what the adapter computes
    made = LoraConfig(r=4, use_rslora=True)
    assert readable(made, {"r": 4, "use_rslora": True, "of_the_future": 1}) == {
        "r": 4, "use_rslora": True, "of_the_future": 1
    }  # fmt: skip


@pytest.mark.slow
def test_the_oldest_supported_peft_itself_reads_every_kind(tmp_path):
    """Its config classes, of the real package in a folder of its own; skipped where no package index answers."""
    old = tmp_path / "old"
    words = ["pip", "install", "--quiet", "--no-deps", "--target", str(old), f"peft=={OLDEST}"]
    if subprocess.run([sys.executable, "-m", *words], capture_output=True, check=False, timeout=120).returncode:
        pytest.skip("no package index answers")
    for kind in ADAPTERS:
        if kind != FULL:
            (tmp_path / kind).mkdir()
            (tmp_path / kind / "adapter_config.json").write_text(json.dumps(config_of(kind)))
    script = (
        "import dataclasses, json, sys, warnings, peft\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as classes\n"
        "warnings.simplefilter('error')\n"
        "kinds = [peft.PeftConfig.from_pretrained(folder).peft_type for folder in sys.argv[1:]]\n"
        "names = {kind: sorted(field.name for field in dataclasses.fields(classes[kind])) for kind in kinds}\n"
        "print(json.dumps(names), peft.__version__)\n"
    )
    folders = [str(tmp_path / kind) for kind in ADAPTERS if kind != FULL]
    environment = {**os.environ, "PYTHONPATH": str(old)}
    done = subprocess.run(
        [sys.executable, "-c", script, *folders], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    fields, _, version = done.stdout.strip().rpartition(" ")
    assert version == OLDEST
    real = json.loads(fields)
    assert all(set(real[kind]) == names for kind, names in FIELDS.items())


def config_of(kind):
    model = LocalModel(
        load_base(ModelSpec(name="tiny", dtype="float32"), torch.device("cpu")), AdapterSpec(kind=kind), 0
    )
    return json.loads(adapter_files(model)["adapter_config.json"])
