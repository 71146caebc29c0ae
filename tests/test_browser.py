"""The page in a real browser: Chromium, without a network."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from comparisons import comparison, made_up

from fedtune.core.text import number
from fedtune.report import page
from fedtune.report.comparison import compare, protocols, table
from fedtune.report.serve import Server, Watch

api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'fedtune[dev]'")
BROWSER = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium, or name it in CHROMIUM"),
]
WORDS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=WORDS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A page of ten entries: eight in colour, two in grey."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page.render(comparison(entries=10, seeds=2)), encoding="utf-8")
    return path


def opened(browser, url: str, allowed: str = "file:", **options):
    """A new window on the page once its charts are drawn, and what the browser complained of or asked for."""
    context = browser.new_context(**options)
    window, complaints = context.new_page(), []

    def route(asked):
        if asked.request.url.startswith((allowed, "data:", "blob:")):
            asked.continue_()
        else:
            complaints.append(asked.request.url)
            asked.abort()

    context.route("**/*", route)
    window.on("console", lambda message: complaints.append(message.text))
    window.on("pageerror", lambda error: complaints.append(str(error)))
    window.goto(url)
    window.evaluate("globalThis.drawn")
    return window, complaints


def until(window, expression: str) -> None:
    """Wait until it's true. The driver's own wait would evaluate text within the page, which its policy forbids."""
    end = time.monotonic() + 60
    while not window.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.05)


def marks(window) -> list[int]:
    """How much each chart has drawn."""
    return window.evaluate("[...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('svg path').length)")


def ground(window) -> int:
    """The brightness of the page's ground, 0 to 255."""
    color = window.evaluate("getComputedStyle(document.body).backgroundColor")
    return int(color.removeprefix("rgb(").split(",")[0])


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)], ids=["light", "dark", "phone"]
)
def test_every_chart_is_drawn_without_a_network(browser, file, scheme, width):
    window, complaints = opened(browser, file.as_uri(), color_scheme=scheme, viewport={"width": width, "height": 844})
    assert complaints == []
    assert len(marks(window)) == 8
    assert min(marks(window)) > 5
    assert (ground(window) < 60) == (scheme == "dark")
    assert window.evaluate("document.documentElement.scrollWidth <= innerWidth")
    edges = window.evaluate(
        "[...document.querySelectorAll('.chart')]"
        ".map((c) => c.querySelector('svg').getBoundingClientRect().width - c.clientWidth)"
    )
    assert max(edges) <= 1
    window.context.close()


def test_what_a_person_does_with_it(browser, file):
    window, complaints = opened(browser, file.as_uri(), color_scheme="light", viewport={"width": 1280, "height": 900})

    # The numbers of the table are the comparison's
    (group,) = comparison(entries=10, seeds=2).groups
    expected = [
        [standing.entry.label, number(standing.scores["eval_loss"].mean)]
        for standing in table(group, protocols(group)[0]).standings
    ]
    found = window.evaluate(
        "[...document.querySelectorAll('table[data-protocol=rounds] tbody tr')]"
        ".map((row) => [row.cells[0].innerText, row.cells[3].firstChild.textContent.trim()])"
    )
    assert found == expected

    # Tab comes to every control that is in sight
    controls = window.evaluate(
        """() => [...document.querySelectorAll('a[href], button, input, summary, [tabindex="0"]')]
          .filter((e) => e.checkVisibility() && (e.type !== 'radio' || e.checked))
          .map((e, i) => (e.dataset.tab = i))"""
    )
    reached = set()
    for _ in range(len(controls) + 5):
        window.keyboard.press("Tab")
        reached.add(window.evaluate("Number(document.activeElement.dataset.tab ?? -1)"))
    assert set(controls) <= reached

    # The one in grey that is chosen takes the place of the first, and is drawn in its hue
    hue = "[...document.querySelectorAll('#group-1-loss .chart path[stroke]')].map((e) => e.getAttribute('stroke'))"
    before = window.evaluate(hue)
    assert "#0067a8" in before
    boxes = window.locator(".choices input")
    unchosen = window.evaluate("[...document.querySelectorAll('.choices input')].findIndex((box) => !box.checked)")
    boxes.nth(unchosen).check()
    assert window.locator(".choices input:checked").count() == 8
    window.get_by_role("button", name="None").click()
    until(window, f"!({hue}).includes('#0067a8')")
    window.get_by_role("button", name="As at first").click()
    until(window, f"({hue}).includes('#0067a8')")

    # By bytes, in the dark, and back
    window.locator("#group-1-loss .views").get_by_label("by bytes").check()
    until(window, "document.querySelector('#group-1-loss .chart svg').textContent.includes('bytes sent')")
    window.get_by_role("button", name="Use the dark colours").click()
    until(window, f"!({hue}).includes('#0067a8')")
    assert ground(window) < 60
    with window.expect_download() as download:
        window.locator("#group-1-loss .save[data-as=svg]").click()
    assert download.value.suggested_filename == "loss.svg"
    assert complaints == []
    window.context.close()


def test_a_strangers_label_runs_nothing(browser, tmp_path):
    """Were it markup, the label would set `hacked`, by its script or by its image's error."""
    label = "</script><script>hacked=1</script><img src=x onerror=hacked=1>"
    path = tmp_path / "report.html"
    path.write_text(page.render(comparison((label, "b"), entries=2)), encoding="utf-8")
    window, complaints = opened(browser, path.as_uri())
    window.locator("#group-1-loss-bytes .chart .mark-symbol path").first.hover(force=True)
    until(window, "document.querySelector('#vg-tooltip-element')?.innerText.includes('onerror')")
    assert window.evaluate("typeof hacked") == "undefined"
    assert window.locator("img").count() == 0
    assert complaints == []
    window.context.close()


def test_the_live_page_follows_and_keeps_what_was_chosen(browser, tmp_path):
    """Two rounds more are written: the page says so without a reload, and the choice, the theme, what was unfolded and
    the place stay."""
    rounds = {"now": 2}
    state = tmp_path / "metrics.csv"
    state.write_text("")
    watch = Watch(tmp_path, lambda _: compare(made_up(entries=9, rounds=rounds["now"], status="running")))
    server = Server(watch, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        window, complaints = opened(browser, server.url, server.url, viewport={"width": 1280, "height": 700})
        assert "After 2 rounds" in window.locator(".answer").first.inner_text()
        assert window.locator("progress").count() == 18
        window.locator(".choices input").nth(2).uncheck()
        window.get_by_role("button", name="Use the dark colours").click()
        window.locator("#group-1-loss-numbers summary").click()
        window.evaluate("scrollTo(0, 900)")
        window.evaluate("globalThis.same = true")
        top = window.evaluate("scrollY")
        rounds["now"] = 4
        state.write_text("more")
        until(window, "document.querySelector('.answer').innerText.includes('After 4 rounds')")
        until(window, "[...document.querySelectorAll('.chart')].every((c) => c.querySelector('svg'))")
        assert window.evaluate("globalThis.same")
        assert not window.locator(".choices input").nth(2).is_checked()
        assert window.locator(".choices input:checked").count() == 7
        assert window.locator("#group-1-loss-numbers").get_attribute("open") is not None
        assert ground(window) < 60
        assert abs(window.evaluate("scrollY") - top) <= 2
        assert complaints == []
        window.context.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_numbers_that_charts_draw_are_in_the_file(file):
    """Six significant digits, and no number that JSON lacks."""
    text = file.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0]
    rows = json.loads(text)["groups"][0]["figures"][0]["spec"]["data"]["values"]
    assert all(row["x"] == float(f"{row['x']:.6g}") for row in rows)
