"""The site's own pages, without the tool that builds them (`make docs`)."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
site_pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(site_pages)


def pages(entry):
    """The pages of a navigation's entry: a page, a named one, or several."""
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from pages(inner)


def test_every_module_has_a_page_in_the_navigation():
    config = SimpleNamespace(nav=[{"fedtune": "index.md"}, {"API reference": []}])
    site_pages.on_config(config)
    made = [site_pages.page_of(path) for path in site_pages.modules()]
    assert sorted(pages(config.nav[1]["API reference"])) == sorted(made)
    assert {"reference/fedtune/index.md", "reference/fedtune/codecs/raw.md", "reference/strategies/fedit.md"} <= {*made}


def rewritten(markdown, place):
    return site_pages.on_page_markdown(markdown, SimpleNamespace(file=SimpleNamespace(src_uri=place)), None, None)


def test_links_out_of_the_docs_lead_to_the_pages_that_show_the_files():
    assert rewritten("[data](docs/data.md#what)", "index.md") == "[data](data.md#what)"
    assert rewritten("![picture](docs/results/loss.svg)", "index.md") == "![picture](results/loss.svg)"
    assert rewritten("[how](../strategies/fedit.py)", "methods.md") == "[how](reference/strategies/fedit.md)"
    assert rewritten("[rules](CONTRIBUTING.md)", "index.md") == "[rules](contributing.md)"
    assert rewritten("[settings](../conf/method/fedit.yaml)", "new_method.md") == "settings"
    assert rewritten("[Flower](https://flower.ai)", "index.md") == "[Flower](https://flower.ai)"
    assert rewritten("[above](#mixed-ranks)", "methods.md") == "[above](#mixed-ranks)"
