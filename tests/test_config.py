"""Settings: what was typed, and what is said when it was mistyped."""

import dataclasses
import importlib

import pytest
import yaml
from conftest import PAIRS, SMALL, summary_of
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from fedtune.commands.main import main
from fedtune.config.compose import (
    CONF,
    TEXTS,
    _expand,
    build,
    choices,
    compose,
    describe_keys,
    differences,
    from_run_config,
    load,
)
from fedtune.config.schema import Experiment
from fedtune.config.targets import table
from fedtune.core.errors import ConfigError


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_composes(name):
    assert compose([f"experiment={name}"]).name == name


@pytest.mark.slow
@pytest.mark.parametrize("group", ["model", "data", "adapter", "population", "runtime", "tracker", "server_optimizer"])
def test_every_choice_of_a_group_composes_and_reads_back(group):
    """Of methods test_contract.py shows it, where each is composed in any case."""
    for name in choices(group):
        experiment = compose([f"{group}={name}"])
        assert load(experiment.text()) == experiment


@pytest.mark.slow
def test_values_reach_the_experiment():
    experiment = compose(
        ["train.lr=1e-4", "adapter.targets=[q_proj,k_proj]", "data.partition_options={a: 1}", "seed=3"]
    )
    assert experiment.train.lr == 1e-4
    assert experiment.adapter.targets == ["q_proj", "k_proj"]
    assert experiment.data.partition_options == {"a": 1}
    assert experiment.method.client["lr"] == 1e-4
    assert load(experiment.text()) == experiment


@pytest.mark.slow
def test_a_path_of_ones_own_leaves_the_default_groups_settings_behind():
    experiment = compose(["data.path=mine.jsonl", "model.path=me/mine"])
    assert (experiment.data.partition, experiment.data.partition_by) == ("iid", None)
    assert (experiment.data.name, experiment.model.name) == ("custom", "custom")
    kept = compose(["data=chatterbot", "data.path=mine.jsonl"])
    assert kept.data.partition_by == "topic"


@pytest.mark.slow
def test_codec_sets_both_directions():
    experiment = compose(["codec=raw"])
    assert experiment.codec_up == experiment.codec_down == {"_target_": "fedtune.codecs.raw.Raw"}


def test_what_depends_on_the_machine_is_recorded():
    experiment = compose(["population.clients=5"])
    assert experiment.runtime.threads >= 1
    assert experiment.population.cohort_size == 5
    assert compose(["population.clients=50"]).population.cohort_size == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trian.lr=1", ["'trian'", "did you mean train?"]),
        ("train.lrr=1", ["'lrr' in 'train'", "did you mean lr?", "batch_size"]),
        ("model=smol", ["model=smol is not known", "smollm2, tiny", "did you mean smollm2?"]),
        ("experiment=dmo", ["did you mean demo?"]),
        ("methd=fedit", ["'methd'", "did you mean method?"]),
        ("codec_up=rw", ["expected bf16, compeft, int8, nf4, packed, raw, signsgd, stc, topk", "did you mean raw?"]),
        ("server_optimizer=fedadm", ["expected fedadagrad, fedadam", "none", "did you mean fedadam"]),
        ("server_optimiser=fedadam", ["did you mean server_optimizer?"]),
        ("server_optimizer.lr=1", ["'lr' in 'server_optimizer'"]),
        ("method.strategy.mu=1", ["'mu' in 'method.strategy'"]),
        ("rounds=abc", ["rounds=abc", "could not be converted to Integer"]),
        ("rounds=0", ["rounds=0 is too small: expected at least 1"]),
        ("train.lr=-1", ["train.lr=-1.0 must be above 0"]),
        ("train.optimizer=adam", ["did you mean adamw or adamw8bit?"]),
        ("model.quantization=nf5", ["expected none, int8, nf4", "did you mean nf4?"]),
        ("data.heldout=1", ["data.heldout=1.0 must be a fraction"]),
        ("population.cohort=50", ["more clients a round than there are (population.clients=20)"]),
        ("runtime.name=rya", ["runtime=rya is not known", "did you mean ray"]),
        ("train", ["train: expected key=value"]),
        ("+train.x=1", ["expected key=value"]),
        ("method.client.optimizer=a=b", ["wants quotes"]),
    ],
)
def test_a_mistake_is_answered_with_what_is_known(word, said):
    with pytest.raises(ConfigError) as caught:
        compose([word])
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["a: 1", "train: [", "- 1", "train: {lr: x}", "rounds: -1"])
def test_a_config_file_that_is_none_is_refused_by_name(text):
    with pytest.raises(ConfigError):
        load(text, "some/config.yaml")


