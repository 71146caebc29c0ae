"""Who takes part, by hand and by count.

Tiers. Seven clients need 3, 1, 2, 9, 1, inf and 5 seconds: by speed (ties by index) 1, 4, 2, 0, 6, 3, 5. So three tiers
are [1, 4, 2], [0, 6], [3, 5]. A cohort of four fills up

    from the first    1, 2, 4, and one of 0, 6
    from the second   0, 6, and two of 1, 2, 4, for of two tiers as near the faster comes first
    from the third    3, 5, 0, 6

Candidates. Of clients with 1, 2 and 3 samples, drawn one after another without repetition, {k, l} come first with

    P{0, 1} = 1/6 2/5 + 2/6 1/4 = 3/20      P{0, 2} = 1/6 3/5 + 3/6 1/3 = 4/15      P{1, 2} = 2/6 3/4 + 3/6 2/3 = 7/12

Of three candidates the two of the highest losses go. So with losses 0.1, 0.2 and 0.3, cohort 1 of 2 candidates takes
client 1 with 3/20 and client 2 with 17/20, and client 0 never.

Counts are held to 5 standard errors, sqrt(n p (1 - p)), of n draws; seeds are fixed, so nothing is left to chance.
"""

import math
from collections import Counter
from itertools import combinations

import pytest
from conftest import rows, run_on
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.errors import ConfigError, QuorumError
from fedtune.planning.client_sampling import BELIEVED, PATIENCE, RULES, believed, select
from fedtune.planning.population import sample_cohort
from fedtune.runtime.app import make_client_app
from fedtune.runtime.local import LocalGrid

SECONDS = {0: 3.0, 1: 1.0, 2: 2.0, 3: 9.0, 4: 1.0, 5: math.inf, 6: 5.0}
TIERS = ({1, 2, 4}, {0, 6}, {3, 5})


def pick(rule, able, cohort, round=1, seed=0, clients=7, **more):
    return select(rule, seed=seed, round=round, able=able, cohort=cohort, clients=clients, **more)


def expect(counts, probabilities, draws):
    assert counts.keys() <= probabilities.keys()
    for what, p in probabilities.items():
        assert abs(counts[what] - draws * p) <= 5 * math.sqrt(draws * p * (1 - p)), (what, counts[what], draws * p)


@given(st.data())
def test_uniform_over_all_is_what_it_always_was(data):
    clients, seed, number = (data.draw(st.integers(low, 300)) for low in (1, 0, 0))
    cohort = data.draw(st.integers(1, clients))
    mine = select("uniform", seed=seed, round=number, able=range(clients), cohort=cohort, clients=clients)
    assert mine == sample_cohort(clients, cohort, seed, number)


def test_golden_values():
    """permutation(derive_seed(0, "cohort", 1), 7) is [2, 1, 5, 4, 6, 0, 3], and the first who are able go."""
    assert [pick("uniform", range(7), size) for size in (1, 2, 3)] == [[2], [1, 2], [1, 2, 5]]
    assert [pick("uniform", (0, 1, 3, 4, 6), size) for size in (1, 2, 3)] == [[1], [1, 4], [1, 4, 6]]
    samples = {index: index + 1 for index in range(7)}
    drawn = [pick("power_of_choice", range(7), 2, number, samples=samples) for number in (1, 2, 3)]
    assert drawn == [[3, 5], [3, 6], [4, 5]]
    tiers = [pick("speed_tier", range(7), 2, number, seconds=SECONDS, tiers=3) for number in (1, 2, 3)]
    assert tiers == [[0, 6], [3, 5], [2, 4]]


def test_who_is_away_is_passed_over_and_moves_nobody_else():
    order = [2, 1, 5, 4, 6, 0, 3]
    for away in combinations(range(7), 3):
        left = [index for index in order if index not in away]
        for size in (1, 2, 4):
            assert pick("uniform", sorted(left), size) == sorted(left[:size])


@pytest.mark.slow
def test_uniform_is_uniform_over_those_who_are_able():
    counts = Counter(tuple(pick("uniform", [0, 2, 3, 6], 2, number)) for number in range(3000))
    expect(counts, dict.fromkeys(combinations([0, 2, 3, 6], 2), 1 / 6), 3000)


@pytest.mark.slow
def test_candidates_come_by_their_samples_without_repetition():
    """Nobody was heard: all losses are alike, and the cohort is who was drawn first."""
    counts = Counter(
        tuple(pick("power_of_choice", [0, 1, 2], 2, number, samples={0: 1, 1: 2, 2: 3}, candidates=2))
        for number in range(6000)
    )
    expect(counts, {(0, 1): 3 / 20, (0, 2): 4 / 15, (1, 2): 7 / 12}, 6000)
    more = Counter(
        tuple(pick("power_of_choice", [0, 1, 2], 2, number, samples={0: 1, 1: 2, 2: 3}, candidates=3))
        for number in range(6000)
    )
    assert more == counts  # a tie is decided by the order drawn, so a third candidate never comes in


