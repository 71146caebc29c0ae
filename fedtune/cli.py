"""The command line."""

import argparse
import ast
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedtune import __version__, cli_evaluate
from fedtune.core.broken_pipe import outlast_readers
from fedtune.core.errors import ConfigError, FedtuneError, Interrupted
from fedtune.core.signals import as_ctrl_c
from fedtune.report.command import COMMANDS, add_parsers, handle

SUMMARY = """\
Federated fine-tuning of language models: many clients, one base, and the true cost of each method.

  fedtune run experiment=demo          fine-tune SmolLM2 across 20 clients
  fedtune run model=tiny rounds=2      the same in seconds, on a toy model
  fedtune run resume=runs/demo         go on with a run that was stopped
  fedtune compare 'methods=[fedit,flora]'   several, over seeds, and a page of what came out
  fedtune plan population=mixed        what each device would be asked, and what that takes
  fedtune report runs                  compare runs on one page
  fedtune serve runs                   the same page, while they go on
  fedtune evaluate runs/demo           how good its model is
  fedtune export runs/demo tuned       its model as a Hugging Face folder
  fedtune compress adapter small       a PEFT adapter, many times smaller
  fedtune methods                      what method= can be
  fedtune doctor                       what this device can do, as a profile
"""

RUN = """\
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

PLAN = """\
Print what a round would ask of each client and what that takes on its device: layers and ranks, batch, bits of the
base, memory, seconds, bytes; who can't take part, and why. Nothing is trained. The settings are those of fedtune run.

  fedtune plan population=mixed model=smollm2 method=fedpipe population.deadline=60
  fedtune plan population.devices=mine.csv model=smollm2 method=fedit --csv plan.csv
"""

EXPORT = """\
Write the model of a run as a Hugging Face folder, with its tokenizer: the trained weights, or the base with the
adapter merged into it.

  fedtune export runs/demo tuned
  fedtune export model.fedtune tuned                      the small file of a run along seeded directions
  fedtune export model.fedtune tuned --base models/smol   where the base is on this machine
"""

COMPRESS = """\
Write a PEFT adapter (adapter_config.json and adapter_model.safetensors) into a new folder, many times smaller, and say
what that cost: the error is measured on what the new folder decodes to.

  fedtune compress runs/demo/adapter small                 ComPEFT (arXiv:2311.13171)
  fedtune compress trained small --start initial           of what training changed
  fedtune compress trained small --codec topk codec.density=0.1
  fedtune decompress small again --start initial

ComPEFT, topk and stc are meant for updates: of all values they keep the largest few, and make the others zero. An
adapter's A matrices begin as random numbers, most of which would be lost, so give --start wherever you have the adapter
that training began with. Decompressing needs it again.
"""

DECOMPRESS = """\
Make the PEFT folder again that fedtune compress made smaller.

  fedtune decompress small adapter
  fedtune decompress small adapter --start initial         if it was compressed with --start
"""

DOCTOR = """\
Measure what this device can do, and write its profile: memory that is free, what training sustains, whether quantized
bases can be trained here, and, with --server, what the link to it carries. It takes about 20 seconds.

  fedtune doctor                                      to device.csv in this device's home, for population=measured
  fedtune doctor --server server.example.org:9000     and the network, if this runs there:
  fedtune doctor --listen 0.0.0.0:9000                the other end of it, until Ctrl-C