def test_both_ends_of_a_flower_run_read_the_same_experiment():
    words = {"overrides": 'model=tiny "data.path=with space.jsonl"'}
    experiment = from_run_config(words)
    assert experiment.data.path == "with space.jsonl"
    assert from_run_config({"config": experiment.text()}) == experiment
    with pytest.raises(ConfigError, match="can't be split into words"):
        from_run_config({"overrides": 'model="tiny'})


def test_settings_that_may_change_on_resume_are_not_part_of_the_hash():
    one, other = compose(["rounds=2", "out=a"]), compose(["rounds=5", "out=b"])
    assert one.sha256 == other.sha256 != compose(["seed=1"]).sha256
    assert differences(one.fixed(), compose(["train.lr=0.5"]).fixed()) == [
        "method.client.lr: 0.001 -> 0.5",
        "train.lr: 0.001 -> 0.5",
    ]


def test_every_setting_is_described():
    described = {key for key, _, help in describe_keys() if help}
    schema = yaml.safe_load(compose([]).text())
    for section, values in schema.items():
        if section in ("overrides", "codec_up", "codec_down", "method", "server_optimizer"):
            continue
        for key in values if isinstance(values, dict) else [None]:
            assert (f"{section}.{key}" if key else section) in described


def test_a_class_that_cannot_be_made_is_named():
    with pytest.raises(ConfigError, match=r"method\.strategy: no\.such\.Thing can't be made"):
        build({"_target_": "no.such.Thing"}, "method.strategy")


def test_the_defaults_in_code_are_those_in_use():
    assert compose([]).train == Experiment().train
    assert (CONF / "config.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in choices("server_optimizer") if name != "none"])
def test_a_server_optimizers_yaml_lists_all_hyper_parameters_and_reads_back(name):
    experiment = compose([f"server_optimizer={name}", "method=krum"])
    module, _, cls = experiment.server_optimizer["_target_"].rpartition(".")
    fields = {item.name for item in dataclasses.fields(getattr(importlib.import_module(module), cls))}
    assert fields == experiment.server_optimizer.keys() - {"_target_"} | {"base"}
    assert experiment.server_optimizer_name == name
    assert load(experiment.text()) == experiment
    assert experiment.sha256 != compose(["method=krum"]).sha256


@given(st.text(min_size=1).filter(lambda text: "${" not in text and text != "null" and not text.startswith(("'", '"'))))
def test_a_text_needs_no_quotes_but_the_shells(text):
    """Hydra's own parser gives back what was typed, whatever it is."""
    (word,) = _expand(f"out={text}")
    assert OverridesParser.create().parse_override(word).value() == text


@pytest.mark.parametrize("key", sorted(TEXTS))
def test_every_setting_that_is_text_is_one_of_them(key):
    assert _expand(f"{key}=a, b=c {{x}}")[-1] == f"{key}='a, b=c {{x}}'"
    for value in ("null", "'a, b'"):  # the second is how it had to be typed before
        assert _expand(f"{key}={value}")[-1] == f"{key}={value}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a, b=c", "{a} (b)", "Grüße 世界 🙂", 'it\'s "x" \\'])
