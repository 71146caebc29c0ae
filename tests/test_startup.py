"""What happens before the first round: little, and the same as ever."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import PAIRS, SMALL
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.schema import DataSpec
from fedtune.core.seeds import derive_seed
from fedtune.data import token_cache
from fedtune.data.corpus import Corpus, Question
from fedtune.data.partition import _partitioner, divide
from fedtune.data.sources import Example, load_examples
from fedtune.data.token_cache import kept_or
from fedtune.data.tokenisation import tokenise
from fedtune.models.tiny import tiny_tokenizer


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of the test's own, and a tokenise that counts."""
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return tokenise(*arguments)

    return calls, lambda examples, spec, tokenizer=None: kept_or(
        counting, examples, tokenizer or tiny_tokenizer(), spec
    )


def same(one, other):
    (a, kept), (b, also) = one, other
    assert kept == also
    for name in ("tokens", "targets", "starts"):
        first, second = getattr(a, name), getattr(b, name)
        assert first.dtype == second.dtype
        assert np.array_equal(first, second)


SPEC = DataSpec(path=str(PAIRS))


def test_the_same_rows_are_tokenised_once(cached):
    calls, load = cached
    examples = load_examples(SPEC)
    same(load(examples, SPEC), tokenise(examples, tiny_tokenizer(), SPEC))
    same(
        load(list(examples), DataSpec(path="elsewhere.jsonl", partition="linear")),
        tokenise(examples, tiny_tokenizer(), SPEC),
    )
    assert len(calls) == 1


def test_whatever_the_tokens_follow_from_is_in_the_key(cached):
    calls, load = cached
    examples = load_examples(SPEC)
    load(examples, SPEC)
    other = tiny_tokenizer()
    other.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    changed = [*examples[:-1], Example(examples[-1].messages, "", {"more": "in a column"})]
    load(changed, SPEC)
    load(examples[::-1], SPEC)
    load(examples, DataSpec(path=str(PAIRS), max_length=20))
    load(examples, DataSpec(path=str(PAIRS), loss_on="all"))
    load(examples, SPEC, other)
    assert len(calls) == 6


def test_a_damaged_file_is_made_anew(cached, tmp_path):
    calls, load = cached
    examples = load_examples(SPEC)
    made = load(examples, SPEC)
    (path,) = (tmp_path / "tokens").iterdir()
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    same(load(examples, SPEC), made)
    same(load(examples, SPEC), made)
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_costs_nothing(cached, tmp_path):
    calls, load = cached
    (tmp_path / "tokens").touch()
    for _ in range(2):
        assert len(load(load_examples(SPEC), SPEC)[0]) > 100
    assert len(calls) == 2


def test_the_cache_is_bounded(cached, tmp_path, monkeypatch):
    """Three corpora of about 8 kB in 20 kB: the two that were made last stay. One of more than half goes in never."""
    calls, load = cached
    examples = load_examples(SPEC)
    for count in (20, 21, 22):
        load(examples[:count], SPEC)
    size = max(file.stat().st_size for file in (tmp_path / "tokens").iterdir())
    monkeypatch.setattr(token_cache, "KEPT_BYTES", 3 * size)
    for count in (23, 24):
        load(examples[:count], SPEC)
    assert len(list((tmp_path / "tokens").iterdir())) in (2, 3)
    load(examples[:24], SPEC)
    assert len(calls) == 5
    load(examples, SPEC)
    assert len(list((tmp_path / "tokens").iterdir())) in (2, 3)


def test_questions_are_not_kept(cached, tmp_path):
    corpus = Corpus(np.arange(3, dtype=np.int32), np.ones(3, dtype=bool), np.array([0, 3]), {0: Question((), 0)})
    made = corpus, [0]
    assert kept_or(lambda *_: made, [], tiny_tokenizer(), SPEC) is made
    assert not (tmp_path / "tokens").exists()


@given(st.integers(1, 60), st.integers(1, 20))
def test_equal_parts_are_those_of_flower_datasets(count, clients):
    """datasets.Dataset.shard, contiguous: the first `count % clients` parts are one longer."""
    spec = DataSpec(partition="iid")
    sizes = [count // clients + (client < count % clients) for client in range(clients)]
    parts = divide(spec, [{}] * count, clients, 0)
    assert [len(part) for part in parts] == sizes
    assert np.concatenate(parts).tolist() == list(range(count))


@pytest.mark.parametrize("partition", ["linear", "dirichlet", "pathological", "shard", "natural"])
def test_places_are_those_that_a_partitioner_loads(partition):
    """One partition after the other, each as a data set of its own, is what flwr-datasets would have us do."""
    labels = [{"label": f"l{(7 * place) % 5}"} for place in range(120)]
    spec = DataSpec(partition=partition, partition_by=None if partition == "linear" else "label", alpha=5.0)
    partitioner = _partitioner(spec, 5, derive_seed(0, "partition") % 2**32)
    partitioner.dataset = Dataset.from_dict({"place": range(120), "label": [row["label"] for row in labels]})
    expected = [list(partitioner.load_partition(client)["place"]) for client in range(5)]
    assert [part.tolist() for part in divide(spec, labels, 5, 0)] == expected


# Seconds of imports that a run in one process has no use for
HEAVY = (
    "seaborn",
    "matplotlib",
    "flwr.superlink.grid",
    "torch._inductor.compile_fx",
    "ray",
    "flwr_datasets.visualization",
)
RUN = f"""
import sys
from fedtune.commands.main import main
code = main(sys.argv[1:])
print("imported", [name for name in {HEAVY} if name in sys.modules])
import flwr_datasets.visualization  # who wants it gets it
assert flwr_datasets.visualization.plot_label_distributions
sys.exit(code)
"""


def test_a_run_imports_nothing_heavy_that_it_does_not_use(tmp_path):
    """With a partition that flwr-datasets makes."""
    words = ["run", *SMALL, "data.partition=linear", "rounds=1", "out=run"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported []"
