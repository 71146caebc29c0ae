"""`fedtune run`: one experiment, begun or gone on with, and the list of all its settings."""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedtune.commands import Subparsers
from fedtune.core.errors import ConfigError, Interrupted

TEXT = """\
usage: fedtune run [key=value ...]

Run a federated experiment and write it to a folder.

  fedtune run experiment=demo
  fedtune run model=smollm2 data=chatterbot rounds=10 train.lr=1e-3 out=runs/first
  fedtune run model.path=Qwen/Qwen2.5-0.5B-Instruct data.path=mine.jsonl population.clients=8
  fedtune run model=smollm2 method=fedprox server_optimizer=fedadam
  fedtune run model=smollm2 model.quantization=nf4 population.clients=300 population.cohort=30
  fedtune run runtime=ray runtime.cpus=1 experiment=hundreds
  fedtune run runtime=flower runtime.superlink=site population.clients=3 model=smollm2
  fedtune run resume=runs/first rounds=20
"""


def add_parser(commands: Subparsers) -> None:
    """Add the command to argparse's subparsers."""
    parser = commands.add_parser(
        "run", help="run an experiment (fedtune run --help lists every setting)", add_help=False
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.set_defaults(func=main)


def main(options: argparse.Namespace) -> int:
    """Do what the words ask for; returns the exit code.

    Raises:
        FedtuneError: if it can't be done.
    """
    from fedtune.core.signals import as_ctrl_c

    if options.help:
        print_help()
        return 0
    try:
        with as_ctrl_c():
            run(options.overrides)
    except KeyboardInterrupt:  # later the round loop says how to go on
        raise Interrupted("interrupted before the first round") from None
    return 0


def run(overrides: Sequence[str]) -> Path | None:
    """Run or resume the experiment that the words describe.

    Returns:
        The run's folder, as `fedtune.runtime.start.start` has it.

    Raises:
        FedtuneError: if it can't be set up or can't go on.
    """
    from fedtune.config.compose import check_words, compose, differences, load_file
    from fedtune.device.owner import check_targets, user
    from fedtune.runtime.start import start

    resume = [word.removeprefix("resume=") for word in overrides if word.startswith("resume=")]
    others = [word for word in overrides if not word.startswith("resume=")]
    if not resume:
        return start(compose(others), None)
    folder = Path(resume[-1]).expanduser()
    stored = folder / "config.yaml"
    if not stored.is_file():
        raise ConfigError(f"resume={folder} holds no run (no config.yaml): give the folder that out= named")
    experiment = load_file(stored)
    check_targets(experiment, f"{stored}: ", user().targets)  # it may be another's
    if others:
        check_words(experiment.overrides, str(stored))
        # What the same words would give today, with the new ones: only then is a difference the new words' doing
        words = {word.partition("=")[0]: word for word in [*experiment.overrides, *others]}
        before, asked = compose(experiment.overrides), compose(list(words.values()))
        if changed := differences(before.fixed(), asked.fixed()):
            raise ConfigError(
                f"resume={folder} goes on with the settings it was started with, but these differ: "
                f"{'; '.join(changed)}. Leave them out, or start a new run with out="
            )
        experiment = replace(
            experiment,
            rounds=asked.rounds,
            budget=asked.budget,
            tracker=asked.tracker,
            keep=asked.keep,
            overrides=asked.overrides,
        )
    return start(experiment, str(folder))


def print_help() -> None:
    """Usage, the groups with their choices, and every setting with its default."""
    from fedtune.config.compose import choices, describe_keys, groups

    print(TEXT)
    print("Groups: swap a whole section")
    for group in groups():
        if group != "codec":
            _print_wrapped(f"  {group + '=':<17} ", ", ".join(choices(group)), 100)
    offered = f"{', '.join(choices('codec'))}   (codec_down= likewise; codec= sets both)"
    _print_wrapped(f"  {'codec_up=':<17} ", offered, 100)
    print("\nSettings: change one value                    default      meaning")
    for key, default, help in describe_keys():
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        _print_wrapped(f"  {key + '=':<28} {shown:>26}   ", help, 140)
    print("\nA data or model group may set another default; the composed whole is in the run's config.yaml.")


def _print_wrapped(head: str, text: str, width: int) -> None:
    print(textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head)))