def test_of_the_candidates_those_with_the_highest_losses_go():
    counts = Counter(
        pick(
            "power_of_choice", [0, 1, 2], 1, number,
            samples={0: 1, 1: 2, 2: 3}, losses={0: 0.1, 1: 0.2, 2: 0.3}, candidates=2,
        )[0]
        for number in range(3000)
    )  # fmt: skip
    expect(counts, {1: 3 / 20, 2: 17 / 20}, 3000)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0, 4: 0.0}, [0, 1]),
        ({0: 4.0, 1: 3.0, 2: 2.0, 4: 0.0}, [0, 3]),  # who was never heard goes first
        ({0: 4.0, 1: 3.0, 2: math.nan, 3: 1.0, 4: 9.0}, [2, 4]),  # and so does who said nothing that could be compared
        ({0: -4.0, 1: -3.0, 2: -2.0, 3: -1.0, 4: -0.5}, [3, 4]),
    ],
)
def test_with_everybody_a_candidate_the_losses_alone_decide(losses, expected):
    samples = {index: index + 1 for index in range(5)}
    for number in range(20):
        chosen = pick("power_of_choice", range(5), 2, number, samples=samples, losses=losses, candidates=99)
        assert chosen == expected


def test_candidates_are_twice_the_cohort_unless_told():
    samples, losses = dict.fromkeys(range(7), 10), {index: float(index) for index in range(7)}
    for number in range(50):
        untold, told = (
            pick("power_of_choice", range(7), 2, number, samples=samples, losses=losses, candidates=d)
            for d in (None, 4)
        )
        assert untold == told


def test_who_has_no_samples_is_never_drawn():
    samples = {0: 0, 1: 5, 2: 0, 3: 1}
    assert pick("power_of_choice", range(4), 3, samples=samples) == [1, 3]
    with pytest.raises(QuorumError, match="round 1: none of the 2 clients that are able has a training example"):
        pick("power_of_choice", [0, 2], 1, samples=samples)


@pytest.mark.slow
def test_a_cohort_is_of_one_tier_where_that_has_enough():
    counts = Counter()
    for number in range(3000):
        chosen = pick("speed_tier", range(7), 2, number, seconds=SECONDS, tiers=3)
        counts[tuple(chosen)] += 1
    pairs = {pair: 1 / 3 / math.comb(len(tier), 2) for tier in TIERS for pair in combinations(sorted(tier), 2)}
    expect(counts, pairs, 3000)


@pytest.mark.slow
def test_a_tier_that_is_too_small_is_filled_up_from_the_nearest():
    counts = Counter(tuple(pick("speed_tier", range(7), 4, number, seconds=SECONDS, tiers=3)) for number in range(3000))
    first = {tuple(sorted({1, 2, 4, more})): 1 / 6 for more in (0, 6)}
    second = {tuple(sorted({0, 6, *pair})): 1 / 9 for pair in combinations((1, 2, 4), 2)}
    expect(counts, {**first, **second, (0, 3, 5, 6): 1 / 3}, 3000)


@pytest.mark.slow
def test_tiers_stay_what_they_are_while_devices_come_and_go():
    """Without 4 and 6, they are {1, 2}, {0}, {3, 5}; cut anew, they would be {1, 2}, {0, 3}, {5}."""
    counts = Counter(
        tuple(pick("speed_tier", [0, 1, 2, 3, 5], 2, number, seconds=SECONDS, tiers=3)) for number in range(3000)
    )
    expect(counts, {(1, 2): 1 / 3, (0, 1): 1 / 6, (0, 2): 1 / 6, (3, 5): 1 / 3}, 3000)


def test_whose_speed_is_not_known_is_among_the_slowest():
    known = {index: value for index, value in SECONDS.items() if index not in (4, 5)} | {1: math.nan}
    # By speed: 2, 0, 6, 3, then 1, 4, 5, which nothing is known of
    seen = {tuple(pick("speed_tier", range(7), 3, number, seconds=known, tiers=2)) for number in range(100)}
    assert seen == {*combinations((0, 2, 3, 6), 3), (1, 4, 5)}


def test_one_tier_is_uniform():
    for number in range(20):
        assert pick("speed_tier", range(7), 3, number, seconds=SECONDS, tiers=1) == pick("uniform", range(7), 3, number)


@st.composite
def questions(draw):
    clients = draw(st.integers(1, 40))
    able = draw(st.lists(st.integers(0, clients - 1), min_size=1, unique=True))
    cohort = draw(st.integers(1, 50))
    heard = st.dictionaries(st.integers(0, clients - 1), st.floats(0, 1e3) | st.just(math.inf))
    words = {
        "seed": draw(st.integers(0, 2**40)),
        "round": draw(st.integers(0, 10**6)),
        "cohort": cohort,
        "clients": clients,
        "samples": {index: draw(st.integers(1, 1000)) for index in able},
        "losses": draw(heard),
        "candidates": draw(st.none() | st.integers(cohort, cohort + 20)),
        "seconds": draw(heard),
        "tiers": draw(st.integers(1, clients)),
    }
    return able, words, draw(st.permutations(able))


