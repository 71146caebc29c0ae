"""`fedtune.run`."""

import os
from typing import Any

from fedtune.core.errors import RunFolderError
from fedtune.python_api.loaded_run import Run, load_run
from fedtune.python_api.overrides import printing, words_of


def run(*overrides: str, resume: str | os.PathLike[str] | None = None, quiet: bool = False, **settings: Any) -> Run:
    """Run a federated experiment, as `fedtune run` does, and load what came of it.

    The run goes on in this process (runtime=local), and prints what it prints in a terminal.

    Args:
        overrides: `key=value` words as on the command line; `fedtune run --help` lists the keys.
        resume: the folder of a run to go on with; then `rounds` and the budget alone may be others.
        quiet: print nothing.
        settings: settings by name, with `__` for a dot: `rounds=2, train__lr=1e-3`. None is null; lists and dicts are
            as they are; a string is what one would type after `key=`.

    Returns:
        The finished run.

    Raises:
        FedtuneError: of a kind that says what is wrong (fedtune.errors): ConfigError for settings, DataError,
            ModelError, QuorumError, RunFolderError, Interrupted and others. What the run wrote by then can be loaded
            and resumed.

    Example:
        >>> run = fedtune.run("method=fedit", "model=tiny", rounds=2, train__lr=1e-3, out="runs/first")
        >>> run.metrics[["round", "eval_loss"]]
        >>> run = fedtune.run(resume="runs/first", rounds=4)
    """
    from fedtune.commands.run import run as run_words

    words = words_of(overrides, settings)
    if resume is not None:
        words.append(f"resume={os.fspath(resume)}")
    with printing(quiet):
        folder = run_words(words)
    if folder is None or not folder.is_dir():
        raise RunFolderError(
            f"the run has ended, and its folder {'' if folder is None else f'{folder} '}is on the machine of the "
            "SuperLink: load it there, by fedtune.load_run"
        )
    return load_run(folder)
