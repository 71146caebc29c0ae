"""The benchmark of seeded noise runs from end to end; its figures are for a quiet machine."""

import pytest

from simulations.benchmarks import seeded


@pytest.mark.slow
def test_the_quick_form_prints_every_line(capsys):
    assert seeded.main(["--quick", "--threads", "1"]) == 0
    told = capsys.readouterr().out
    for what in (
        "replaying 8 seeds",
        "one FedKSeed step",
    ):
        assert what in told


def test_a_ratio_is_ours_over_theirs():
    assert seeded.Line("a", 2.0, "b", 4.0).ratio == 0.5
    took = seeded.best(3, quick=lambda: None, slow=lambda: sum(range(10_000)))
    assert 0 < took["quick"] < took["slow"]
