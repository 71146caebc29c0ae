"""Runs of one process share a base and a corpus, and no number of one reaches another."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from conftest import PAIRS

from fedtune.commands.main import main
from fedtune.config.schema import DataSpec, ModelSpec
from fedtune.core.caches import once, sharing
from fedtune.models.base import pick_device
from fedtune.models.shared_base import base_for

pytestmark = pytest.mark.slow

RUN = (
    "model=tiny",
    f"data.path={PAIRS}",
    "data.partition=iid",
    "rounds=1",
    "population.clients=2",
    "train.steps=1",
    "runtime.threads=1",
    "evaluate.examples=8",
)
WORDS = (
    ("method=fedit",),
    ("method=flora",),
    ("method=fedit", "adapter=pissa"),
    ("method=full_delta", "model.merge=requantize"),
    ("method=fedit", "adapter=none", "train.lr=1e-3"),
    ("method=fedkseed", "method.strategy.rules.local_steps=2"),
    ("method=fedit", "adapter=prefix_tuning"),
    ("method=fedit",),
)


def state(words: tuple[str, ...], out: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["run", *RUN, *words, f"out={out}"]) == 0
    return str(json.loads((out / "summary.json").read_text())["state_sha256"])


def test_a_run_after_others_has_the_bits_of_one_alone(tmp_path: Path):
    with sharing():
        after = [state(words, tmp_path / f"shared-{place}") for place, words in enumerate(WORDS)]
    alone = [state(words, tmp_path / f"alone-{place}") for place, words in enumerate(WORDS[:-1])]
    assert after == [*alone, alone[0]]


def test_one_base_in_memory_and_modules_of_ones_own():
    spec, device = ModelSpec(name="tiny"), pick_device("cpu")
    with sharing():
        first, second, own = (base_for(spec, device, changes) for changes in (False, False, True))
        for mine, others, copied in zip(
            first.model.parameters(), second.model.parameters(), own.model.parameters(), strict=True
        ):
            assert mine is not others
            assert mine.data_ptr() == others.data_ptr() != copied.data_ptr()
            assert (mine == copied).all()
        assert first.model is not second.model
        assert first.tokenizer is second.tokenizer
    assert base_for(spec, device, False).model is not base_for(spec, device, False).model
    first_alone, second_alone = (next(base_for(spec, device, False).model.parameters()) for _ in range(2))
    assert first_alone.data_ptr() != second_alone.data_ptr(), "nothing is kept where nothing is shared"


def test_what_is_made_once_is_made_once():
    made: list[int] = []

    def make() -> int:
        made.append(1)
        return len(made)

    assert [once("key", make), once("key", make)] == [1, 2]
    with sharing():
        assert [once("key", make), once("key", make), once("other", make)] == [3, 3, 4]
    assert once("key", make) == 5


def test_data_are_read_once_however_they_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fedtune.data import federated_data
    from fedtune.models.tiny import tiny_tokenizer

    read = []
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"q{i}", "completion": f"a{i}"}) for i in range(40)))
    load = federated_data.load_examples
    monkeypatch.setattr(federated_data, "load_examples", lambda spec: read.append(1) or load(spec))
    tokenizer = tiny_tokenizer()
    with sharing():
        divided = [
            federated_data.load_data(DataSpec(path=str(path), partition=partition), 3, tokenizer, seed)
            for partition, seed in (("iid", 0), ("iid", 1), ("linear", 1))
        ]
        federated_data.load_data(DataSpec(path=str(path), max_length=40), 3, tokenizer, 0)
    assert len(read) == 2, "once, and again for other tokens"
    assert divided[0].corpus is divided[1].corpus is divided[2].corpus
    assert not all((a == b).all() for a, b in zip(divided[0].train, divided[1].train, strict=True))
