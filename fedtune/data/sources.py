"""Read fine-tuning data: a source yields rows, a row becomes a conversation."""

import glob
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from fedtune.config.schema import DataSpec, SafeLoader
from fedtune.core.errors import DataError
from fedtune.core.text import first_line
from fedtune.data.formats import KNOWN_ENDINGS, SPARE, SPLITS, dataset_rows, ending, file_rows, is_saved, saved_rows
from fedtune.data.rows import Example as Example
from fedtune.data.rows import Message as Message
from fedtune.data.rows import Row, reader

_SPLIT = re.compile(rf"(?:^|[^a-z])({'|'.join(SPLITS)})(?=$|[^a-z])")
_SAME = {"training": "train", "testing": "test", "valid": "validation", "val": "validation", "dev": "validation"}


def load_examples(spec: DataSpec) -> list[Example]:
    """Every example of the source that `spec` names, in the source's order.

    Raises:
        DataError: if the source can't be read, is empty, or a row lacks the needed columns (naming file and line).
    """
    read = reader(spec)
    examples = [read(row) for row in _rows(spec)]
    if not examples:
        raise DataError(f"data {spec.path or spec.name} has no usable rows: expected at least one")
    return examples


def describe_source(spec: DataSpec) -> str:
    """Where the data comes from, for the run's record."""
    if spec.path is None and spec.name == "chatterbot":
        return f"pypi:chatterbot-corpus=={importlib.metadata.version('chatterbot-corpus')}"
    return ", ".join(map(_described, spec.paths))


def _described(given: str) -> str:
    path = Path(given).expanduser()
    return f"file:{path.resolve()}" if path.exists() or glob.has_magic(given) else f"hub:{given}"


def _rows(spec: DataSpec) -> Iterator[Row]:
    if spec.path is not None:
        for given in spec.paths:
            yield from _source(given, spec)
    elif spec.name == "chatterbot":
        yield from _chatterbot()
    else:
        raise DataError(f"data={spec.name} names no source: give data.path= a file or a hub id, or data=chatterbot")


def data_files(spec: DataSpec) -> list[Path]:
    """The files that `data.path` names, in order.

    Raises:
        DataError: if there are none, or it names something else than files.
    """
    files: list[Path] = []
    for given in spec.paths:
        if (found := _files(given, spec)) is None:
            raise DataError(f"data.path={given}: expected files, a folder of files, or a pattern ({KNOWN_ENDINGS})")
        files += [file for file, _ in found]
    return files


def _files(given: str, spec: DataSpec) -> list[tuple[Path, str]] | None:
    """The files that a path or a pattern names, and what messages call them; None where it names none."""
    path = Path(given).expanduser()
    if path.is_file():
        if not ending(path):
            raise DataError(f"data.path={given}: expected one of {KNOWN_ENDINGS}, got '{path.suffix}'")
        return [(path, path.name)]
    if path.is_dir():
        if is_saved(path):
            return None
        return [(file, str(file.relative_to(path))) for file in _of_split(given, path, spec.split)]
    if glob.has_magic(given):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        files = [file for file in found if file.is_file() and ending(file) and file.name not in SPARE]
        if not files:
            raise DataError(f"data.path={given} matches no file that ends in {KNOWN_ENDINGS}")
        return [(file, str(file)) for file in files]
    return None


def _source(given: str, spec: DataSpec) -> Iterator[Row]:
    """The rows of a file, a folder, what a pattern matches, or a hub data set."""
    path = Path(given).expanduser()
    if (files := _files(given, spec)) is not None:
        for file, name in files:
            yield from file_rows(file, name, spec.split)
    elif path.is_dir():
        yield from saved_rows(path, path.name, spec.split, spec.completion_column)
    elif ending(path) or given.startswith((".", "/", "~")) or given.count("/") > 1:
        raise DataError(
            f"data.path={given} does not exist: expected a file ({KNOWN_ENDINGS}), a folder of such files, or a hub id"
        )
    else:
        yield from _hub(given, spec)


def _of_split(given: str, folder: Path, split: str) -> list[Path]:
    """A folder's data files, those of the split alone where names tell splits apart (`test-00000.parquet`)."""
    inside = [file.relative_to(folder) for file in sorted(folder.rglob("*"))]
    files = [
        file
        for file in inside
        if ending(file) and file.name not in SPARE and not any(part.startswith(".") for part in file.parts)
    ]
    if not files:
        raise DataError(f"data.path={given} is a folder without data: expected files that end in {KNOWN_ENDINGS}")
    named = {file: found[-1] for file in files if (found := _SPLIT.findall(str(file).lower()))}
    if named:
        files = [file for file, found in named.items() if _SAME.get(found, found) == _SAME.get(split, split)]
        if not files:
            known = ", ".join(sorted(set(named.values())))
            raise DataError(f"data.path={given} has no files of the split '{split}': set data.split= to one of {known}")
    return [folder / file for file in files]


def _hub(name: str, spec: DataSpec) -> Iterator[Row]:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, spec.subset, split=spec.split)
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        reason = first_line(error)
        raise DataError(
            f"data.path={name} is neither a file here nor to be had from the Hugging Face hub: {reason} "
            "Check the name, data.subset, data.split and the network"
        ) from error
    yield from dataset_rows(loaded, f"{name} {spec.split}", spec.completion_column)


def _chatterbot() -> Iterator[Row]:
    """The first exchange of each conversation of the English corpus, with its file's name as the topic.

    Later lines are sometimes a dialogue and sometimes other answers to the first question; nothing in the files tells
    which, so they are left out.
    """
    found = importlib.util.find_spec("chatterbot_corpus")  # located, not imported
    if found is None or not found.submodule_search_locations:
        raise DataError(
            "data=chatterbot wants its text: pip install --no-deps chatterbot-corpus==1.3.3, or give data.path="
        )
    folder = Path(next(iter(found.submodule_search_locations))) / "data" / "english"
    for file in sorted(folder.glob("*.yml")):
        for number, turns in enumerate(yaml.load(file.read_bytes(), SafeLoader)["conversations"], 1):
            if isinstance(turns, list) and len(turns) >= 2:
                question, answer = str(turns[0]).strip(), str(turns[1]).strip()
                if question and answer:
                    yield (
                        f"{file.name} conversation {number}",
                        {"prompt": question, "completion": answer, "topic": file.stem},
                    )
