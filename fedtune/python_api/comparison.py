"""`fedtune.compare`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.comparisons.plan import DEFAULT_OUT, OWN
from fedtune.python_api.loaded_run import Run, load_run
from fedtune.python_api.overrides import list_word, printing, word, words_of
from fedtune.report.page import PAGE
from fedtune.runs.comparison_file import read_comparison

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Comparison:
    """What a comparison came to.

    Attributes:
        path: its folder, with the page, the figures, the tables and a folder for each run.
    """

    path: Path

    @property
    def page(self) -> Path:
        """The page, one HTML file that opens without a network."""
        return self.path / PAGE

    @cached_property
    def results(self) -> "DataFrame":
        """A line for each run and round: label, method, codecs, seed, and the columns of `Run.metrics`."""
        from pandas import read_parquet

        return read_parquet(self.path / "results.parquet")

    @cached_property
    def summary(self) -> "DataFrame":
        """A line for each entry of every table of the page: means over seeds with 95 % intervals, the difference from
        the reference, p and the verdict, after equal rounds, bytes and seconds."""
        from pandas import read_csv

        return read_csv(self.path / "summary.csv")

    @cached_property
    def failures(self) -> "DataFrame":
        """What failed, by label and seed, and why. Empty if nothing did."""
        from pandas import DataFrame

        found = read_comparison(self.path).failures
        return DataFrame([vars(failure) for failure in found], columns=["label", "seed", "reason"])

    @cached_property
    def runs(self) -> dict[tuple[str, int], Run]:
        """Its runs by label and seed: `comparison.runs["fedit", 0]`."""
        found = self.results[["label", "seed", "folder"]].drop_duplicates()
        return {(label, seed): load_run(self.path / folder) for label, seed, folder in found.itertuples(index=False)}


def compare(
    *overrides: str,
    methods: Sequence[str] | str | None = None,
    codecs: Sequence[str] | str | None = None,
    seeds: Sequence[int] | None = None,
    jobs: int | None = None,
    out: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Comparison:
    """Run methods x codecs x seeds, as `fedtune compare` does, and make a page of what came out.

    What is finished in the folder is not run again; what was stopped or failed goes on where it stood. Runs go on in
    processes of their own.

    Args:
        overrides: `key=value` words as on the command line.
        methods: names, or "all"; an item may bring settings and a label: "slow: fedit train.lr=1e-4". None is fedit.
        codecs: what messages look like on the wire; None leaves it to each method.
        seeds: a run for each; None is 0, 1, 2.
        jobs: runs at a time; None is one a core, and one beside a GPU.
        out: the comparison's folder; None is runs/compare.
        quiet: print nothing.
        settings: settings of all runs by name, as for `fedtune.run`; `tune__lr=[...]` and `budget__bytes=` too.

    Returns:
        The comparison. A run that failed is a line of its `failures`, and the others went on.

    Raises:
        FedtuneError: if nothing can be run, or no run came to anything.

    Example:
        >>> found = fedtune.compare("experiment=demo", methods=["fedit", "flora"], seeds=[0, 1, 2], out="runs/two")
        >>> found.results.pivot_table("eval_loss", "round", "label")
        >>> found.page
    """
    from fedtune.comparisons.run import compare as compare_words

    own = {"methods": methods, "codecs": codecs, "seeds": seeds, "jobs": jobs}
    words = [list_word(key, value) for key, value in own.items() if value is not None]
    for name, value in settings.items():
        key = name.replace("__", ".")
        words.append((list_word if key in OWN or key.startswith("tune.") else word)(key, value))
    typed = [*words_of(overrides, {}), *words]
    if out is not None:
        typed.append(f"out={os.fspath(out)}")
    named = [text.removeprefix("out=") for text in typed if text.startswith("out=")]
    with printing(quiet):
        compare_words(typed)
    return Comparison(Path(named[-1] if named else DEFAULT_OUT).expanduser())
