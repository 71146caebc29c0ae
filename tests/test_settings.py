"""The engine's names in an instruction's settings: what they are on the wire, and that no method's rules take one."""

from dataclasses import dataclass

import pytest

from fedtune.codecs.raw import Raw
from fedtune.core.errors import ConfigError
from fedtune.core.protocol import Instruction
from fedtune.core.settings import EngineSetting, SharedRules, told
from fedtune.wire.flower_private import content_bytes
from fedtune.wire.messages import pack_instruction, unpack_instruction


def test_the_names_on_the_wire():
    """They are what bytes are counted of, and what older clients read: none may change."""
    assert {name.value for name in EngineSetting} == {
        "run", "version", "builds_on", "rank", "scaling", "train", "batch_size", "bits", "steps",
    }  # fmt: skip
    named = Instruction({}, {EngineSetting.BITS: 4, EngineSetting.TRAIN: "lora_B"})
    plain = Instruction({}, {"bits": 4, "train": "lora_B"})
    assert named == plain
    contents = [pack_instruction(one, Raw(), 0, "id") for one in (named, plain)]
    assert content_bytes(contents[0]) == content_bytes(contents[1])
    assert unpack_instruction(contents[0], Raw()) == (plain, "id")


@pytest.mark.parametrize("name", EngineSetting)
def test_rules_that_would_steer_the_engine_are_refused_once(name):
    with pytest.raises(ConfigError, match=rf"Mine\.{name}: an instruction's setting '{name}' is the engine's"):
        type("Mine", (SharedRules,), {"__annotations__": {"eps": float, str(name): int}})


def test_rules_are_told_field_by_field():
    @dataclass(frozen=True)
    class Mine(SharedRules):
        eps: float = 0.5
        local_steps: int = 2

    assert told(Mine()) == {"eps": 0.5, "local_steps": 2}
