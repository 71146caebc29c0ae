"""Settings: what was typed, and what is said when it was mistyped."""

import dataclasses
import importlib

import pytest
import yaml

from fedtune.config import CONF, build, choices, compose, describe_keys, differences, from_run_config, load
from fedtune.errors import ConfigError
from fedtune.schema import Experiment


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_composes(name):
    assert compose([f"experiment={name}"]).name == name


@pytest.mark.parametrize(
    "group", ["model", "data", "adapter", "population", "runtime", "tracker", "method", "server_optimizer"]
)
def test_every_choice_of_a_group_composes_and_reads_back(group):
    for name in choices(group):
        experiment = compose([f"{group}={name}"])
        assert load(experiment.text()) == experiment


@pytest.mark.parametrize("name", choices("method"))
def test_a_methods_yaml_lists_all_hyper_parameters_and_builds(name):
    composed = compose([f"method={name}"]).method
    for side in (composed.strategy, composed.client):
        module, _, cls = side["_target_"].rpartition(".")
        fields = {item.name for item in dataclasses.fields(getattr(importlib.import_module(module), cls))}
        assert fields == side.keys() - {"_target_"}
        assert dataclasses.is_dataclass(build(side, name))


def test_values_reach_the_experiment():
    experiment = compose(
        ["train.lr=1e-4", "adapter.targets=[q_proj,k_proj]", "data.partition_options={a: 1}", "seed=3"]
    )
    assert experiment.train.lr == 1e-4
    assert experiment.adapter.targets == ["q_proj", "k_proj"]
    assert experiment.data.partition_options == {"a": 1}
    assert experiment.method.client["lr"] == 1e-4
    assert load(experiment.text()) == experiment


def test_a_path_of_ones_own_leaves_the_default_groups_settings_behind():
    experiment = compose(["data.path=mine.jsonl", "model.path=me/mine"])
    assert (experiment.data.partition, experiment.data.partition_by) == ("iid", None)
    assert (experiment.data.name, experiment.model.name) == ("custom", "custom")
    kept = compose(["data=chatterbot", "data.path=mine.jsonl"])
    assert kept.data.partition_by == "topic"


def test_codec_sets_both_directions():
    experiment = compose(["codec=raw"])
    assert experiment.codec_up == experiment.codec_down == {"_target_": "fedtune.codecs.raw.Raw"}


def test_what_depends_on_the_machine_is_recorded():
    experiment = compose(["population.clients=5"])
    assert experiment.runtime.threads >= 1
    assert experiment.population.per_round == 5
    assert compose(["population.clients=50"]).population.per_round == 10


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
        ("train.optimizer=adam", ["did you mean adamw?"]),
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


@pytest.mark.parametrize("name", [name for name in choices("server_optimizer") if name != "none"])
def test_a_server_optimizers_yaml_lists_all_hyper_parameters_and_reads_back(name):
    experiment = compose([f"server_optimizer={name}", "method=krum"])
    module, _, cls = experiment.server_optimizer["_target_"].rpartition(".")
    fields = {item.name for item in dataclasses.fields(getattr(importlib.import_module(module), cls))}
    assert fields == experiment.server_optimizer.keys() - {"_target_"} | {"base"}
    assert experiment.server_optimizer_name == name
    assert load(experiment.text()) == experiment
    assert experiment.sha256 != compose(["method=krum"]).sha256