def test_a_run_may_be_called_anything(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{name}.jsonl").write_text(PAIRS.read_text())
    experiment = compose([f"out={name}", f"name={name}", f"data.path={name}.jsonl", f"data.prompt_column={name}"])
    assert (experiment.out, experiment.name, experiment.data.prompt_column) == (name, name, name)
    assert experiment.data.path == str(tmp_path / f"{name}.jsonl")
    assert load(experiment.text()) == experiment


@pytest.mark.slow
def test_a_run_goes_on_from_any_folder(tmp_path, monkeypatch, capsys):
    """Its data, its devices and its base are named relative to where it was started; its folder is named as nobody
    should."""
    home, away, name = tmp_path / "home", tmp_path / "away", "Läufe, a=b {1}"
    home.mkdir()
    away.mkdir()
    (home / "pairs.jsonl").write_text(PAIRS.read_text())
    (home / "devices.csv").write_text(
        "device,memory_bytes,flop_per_s,up_bytes_per_s,down_bytes_per_s\nboard,8e9,1e11,1e6,1e6\n"
    )
    words = [word for word in SMALL if not word.startswith("data.path=")]
    monkeypatch.chdir(home)
    assert (
        main(["run", *words, "data.path=pairs.jsonl", "population.devices=devices.csv", "rounds=1", f"out={name}"]) == 0
    )
    monkeypatch.chdir(away)
    assert main(["run", f"resume=../home/{name}", "rounds=2"]) == 0, capsys.readouterr().err
    assert summary_of(home / name)["rounds"] == 2


@pytest.mark.slow
def test_what_is_no_path_here_and_what_is_a_devices_own_stays_as_it_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    experiment = compose(["model.path=mine", "data.path=openai/gsm8k"])
    assert (experiment.model.path, experiment.data.path) == (str(tmp_path / "mine"), "openai/gsm8k")
    assert compose(["model.path=mine", "runtime=flower"]).model.path == "mine"


SECRETS = {
    "a value": ("name: run", "name: ${oc.env:SECRET}", "'name'"),
    "a list": ("targets: null", "targets: ['${oc.env:SECRET}']", "'adapter.targets'"),
    "a reference to a setting": ("name: run", "name: ${train.lr}", "'name'"),
    "a key": ("name: run", "${oc.env:SECRET}: run", r"'\$\{oc\.env:SECRET\}'"),
}


@pytest.mark.parametrize(("old", "new", "named"), SECRETS.values(), ids=SECRETS)
def test_a_file_looks_nothing_up(monkeypatch, old, new, named):
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(ConfigError, match=f"x.yaml: {named} has") as caught:
        load(compose([]).text().replace(old, new, 1), "x.yaml")
    assert "hunter2" not in str(caught.value)


def test_what_was_typed_is_kept_and_not_looked_up(monkeypatch):
    monkeypatch.setenv("LR", "0.5")
    typed = ["train.lr=${oc.env:LR}", "method.client.lr=${train.lr}"]
    experiment = compose(typed)
    assert (experiment.train.lr, experiment.method.client["lr"]) == (0.5, 0.5)  # their own word, on their own machine
    assert experiment.overrides == ["train.lr=0.5", "method.client.lr=0.5"]
    assert load(experiment.text()) == experiment
    assert load(dataclasses.replace(experiment, overrides=typed).text()).overrides == typed


def test_the_table_has_our_files_and_what_conf_names():
    assert {target.split(".")[0] for target in table()} == {"strategies", "clients", "fedtune"}
    core = {target for target in table() if target.startswith("fedtune.") and ".codecs." not in target}
    assert core == {"fedtune.training.zeroth_order.Rules", "fedtune.training.projection.Projection"}


@pytest.mark.slow
def test_a_class_of_ones_own_is_made_from_ones_own_words_and_wants_a_word_from_a_folder(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert main(["run", *SMALL, "method.client._target_=mischief.Mischief", "rounds=1", f"out={out}"]) == 0
    assert main(["run", f"resume={out}", "rounds=2"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"fedtune: {out / 'config.yaml'}: method.client wants 'mischief.Mischief' made.")
    assert said.endswith("FEDTUNE_TARGETS=mischief.Mischief\n")
    assert main(["export", str(out), str(tmp_path / "model")]) == 1
    assert "FEDTUNE_TARGETS=mischief.Mischief" in capsys.readouterr().err
    monkeypatch.setenv("FEDTUNE_TARGETS", "mischief.Mischief")
    assert main(["run", f"resume={out}", "rounds=2"]) == 0
    assert main(["export", str(out), str(tmp_path / "model")]) == 0


def test_a_folder_has_nothing_looked_up_by_its_words(tmp_path, monkeypatch, capsys):
    """Its words are composed again where more are given with resume=."""
    monkeypatch.setenv("SECRET", "hunter2")
    (tmp_path / "config.yaml").write_text(dataclasses.replace(compose([]), overrides=["name=${oc.env:SECRET}"]).text())
    assert main(["run", f"resume={tmp_path}", "rounds=5"]) == 1
    said = capsys.readouterr().err
    assert "asks this machine for a value" in said
    assert "hunter2" not in said
