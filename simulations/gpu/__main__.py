"""What only a GPU can show: the tests that need one, speed, memory, a 7B base in NF4, resume, seeded methods.

    python -m simulations.gpu                                all of it, in at most 8 minutes
    python -m simulations.gpu --only smollm2,qlora           these steps alone
    python -m simulations.gpu --tiny                         the same code at a toy size, on whatever device is here

Figures go to FOLDER/gpu.json and gpu.md, written anew after each step; whatever failed is in FOLDER/errors.log. A step
has a process of its own, so that one which fails, hangs or breaks the GPU's state costs its own figures alone.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from simulations.gpu.results import NOT_MEASURED, Outcome, line, read, write
from simulations.gpu.steps import STEPS, Place, Step, Unmeasured, has_cuda

UNMEASURED = 3  # exit code of a step that this machine can't do


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps. Returns the exit code: 0 unless one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the figures (%(default)s)")
    parser.add_argument("--only", default="", metavar="STEP,...", help=f"of {', '.join(step.name for step in STEPS)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all may take together (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes; so it is wherever there is no GPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        return _one(options.one, options.out, options.tiny)
    wanted = [name for name in options.only.split(",") if name]
    if unknown := set(wanted) - {step.name for step in STEPS}:
        parser.error(f"there is no step '{min(unknown)}': expected some of {', '.join(step.name for step in STEPS)}")
    chosen = [step for step in STEPS if not wanted or step.name in wanted]
    deadline = time.monotonic() + 60 * options.minutes
    tiny = options.tiny or not has_cuda()
    outcomes = [Outcome(step.name, step.title, NOT_MEASURED, note="its turn didn't come") for step in chosen]
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "errors.log"
    log.unlink(missing_ok=True)
    for step, outcome in zip(chosen, outcomes, strict=True):
        left = deadline - time.monotonic()
        if left < (5 if tiny else step.least):
            outcome.status, outcome.note = "skipped", f"{left:.0f} s were left, and it wants {step.least}"
            print(f"== {step.name}: skipped, {outcome.note}", flush=True)
        else:
            print(f"== {step.name}: {step.title} ({left:.0f} s left)", flush=True)
            _apart(step, outcome, min(left, step.most), tiny, log)
        write(options.out, outcomes)
    print((options.out / "gpu.md").read_text(encoding="utf-8"))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _apart(step: Step, outcome: Outcome, limit: float, tiny: bool, log: Path) -> None:
    """A step in a process of its own, and what came of it."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fedtune-gpu-") as folder:
        command = [sys.executable, "-m", "simulations.gpu", "--one", step.name, "--out", folder]
        process = subprocess.Popen([*command, *(["--tiny"] if tiny else [])], start_new_session=True)
        try:
            code = process.wait(limit)
            outcome.note = {0: "", UNMEASURED: ""}.get(code, f"it ended with {code}")
        except subprocess.TimeoutExpired:
            code, outcome.note = 1, f"it was stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # what it started as well
                process.wait()
        found = Path(folder)
        outcome.status = {0: "done", UNMEASURED: NOT_MEASURED}.get(code, "failed")
        if (rows := found / "rows").is_file():
            outcome.rows = read(rows.read_text(encoding="utf-8"))
        if (error := found / "error").is_file():
            outcome.note = error.read_text(encoding="utf-8").partition("\n")[0]
        if (trace := found / "trace").is_file():
            with log.open("a", encoding="utf-8") as stream:
                stream.write(f"== {step.name}\n{trace.read_text(encoding='utf-8')}\n")
    outcome.seconds = time.monotonic() - begun
    print(f"== {step.name}: {outcome.status} in {outcome.seconds:.0f} s. {outcome.note}", flush=True)


def _one(name: str, out: Path, tiny: bool) -> int:
    """A step, in this process: its rows as they come, and its error if it has one."""
    import traceback

    step = next(step for step in STEPS if step.name == name)
    try:
        with (out / "rows").open("a", encoding="utf-8") as stream:
            for row in step.run(Place(out, tiny)):
                stream.write(line(row) + "\n")
                stream.flush()
                print(f"   {row.what}: {row.said}  {row.beside}", flush=True)
    except Unmeasured as reason:
        (out / "error").write_text(str(reason), encoding="utf-8")
        return UNMEASURED
    except Exception as error:  # whatever it is, the next step goes on
        first = str(error).strip().partition("\n")[0]
        (out / "error").write_text(f"{type(error).__name__}: {first}", encoding="utf-8")
        (out / "trace").write_text(traceback.format_exc(), encoding="utf-8")
        traceback.print_exc(limit=-4)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
