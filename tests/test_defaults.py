"""Defaults stand in a class and in its YAML, which Hydra needs to know what may be overridden and at what it starts.

So the YAML names every setting of its class, and where it says another value than the class, that is meant and in
`OTHERWISE`.
"""

from dataclasses import MISSING, fields

import pytest
import yaml
from hydra.utils import get_class

from fedtune.config.compose import CONF

# What a choice sets to another value than its class has by itself
OTHERWISE = {
    "method/decomfl: strategy.rules.perturbations": 5,  # as in the authors' experiments
    "method/fedprox: client.mu": 0.01,  # which makes FedProx of FedIT
    "method/full_delta: client.dense": True,  # which makes the oracle of FLoRA
}
FILES = sorted(
    path.relative_to(CONF).with_suffix("").as_posix()
    for group in ("method", "codec", "server_optimizer")
    for path in (CONF / group).glob("*.yaml")
    if path.stem != "none"
)


def described(spec, path):
    """Every class that a choice names, with its settings and where they are."""
    if isinstance(spec, dict):
        if "_target_" in spec:
            yield path, get_class(spec["_target_"]), {key: value for key, value in spec.items() if key != "_target_"}
        for key, value in spec.items():
            yield from described(value, f"{path}.{key}" if path else key)


@pytest.mark.parametrize("name", FILES)
def test_a_choice_names_every_setting_and_says_what_the_class_does(name):
    found = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    if "method" in found:
        found = found["method"]
    for path, kind, said in described(found, ""):
        known = {item.name: item for item in fields(kind) if item.init and "by_engine" not in item.metadata}
        # Whether a codec has error feedback is for whoever keeps what is left out (fedtune/wire/delta_coding.py)
        said = {key: value for key, value in said.items() if key != "feedback"}
        inside = {"base"} if name.startswith("server_optimizer") else {"feedback"}  # put there by `Experiment.strategy`
        assert said.keys() - inside == known.keys() - inside, f"{name}: {path}"
        for key, value in said.items():
            default = known[key].default
            if default is MISSING or isinstance(value, dict) or (isinstance(value, str) and value.startswith("${")):
                continue
            place = f"{name}: {path}.{key}".replace(": .", ": ")
            assert value == OTHERWISE.get(place, default), place
            assert place not in OTHERWISE or value != default, f"{place} is as in the class"
