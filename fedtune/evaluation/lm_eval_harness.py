"""Tasks of lm-evaluation-harness on a model that is in memory, where the harness is installed."""

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fedtune.core.checks import nearest
from fedtune.core.errors import ConfigError, DataError
from fedtune.core.text import first_line
from fedtune.models.adapted_model import LocalModel

TESTED = "lm-eval==0.4.13"
MOST_NAMES = 20  # that an error lists


def check_installed() -> None:
    """Check that lm-evaluation-harness can be imported, without importing it.

    Raises:
        ConfigError: if lm-evaluation-harness isn't here.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks runs lm-evaluation-harness, which is not installed: pip install {TESTED}")


def run_tasks(
    model: LocalModel, names: Sequence[str], include_path: str | None, limit: int | None, batch_size: int
) -> dict[str, dict[str, float]]:
    """What the harness measures, by task and by its own names of figures, as {"acc,none": 0.5}.

    Args:
        names: of tasks, groups or tags.
        include_path: a folder with task files of one's own.
        limit: examples of each task, at most; None takes all.

    Raises:
        ConfigError: for a task that isn't known.
        DataError: if the harness can't run them, as when their data isn't to be had.
    """
    check_installed()
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager(names, include_path)
    with _text_alone(model) as adds_tokens:
        # PEFT gives no positions to what stands beside virtual tokens, so nothing may be padded on the left there
        inside = HFLM(pretrained=model.module, tokenizer=model.tokenizer, batch_size=1 if adds_tokens else batch_size)
        try:
            found = lm_eval.simple_evaluate(
                model=inside, tasks=list(names), task_manager=manager, limit=limit, log_samples=False
            )
        except Exception as error:  # tasks run whatever their authors wrote
            reason = first_line(error)
            raise DataError(
                f"lm-evaluation-harness could not run {','.join(names)}: {type(error).__name__}: {reason}. "
                "Its tasks come with their data from the Hugging Face hub, unless --include-path has others"
            ) from error
    return {
        task: {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        for task, figures in found["results"].items()
    }


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    known: list[str] = []
    # Reading thousands of the harness's own tasks takes seconds
    for defaults in (False, True) if include_path else (True,):
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        known = manager.all_tasks
        if set(names) <= set(known):
            return manager
    unknown = next(name for name in names if name not in known)
    listed = f": expected {', '.join(known)}" if len(known) <= MOST_NAMES else ""
    raise ConfigError(f"--tasks: '{unknown}' is no task of lm-evaluation-harness{listed}{nearest(unknown, known)}")


@contextmanager
def _text_alone(model: LocalModel) -> Iterator[bool]:
    """Take the logits of virtual tokens off, which a prompt-tuned PEFT model has before those of the text; yields
    whether the model has virtual tokens at all."""
    config = getattr(model.module, "peft_config", {}).get("default")
    if config is None:
        yield False
        return

    def cut(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        width = (named["input_ids"] if "input_ids" in named else inputs[0]).shape[1]
        output.logits = output.logits[:, -width:]
        return output

    handle = model.module.register_forward_hook(cut, with_kwargs=True) if config.is_prompt_learning else None
    try:
        yield bool(config.is_prompt_learning or config.is_adaption_prompt)
    finally:
        if handle is not None:
            handle.remove()
