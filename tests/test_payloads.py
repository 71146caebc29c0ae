"""What crosses the wire is what the methods say: 4 bytes for each number that a docstring counts, and
a header of at most 128 bytes a tensor.

P(r) is the sum over layers of r (in + out); the tiny model's layers are not square.
"""

import csv
from pathlib import Path

import pytest
from conftest import SMALL
from fedtune.workspace.workspace import Party

from fedtune.config.compose import compose
from fedtune.lowrank.algebra import lora_factors

HEADER = 128
FEW = f"data.path={Path(__file__).with_name('pairs.jsonl')}"  # few and short examples


def sides():
    """(out, in) of every adapted layer."""
    model = Party(compose([*SMALL, FEW])).model
    return [(p.b.shape[0], p.a.shape[1]) for p in lora_factors(model.layout.initial).values()]


def both(r):
    return lambda m, n: r * (m + n)


def only_a(r):
    return lambda m, n: r * n


def only_b(r):
    return lambda m, n: r * m


EQUAL = {
    "zero_pad": (both(8), both(8)),
    "hetlora": (both(8), both(8)),
    "raflora": (both(8), both(8)),
    "ffa_lora": (only_b(8), only_b(8)),
    "fedsa_lora": (only_a(8), only_a(8)),
    "fed_sb": (lambda m, n: 64, lambda m, n: 64),
}


def payloads(folder):
    with (folder / "ledger.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            if row["part"] == "train":
                yield int(row["round"]), int(row["peer"]), row["direction"], int(row["payload_bytes"])


def check(payload, count, tensors):
    assert 4 * count <= payload <= 4 * count + HEADER * max(tensors, 1), (payload, 4 * count)


@pytest.mark.parametrize("method", EQUAL)
def test_with_equal_ranks(method, small_run):
    layers = sides()
    up, down = EQUAL[method]
    for _, _, direction, payload in payloads(small_run(f"method={method}", FEW)):
        check(payload, sum((up if direction == "up" else down)(m, n) for m, n in layers), 2 * len(layers))


@pytest.mark.parametrize(
    ("method", "numbers"), [("zero_pad", both), ("raflora", both), ("hetlora", both), ("ffa_lora", only_b)]
)
def test_with_mixed_ranks_each_client_pays_for_its_own(method, numbers, small_run):
    layers, ranks = sides(), [8, 4, 2]
    words = (f"method={method}", FEW, "population.ranks=[8,4,2]", "population.cohort=4")
    seen = set()
    for _, peer, _, payload in payloads(small_run(*words)):
        check(payload, sum(numbers(ranks[peer % 3])(m, n) for m, n in layers), 2 * len(layers))
        seen.add(peer)
    assert seen == {0, 1, 2, 3}


def test_rolora_moves_one_factor_each_way_once_everybody_is_there(small_run):
    layers = sides()
    a, b = (sum(each(8)(m, n) for m, n in layers) for each in (only_a, only_b))
    up = {1: b, 2: a, 3: b, 4: a}
    down = {1: 0, 2: b, 3: a, 4: b}
    for number, _, direction, payload in payloads(small_run("method=rolora", FEW, "population.cohort=4", rounds=4)):
        check(payload, (up if direction == "up" else down)[number], len(layers))
