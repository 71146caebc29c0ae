"""The pages of the site that are no files of docs/: the home page, and the API reference, a page for each module.

ProperDocs calls `on_config`, `on_files` and `on_page_markdown` as it builds (properdocs.yml names this file). Modules
are found by their files and read, not imported: a new one is in the reference by itself, and nothing has to be
installed but the tool.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fedtune", "strategies", "clients")
# Pages outside docs/, by where they go in the site
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def page_of(source: Path) -> str:
    """Where a module's page goes: `reference/fedtune/codecs/raw.md`; a package's is its folder's index."""
    parts = source.relative_to(ROOT).with_suffix("").parts
    return "/".join(("reference", *parts[:-1], "index" if parts[-1] == "__init__" else parts[-1])) + ".md"


def modules() -> list[Path]:
    """The files of all modules, packages before what is in them."""
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.name != "__main__.py"]
    return sorted(found, key=lambda path: (path.parent, path.name))


def navigation(folder: Path) -> list[Any]:
    """The entries of a package: its own page, then modules and packages within, by name."""
    entries: list[Any] = [page_of(folder / "__init__.py")]
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").exists():
            entries.append({path.name: navigation(path)})
        elif path.suffix == ".py" and path.name not in ("__init__.py", "__main__.py"):
            entries.append({path.stem: page_of(path)})
    return entries


def on_config(config: Any) -> Any:
    """Fill the reference's part of the navigation."""
    for entry in config.nav:
        if "API reference" in entry:
            entry["API reference"] = [{package: navigation(ROOT / package)} for package in PACKAGES]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    from properdocs.structure.files import File  # here, so that tests read this file without the tool

    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        files.append(File.generated(config, page_of(path), content=f"# {name}\n\n::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links into the repository's files into links to the pages that show them; a file that no page shows is
    named, not linked."""
    place = page.file.src_uri
    source = next((path for path, shown in OUTSIDE.items() if shown == place), f"docs/{place}")
    if place.startswith("reference/"):
        return markdown

    def replaced(match: re.Match[str]) -> str:
        before, link, anchor, after = match[1], match[2], match[3] or "", match[4]
        if re.match(r"[a-z][a-z+.-]*:", link):
            return match[0]
        path = Path(os.path.normpath(ROOT / PurePosixPath(source).parent / link))
        inside = path.relative_to(ROOT).as_posix()
        if inside.startswith("docs/"):
            shown = inside.removeprefix("docs/")
        elif inside in OUTSIDE:
            shown = OUTSIDE[inside]
        elif path.suffix == ".py" and inside.partition("/")[0] in PACKAGES:
            shown = page_of(path)
        else:
            return before[before.index("[") + 1 : -2]
        return f"{before}{os.path.relpath(shown, PurePosixPath(place).parent)}{anchor}{after}"

    return LINK.sub(replaced, markdown)