"""


COMPARE = """\
Run methods x codecs x seeds in one folder, all by the same rules, and make a page of what came out. What is finished
there is not run again; what was stopped or failed goes on where it stood. All other settings are those of fedtune run.

  fedtune compare 'methods=[fedit,flora,ffa_lora]' experiment=demo out=runs/three
  fedtune compare 'methods=[fedit]' 'codecs=[raw,int8,compeft]' 'seeds=[0,1,2,3,4]' rounds=10
  fedtune compare 'methods=[fedit,fedkseed]' rounds=1000 budget.bytes=40e6           equal bytes
  fedtune compare 'methods=[fedit,fedpipe]' population=mixed budget.seconds=600      equal time, of the virtual clock
  fedtune compare 'methods=[fedit,fedadam]' 'tune.lr=[0.3x,1x,3x]'                   each at its own learning rate
  fedtune compare methods=all jobs=4                                                 four runs at a time

  methods=     names, or all. An item may bring settings and a label: 'methods=[fedit,"slow: fedit train.lr=1e-4"]'
  codecs=      what updates and broadcasts look like on the wire; default leaves it to the method
  seeds=       one run for each (default: 0, 1, 2)
  tune.KEY=    values to try for each method on a seed of its own (tune.seed=): the one with the lowest held-out loss is
               taken. tune.lr is the clients' learning rate, and 3x three times what the method has by itself.
               tune.rounds= makes these trials shorter
  budget.      bytes=, seconds= or loss=: a run ends where another round would go beyond it
  jobs=        runs at a time (default: one a core, and one beside a GPU)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 an error that the message explains, 130 interrupted."""
    outlast_readers()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="fedtune", description=SUMMARY, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fedtune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    running = commands.add_parser(
        "run", help="run an experiment (fedtune run --help lists every setting)", add_help=False
    )
    running.add_argument("overrides", nargs="*")
    running.add_argument("-h", "--help", action="store_true")
    comparing = commands.add_parser(
        "compare",
        help="run methods x codecs x seeds, and make a page of them",
        usage="fedtune compare [-h] 'methods=[...]' ['codecs=[...]'] ['seeds=[...]'] [key=value ...]",
        description=COMPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comparing.add_argument("words", nargs="+", metavar="key=value")
    planning = commands.add_parser(
        "plan",
        help="what each device would be asked to do, before anything runs",
        usage="fedtune plan [-h] [--csv FILE] [key=value ...]",
        description=PLAN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    planning.add_argument("overrides", nargs="*", metavar="key=value")
    planning.add_argument("--csv", metavar="FILE", help="write it, with a line for each client")
    exporting = commands.add_parser(
        "export",
        help="write a run's model as a Hugging Face folder",
        description=EXPORT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    exporting.add_argument("source", metavar="FROM", help="a run's folder, or a .fedtune file")
    exporting.add_argument("out", metavar="OUT", help="the folder to make")
    exporting.add_argument("--base", help="the base: a folder, a GGUF file or a hub id (default: what the run had)")
    cli_evaluate.add_to(commands)
    compressing = commands.add_parser(
        "compress",
        help="write a PEFT adapter many times smaller",
        usage="fedtune compress [-h] [--codec NAME] [--start FOLDER] ADAPTER OUT [codec.SETTING=VALUE ...]",
        description=COMPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compressing.add_argument("source", metavar="ADAPTER", help="a PEFT folder, as a run's adapter/")
    compressing.add_argument("out", metavar="OUT", help="the folder to make")
    compressing.add_argument(
        "--codec",
        default="compeft",
        metavar="NAME",
        help="as for fedtune run (default: compeft); its settings likewise",
    )
    compressing.add_argument("--start", metavar="FOLDER", help="the PEFT folder that training began with")
    decompressing = commands.add_parser(
        "decompress",
        help="make the PEFT folder of a compressed adapter",
        description=DECOMPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    decompressing.add_argument("source", metavar="PACKED", help="a folder that fedtune compress made")
    decompressing.add_argument("out", metavar="OUT", help="the folder to make")
    decompressing.add_argument("--start", metavar="FOLDER", help="the PEFT folder that --start was then")
    add_parsers(commands)
    commands.add_parser("methods", help="list the methods, with their papers")
    examining = commands.add_parser(
        "doctor",
        help="measure this device, and write its profile",
        description=DOCTOR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    examining.add_argument(
        "--out", metavar="FILE", help="the profile's file (default: device.csv in the device's home)"
    )
    examining.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    examining.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: all cores)")
    ends = examining.add_mutually_exclusive_group()
    ends.add_argument("--server", metavar="HOST:PORT", help="measure the link to a fedtune doctor --listen there")
    ends.add_argument("--listen", metavar="[HOST:]PORT", help="be that other end (default host: 127.0.0.1)")
    examining.add_argument("--seconds", type=float, default=3.0, metavar="S", help="for each direction (default: 3)")
    if not words:
        parser.print_help()
        return 0
    # argparse takes no list of words on both sides of an option, so the codec's settings are what it doesn't know
    options, others = parser.parse_known_args(words)
    if others and (options.command != "compress" or any(word.startswith("-") for word in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        if options.command == "methods":
            print_methods()
        elif options.command == "compare":
            from fedtune.comparisons.command import compare

            with as_ctrl_c():
                return compare(options.words)
        elif options.command == "plan":
            from fedtune.plan_view import plan

            plan(options.overrides, options.csv)
        elif options.command == "export":
            export(options.source, options.out, options.base)
        elif options.command == "evaluate":
            cli_evaluate.evaluate(options)
        elif options.command == "compress":
            compress(options.source, options.out, options.codec, others, options.start)
        elif options.command == "decompress":
            decompress(options.source, options.out, options.start)
        elif options.command == "doctor":
            doctor(options)
        elif options.command in COMMANDS:
            handle(options)
        elif options.help:
            print_run_help()
        else:
            with as_ctrl_c():
                run(options.overrides)
    except FedtuneError as error:
        if os.environ.get("FEDTUNE_DEBUG"):
            raise
        print(f"fedtune: {error}", file=sys.stderr)
        return 130 if isinstance(error, Interrupted) else 1
    except KeyboardInterrupt:
        before = "before the first round" if options.command == "run" else "before anything was written"
        print(f"fedtune: interrupted {before}", file=sys.stderr)
        return 130
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
            experiment, rounds=asked.rounds, budget=asked.budget, tracker=asked.tracker, overrides=asked.overrides
        )
    return start(experiment, str(folder))


def export(source: str, out: str, base: str | None) -> None:
    """Write a run's model as a folder, and say what was written.

    Raises:
        FedtuneError: if it can't be.
    """
    from fedtune.config.schema import FULL
    from fedtune.export.model_folder import export
    from fedtune.server.progress import size

    done = export(source, out, base)
    of = done.experiment
    merged = "" if of.adapter.kind == FULL else f", adapter={of.adapter.kind} merged into the base"
    print(f"wrote    {done.path}  ({size(done.bytes)})")
    print(f"model    {of.name}: method={of.method_name} after round {done.round}{merged}")
    print(f"base     {done.origin.source}, sha256 {done.origin.sha256}")
    print(f'load     AutoModelForCausalLM.from_pretrained("{done.path}"), AutoTokenizer likewise')


def compress(source: str, out: str, codec: str, words: Sequence[str], start: str | None) -> None:
    """Write an adapter smaller, and say what that saved and cost.

    Raises:
        FedtuneError: if it can't be.
    """
    from fedtune.export.compressed_adapter import compress
    from fedtune.server.progress import size

    done = compress(source, out, codec, words, start)
    settings = "".join(f" {name}={value}" for name, value in vars(done.codec).items() if value is not None)
    back = shlex.join(["fedtune", "decompress", out, "NEW", *(["--start", start] if start else [])])
    print(f"wrote    {done.path}")
    print(f"codec    {codec}{settings}")
    print(f"weights  {size(done.before)} -> {size(done.after)}, {done.before / done.after:.1f} times smaller")
    print(f"error    {done.error:.3g} of the adapter's norm")
    if done.of_difference is not None:
        print(f"         {done.of_difference:.3g} of that of its difference from {start}")
    print(f"back     {back}")


def decompress(source: str, out: str, start: str | None) -> None:
    """Make an adapter again, and say how to load it.

    Raises:
        FedtuneError: if it can't be.
    """
    from fedtune.export.compressed_adapter import decompress

    path = decompress(source, out, start)
    print(f"wrote    {path}")
    print(f'load     PeftModel.from_pretrained(base, "{path}")')


def doctor(options: argparse.Namespace) -> None:
    """Measure this device, or be the other end of another's bandwidth test.

    Raises:
        FedtuneError: if it can't be.
    """
    from fedtune.diagnosis import Request, examine, listen

    if options.listen is not None:
        listen(options.listen)
    else:
        examine(Request(options.out, options.device, options.threads, options.server, options.seconds))


def print_methods() -> None:
    """What `method=` can be: the name, and what its file's docstring opens with."""
    import yaml

    from fedtune.config.compose import CONF, choices

    names = choices("method")
    width = max(map(len, names))
    for name in names:
        chosen = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text(encoding="utf-8"))
        target = chosen.get("method", chosen)["strategy"]["_target_"]
        source = CONF.parent.joinpath(*target.split(".")[:-1]).with_suffix(".py")
        title, _, rest = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").partition("\n\n")
        print(f"{name:<{width}} {title}")
        for line in rest.split("\n\n")[0].splitlines():
            print(f"{'':<{width}} {line}")


def print_run_help() -> None:
    """Usage, the groups with their choices, and every setting with its default."""
    from fedtune.config.compose import choices, describe_keys, groups

    print(RUN)
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


if __name__ == "__main__":
    sys.exit(main())
