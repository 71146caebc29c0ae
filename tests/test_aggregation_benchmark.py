"""The benchmark of the server's algebra still runs, on toy layers; its figures are for a quiet machine."""

import pytest

from simulations.benchmarks import aggregation


@pytest.mark.slow
def test_quick_prints_every_method(monkeypatch, capsys):
    calls = {"dense": aggregation.dense, "fedit": aggregation.averaging}
    seen = {}

    def here(what, size):
        seen[what] = calls[what](size) if what in calls else aggregation.measure(what, size)
        return seen[what]

    monkeypatch.setattr(aggregation, "alone", here)
    aggregation.main(["--quick"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("flexlora", "florist", "flora", "fedex_lora", "FedIT"))
    assert seen["dense"]["apart"] < 1e-12
    assert all(value > 0 for value in seen["fedit"].values())


@pytest.mark.slow
def test_one_measurement_comes_back_from_a_process_of_its_own():
    found = aggregation.alone("fedex_lora", aggregation.QUICK)
    size = aggregation.QUICK
    assert found["inputs"] == 4 * size.clients * size.layers * size.rank * 2 * size.width
    assert found["seconds"] > 0
