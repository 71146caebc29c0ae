"""Every link within the pages leads somewhere: files, folders, and headings in them by GitHub's anchors."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
ATTRIBUTE = re.compile(r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"([^\"]+)\"")
CODE = re.compile(r"^(```|~~~).*?^\1$|(?<!`)(`+)(?!`).+?(?<!`)\2(?!`)", re.MULTILINE | re.DOTALL)


def anchors(page):
    """The ids that GitHub gives a page's headings: lower case, no punctuation, hyphens, numbered where they repeat."""
    seen = {}
    text = re.sub(r"^(```|~~~).*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug


def links(page):
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    return [*LINK.findall(text), *ATTRIBUTE.findall(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue  # of the network
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert target.exists(), f"{link}: there is no {target.relative_to(ROOT)}"
        if anchor:
            assert anchor in set(anchors(target)), f"{link}: no heading of {target.name} has this anchor"


def test_every_page_of_the_docs_is_linked_from_the_readme():
    known = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md") if ":" not in link}
    assert not {page.name for page in (ROOT / "docs").glob("*.md") if page.resolve() not in known}


def test_every_page_of_the_docs_is_in_the_sites_navigation():
    pages = set(re.findall(r"[\w/]+\.md", (ROOT / "properdocs.yml").read_text(encoding="utf-8")))
    assert not {page.name for page in (ROOT / "docs").glob("*.md")} - pages


def test_anchors_are_githubs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b_c`, d\n## What it does\n## What it does\n```\n# no heading\n```\n## See [there](x.md)!\n")
    assert list(anchors(page)) == ["a-b_c-d", "what-it-does", "what-it-does-1", "see-there"]