@given(questions(), st.sampled_from(RULES))
def test_a_cohort_is_as_large_as_it_can_be_of_those_able_and_the_same_in_whatever_order_they_come(question, rule):
    able, words, other = question
    chosen = select(rule, able=able, **words)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(able)
    assert len(chosen) == min(words["cohort"], len(able))
    assert chosen == select(rule, able=other, **words) == select(rule, able=[*other, *able], **words)
    assert all(type(index) is int for index in chosen)


@pytest.mark.parametrize("rule", RULES)
def test_seed_and_round_decide(rule):
    words = {"samples": dict.fromkeys(range(100), 9), "seconds": {i: float(i) for i in range(100)}}
    of = [pick(rule, range(100), 10, number, seed, clients=100, **words) for seed, number in ((0, 1), (0, 2), (1, 1))]
    assert len({tuple(chosen) for chosen in of}) == 3
    assert of[0] == pick(rule, range(100), 10, 1, 0, clients=100, **words)


@pytest.mark.parametrize(
    ("rule", "changed", "error", "said"),
    [
        (
            "unifrom",
            {},
            ConfigError,
            "rule=unifrom is not known: expected uniform, power_of_choice, speed_tier; did you",
        ),
        ("uniform", {"cohort": 0}, ConfigError, "cohort=0 is too small: expected at least 1"),
        ("uniform", {"able": [], "round": 4}, QuorumError, "round 4: none of 7 clients is able to take part"),
        ("uniform", {"able": [3, 7]}, ConfigError, "client 7 can't be chosen: with 7 clients, indices are from 0 to 6"),
        ("speed_tier", {"able": [-1, 2]}, ConfigError, "client -1 can't be chosen"),
        ("power_of_choice", {}, ConfigError, "draws by how many samples clients have"),
        (
            "power_of_choice",
            {"samples": {1: 1}, "candidates": 1},
            ConfigError,
            "candidates=1 is too small: expected at",
        ),
        ("speed_tier", {"tiers": 0}, ConfigError, "tiers=0: expected from 1 to the number of clients, which is 7"),
        ("speed_tier", {"tiers": 8}, ConfigError, "tiers=8: expected from 1 to the number of clients, which is 7"),
    ],
)
def test_what_cannot_be_is_refused_in_words(rule, changed, error, said):
    with pytest.raises(error) as caught:
        pick(rule, **{"able": [1], "cohort": 2, **changed})
    assert said in str(caught.value)


def test_a_loss_is_believed_up_to_ten_times_the_median():
    """Of 1, 2, 3 and 31 the lower median is 2, so that 20 is the most; who failed and said nothing counts as 2."""
    assert BELIEVED == 10
    assert believed({0: 1.0, 1: 2.0, 2: 3.0, 3: 31.0}, [3, 4]) == {0: 1.0, 1: 2.0, 2: 3.0, 3: 2.0, 4: 2.0}
    assert believed({0: 1.0, 1: 2.0, 2: 3.0, 3: 20.0}) == {0: 1.0, 1: 2.0, 2: 3.0, 3: 20.0}
    assert believed({0: -3.0, 1: -2.0, 2: -1.0, 3: 28.0}) == {0: -3.0, 1: -2.0, 2: -1.0, 3: -2.0}
    assert believed({}, [1]) == {}
    assert believed({0: 0.0, 1: 5.0}) == {0: 0.0, 1: 5.0}


def test_who_waits_goes_only_where_others_are_too_few():
    samples = dict.fromkeys(range(4), 1)
    losses = {0: 9.0, 1: 3.0, 2: 2.0, 3: 1.0}
    for number in range(5):
        more = {"samples": samples, "losses": losses, "candidates": 4}
        assert pick("power_of_choice", range(4), 2, number, waiting={0}, **more) == [1, 2]
        assert pick("power_of_choice", range(4), 4, number, waiting={0}, **more) == [0, 1, 2, 3]


@pytest.mark.parametrize("lie", [5.9, 1e5, None], ids=["likely", "beyond belief", "always refused"])
def test_a_lie_about_losses_is_not_in_every_cohort(tmp_path, lie):
    """With everybody a candidate, client 1 says each time that it does worst, or fails each time and so never says.
    What is beyond belief brings it nothing. What could be true brings it PATIENCE cohorts in a row, then it waits."""
    rounds = 2 * PATIENCE + 4
    words = (
        "population.selection=power_of_choice", "population.candidates=4", "population.cohort=2", f"rounds={rounds}",
        "evaluate.every=0", "train.steps=1",
    )  # fmt: skip

    def answer(index, reply):
        if index == 1:
            if lie is None:
                raise ConnectionError("the battery is flat")
            reply.content["metrics"]["train_loss"] = lie
        return reply

    app, inner = ClientApp(), make_client_app()
    app.query()(inner)
    app.train()(lambda message, context: answer(context.node_config["partition-id"], inner(message, context)))
    run_on(LocalGrid, app, tmp_path / "run", *words)
    asked = {int(row["round"]) for row in rows(tmp_path / "run", "ledger.csv")
             if (row["client"], row["direction"], row["part"]) == ("1", "down", "train")}  # fmt: skip
    assert len(asked) < rounds - 1
    assert (len(asked) > 0.75 * rounds) == (lie == 5.9)
