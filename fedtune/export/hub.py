"""`fedtune push`: a run's adapter, or its whole model, as a repository on the Hugging Face hub."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.core.errors import ConfigError, ExportError
from fedtune.core.files import beside, new_folder
from fedtune.core.text import first_line
from fedtune.device.owner import HUB_ID
from fedtune.export.model_card import model_card
from fedtune.export.model_folder import Source, export, source_of
from fedtune.runs.adapter_files import ADAPTER_CONFIG
from fedtune.runs.run_folder import BEST, KEPT, ROUNDS

CARD = "README.md"
FILES = (ADAPTER_CONFIG, "adapter_model.safetensors")
PREPARED = "hub"  # in the run folder, what --dry-run writes


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be.

    Attributes:
        where: its address; of a dry run the folder.
        files: by name, their bytes.
    """

    where: str
    files: dict[str, int]


@dataclass(frozen=True)
class Push:
    """What is to be pushed.

    Attributes:
        run: the run's folder.
        name: the repository, OWNER/NAME.
        round: one that the run kept, or "best"; None: the last.
        merged: the whole model, with the adapter merged into the base.
        base: where the base is on this machine, for `merged`.
    """

    run: Path
    name: str
    round: str | None = None
    merged: bool = False
    base: str | None = None

    def __post_init__(self) -> None:
        if not HUB_ID.fullmatch(self.name) or ".." in self.name or "--" in self.name:
            raise ConfigError(f"{self.name}: expected a repository on the hub, as user/name")


def prepare(asked: Push, out: str | None) -> Pushed:
    """Write the folder that would be pushed, and push nothing.

    Args:
        out: the folder; None: hub/ in the run's, in place of what an earlier dry run wrote there.

    Raises:
        FedtuneError: if there is nothing to push, or the folder can't be written.
    """
    found = _source(asked)
    if out is None:
        shutil.rmtree(asked.run / PREPARED, ignore_errors=True)
    target = new_folder(str(asked.run / PREPARED) if out is None else out)
    with beside(target) as folder:
        _write(asked, found, folder)
    return Pushed(str(target), _sizes(target))


def push(asked: Push, create: bool, private: bool) -> Pushed:
    """Upload the folder in one commit.

    Args:
        create: make the repository if it isn't there.
        private: for nobody else, where it is made.

    Raises:
        FedtuneError: if there is nothing to push, or the hub isn't reached or refuses.
    """
    from huggingface_hub import HfApi, get_token

    found, api = _source(asked), HfApi()
    if get_token() is None:
        raise ExportError(
            f"{asked.name} wasn't pushed: no token for {api.endpoint}. Set HF_TOKEN, or log in with hf auth login; "
            "--dry-run writes the folder without one"
        )
    with _refusals(asked.name, str(api.endpoint)), tempfile.TemporaryDirectory(prefix="fedtune-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        _write(asked, found, folder)
        if create:
            api.create_repo(asked.name, private=private, exist_ok=True)
        done: Any = api.upload_folder(
            repo_id=asked.name, folder_path=folder, commit_message=f"fedtune push: {found.experiment.name}"
        )
        return Pushed(str(getattr(done, "commit_url", f"{api.endpoint}/{asked.name}")), _sizes(folder))


def _source(asked: Push) -> Source:
    if not (asked.run / "config.yaml").is_file():
        raise ExportError(f"{asked.run} holds no run (no config.yaml): give the folder that out= named")
    source_of(asked.run, asked.round)  # which it has to have
    return source_of(asked.run)


def _write(asked: Push, found: Source, folder: Path) -> None:
    summary: dict[str, Any] = json.loads((asked.run / "summary.json").read_text(encoding="utf-8"))
    round, loss = int(summary.get("rounds", 0)), summary.get("last_eval_loss")
    place = asked.run / "adapter"
    if asked.round is not None:
        place = asked.run / BEST if asked.round == BEST else asked.run / ROUNDS / asked.round
        kept = json.loads((place / KEPT).read_text(encoding="utf-8"))
        round, loss = int(kept["round"]), kept["eval_loss"]
    if asked.merged:
        model = folder / "merged"
        export(str(asked.run), str(model), asked.base, asked.round)
        for file in model.iterdir():
            file.rename(folder / file.name)
        model.rmdir()
    else:
        _copy_adapter(place, folder, found)
    card = model_card(asked.name, found.experiment, summary, round, loss, asked.merged)
    (folder / CARD).write_text(card, encoding="utf-8")


def _copy_adapter(place: Path, folder: Path, found: Source) -> None:
    if not all((place / name).is_file() for name in FILES):
        raise ExportError(
            f"{place} holds no adapter: method={found.experiment.method_name} with "
            f"adapter={found.experiment.adapter.kind} leaves none. Push the whole model: --merged"
        )
    for name in FILES:
        shutil.copyfile(place / name, folder / name)
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if found.origin.hub_id is None:  # a path on this machine means nothing elsewhere, and is nobody's business
        config["base_model_name_or_path"] = found.experiment.model.name
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


@contextmanager
def _refusals(name: str, endpoint: str) -> Iterator[None]:
    """What the hub, or the way there, says in one line."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    said = f"{name} wasn't pushed to {endpoint}"
    try:
        yield
    except RepositoryNotFoundError as error:
        raise ExportError(
            f"{said}: there is no such repository, or none that this token may write to. Make it with --create"
        ) from error
    except OfflineModeIsEnabled as error:
        raise ExportError(f"{said}: HF_HUB_OFFLINE is set. Unset it, or take --dry-run") from error
    except HfHubHTTPError as error:
        raise ExportError(f"{said}: it says: {first_line(error)[:200]}") from error
    except (httpx.HTTPError, OSError, ValueError) as error:
        reason = first_line(error)[:200] or type(error).__name__
        raise ExportError(f"{said}: {reason}. Is there a network? --dry-run needs none") from error
