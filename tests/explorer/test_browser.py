"""The page in a real browser, headless, with the network off: what it shows is what the cache holds, by mouse and by
keyboard alone, for eyes and for screen readers, and hostile texts do nothing."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from kdcache import open_cache
from kdcache.explorer.explorer import Explorer
from kdcache.explorer.page import write_page
from kdcache.explorer.server import ExplorerServer
from kdcache.report.inspect import inspect_position
from tests.making import TEXTS, dump_options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # playwright's own pipes
]

EVIL = "</script><img src=x onerror=\"document.title='owned'\"> \u202eevil\u202c <b>bold</b>"
SCRIPTS = ["مرحبا بالعالم، هذا نص من اليمين إلى اليسار.", "नमस्ते दुनिया, cafe\u0301 😀.", EVIL]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium here; tests/explorer/install_chromium.sh installs it")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@contextmanager
def opened(browser: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page that is ready; nothing may have gone wrong in it."""
    context = browser.new_context(
        **{"offline": url.startswith("file:"), "viewport": {"width": 1300, "height": 900}, **options}
    )
    page, wrong = context.new_page(), []
    page.set_default_timeout(120_000)
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda request: wrong.append(request.url) if not request.url.startswith((url, "data:")) else None
    )
    page.goto(url)
    page.wait_for_selector("body[data-ready]")
    yield page
    assert wrong == []
    context.close()


@pytest.fixture(scope="module")
def scripts_cache(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts from right to left, with combining marks, and hostile ones."""
    from kdcache.teacher.dump import dump

    folder = tmp_path_factory.mktemp("scripts")
    texts = [*SCRIPTS, *TEXTS[:4]]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dump(dump_options(teacher, folder / "texts.jsonl", folder / "c", seq_len=128, k=40, precision="6"))
    return folder / "c"


@pytest.fixture(scope="module")
def page_file(scripts_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    explorer = Explorer(str(scripts_cache), top=20)
    write_page(explorer, explorer.spread(4), str(path))
    return path.as_uri()


def value(text: str) -> float:
    return float(text.replace("−", "-"))


def same_to_three_digits(shown: str, exact: float) -> bool:
    return math.isclose(value(shown), exact, rel_tol=0.0051, abs_tol=1e-12)


def entries(page: Any) -> list[list[str]]:
    """Title, token and share of each row of bars."""
    return page.eval_on_selector_all(
        ".entries tbody tr",
        "rows => rows.map(r => [r.title, r.querySelector('th').textContent, r.querySelector('.number').textContent])",
    )


def test_the_bars_are_the_values_of_the_cache(browser: Any, page_file: str, scripts_cache: Path) -> None:
    with opened(browser, page_file) as page:
        for token in (5, 20, 60):
            page.locator(".running").first.locator("[role=option]").nth(token).click()
            page.mouse.move(5, 5)
            for temperature in (1.0, 2.0):
                page.click(f".stored >> text=T {temperature:g}")
                page.keyboard.press("Escape")
                exact = inspect_position(str(scripts_cache), 0, token - 1, top=40, temperature=temperature)
                shown = entries(page)
                assert page.text_content("#position h2") == f"Row 0, position {token - 1}"
                assert "exact" in page.text_content(".entries caption")
                by_id = {f"id {each['id']},": each["probability"] for each in exact["entries"]}
                listed = [row for row in shown if row[0].startswith("id ")]
                assert len(listed) >= 14
                for title, _, number in listed:
                    assert same_to_three_digits(number, by_id[" ".join(title.split()[:2])]), (title, number)
                assert shown[-1][1] == "tail" and same_to_three_digits(shown[-1][2], exact["tail"])
                rest = sum(each["probability"] for each in exact["entries"][14:])
                if len(listed) == 14:
                    assert same_to_three_digits(shown[-2][2], rest)


def test_between_stored_temperatures_it_says_so(
    browser: Any, page_file: str, scripts_cache: Path, teacher: Path, tmp_path: Path
) -> None:
    from kdcache.teacher.dump import dump

    texts = scripts_cache.parent / "texts.jsonl"
    dump(dump_options(teacher, texts, tmp_path / "c", seq_len=128, k=40, precision="6", temperatures="1,1.41,2"))
    exact = inspect_position(str(tmp_path / "c"), 0, 0, temperature=1.41)["tail"]
    with opened(browser, page_file) as page:
        before = {row[0]: value(row[2]) for row in entries(page) if row[0]}
        page.focus("#heat")
        for _ in range(25):
            page.keyboard.press("ArrowRight")
        assert page.text_content("#heat-says") == "T 1.41, tail interpolated"
        assert "the tail interpolated" in page.text_content(".entries caption")
        assert page.text_content("#position h2") == "Row 0, position 0"
        tail = value(entries(page)[-1][2])
        assert 0.99 * exact <= tail <= 1.2 * exact  # never smaller than it is
        after = {row[0]: value(row[2]) for row in entries(page) if row[0]}
        ids = list(before)[:6]
        for one, other in itertools.pairwise(ids):  # ratios stay exact
            wanted = (before[one] / before[other]) ** (1 / 1.41)
            assert after[one] / after[other] == pytest.approx(wanted, rel=0.015)
        whole = page.evaluate("""() => {
            const sum = {};
            for (const b of [0.3, 0.5, 0.8, 1, 1.5]) sum[b] = between([[1, 0], [0.5, 1], [0, 4]], b, -3);
            return sum;
        }""")
        assert whole == {"0.3": pytest.approx(2.2), "0.5": 1, "0.8": pytest.approx(0.4), "1": 0, "1.5": -1.5}


def test_fewer_entries_lose_more(browser: Any, page_file: str, scripts_cache: Path) -> None:
    with opened(browser, page_file) as page:
        page.locator(".running").first.locator("[role=option]").nth(9).click()
        page.mouse.move(5, 5)
        page.focus("#keep")
        page.keyboard.press("Home")
        assert page.text_content("#keep-says") == "1 of 40"
        exact = inspect_position(str(scripts_cache), 0, 8, top=40)
        tail = entries(page)[-1]
        assert tail[1] == "tail, were 1 kept"
        assert same_to_three_digits(tail[2], 1 - exact["entries"][0]["probability"])
        page.keyboard.press("End")
        assert page.text_content("#keep-says") == "all 40" and entries(page)[-1][1] == "tail"


def test_by_keyboard_alone(browser: Any, page_file: str) -> None:
    with opened(browser, page_file) as page:

        def focused() -> str:
            return page.evaluate("document.activeElement.id || document.activeElement.className")

        def chosen() -> list[int]:
            return page.evaluate(
                "(span => [span.closest('.running').row.index, span.token])(document.getElementById('chosen'))"
            )

        page.keyboard.press("Tab")
        assert focused() == "skip"
        for _ in range(40):
            page.keyboard.press("Tab")
            if focused() == "running":
                break
        assert focused() == "running" and chosen() == [0, 1]
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        direction = page.evaluate("getComputedStyle(document.getElementById('chosen').parentElement).direction")
        assert chosen() == [0, 2] and direction == "ltr"
        page.keyboard.press("End")
        assert chosen()[1] > 40
        page.keyboard.press("Home")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowUp")
        assert chosen() == [0, 0] and "nothing precedes it" in page.text_content("#position")
        page.keyboard.press("PageDown")
        assert chosen()[0] > 0
        page.keyboard.press("s")
        assert "most surprising" in page.text_content("#found")
        assert "probability" in page.text_content("#says")
        page.keyboard.press("t")
        assert page.evaluate("document.body.dataset.tint") == "entropy"
        page.keyboard.press("]")
        assert page.text_content("#heat-says") == "T 2, exact"
        page.keyboard.press("/")
        page.keyboard.type("FOX")
        page.keyboard.press("Enter")
        assert page.text_content("#found").startswith("match 1 of ")
        assert page.locator(".hit").count() > 0
        page.focus("#tab-text")
        page.keyboard.press("ArrowRight")
        assert page.is_visible("#summary") and not page.is_visible("#text")
        page.focus("#keys")
        page.keyboard.press("Enter")
        assert page.is_visible("#help")
        page.keyboard.press("Escape")
        assert not page.is_visible("#help")


def test_hostile_texts_are_only_texts(browser: Any, page_file: str) -> None:
    with opened(browser, page_file) as page:
        assert page.title() == "c · kdcache"
        assert page.locator("img, b, #rows script").count() == 0
        text = page.text_content("#rows")
        assert "onerror" in text and "⟨" in text and "\u202e" not in text
        texts = [["<s>", one, " fox"] for one in ("مرحبا", "नि", "⟨D9⟩")]
        directions = [page.evaluate("texts => directionOf(texts)", each) for each in texts]
        assert directions == ["rtl", "ltr", "ltr"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_for_axe(browser: Any, page_file: str, scheme: str) -> None:
    pytest.importorskip("axe_playwright_python")
    axe = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    with opened(browser, page_file, color_scheme=scheme) as page:
        page.evaluate(axe)
        for view in ("text", "summary"):
            page.click(f"#tab-{view}")
            found = page.evaluate("axe.run()")
            serious = [
                (each["id"], each["nodes"][0]["html"][:200], each["nodes"][0]["failureSummary"])
                for each in found["violations"]
                if each["impact"] in ("serious", "critical")
            ]
            assert serious == []


def test_a_narrow_page_has_no_sideways_scroll(browser: Any, page_file: str) -> None:
    with opened(browser, page_file, viewport={"width": 360, "height": 740}) as page:
        for view in ("text", "summary"):
            page.click(f"#tab-{view}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.emulate_media(media="print")
        assert page.is_visible("#text") and page.is_visible("#position")


@pytest.mark.parametrize("select", ["ipps", "full"])
def test_other_kinds(browser: Any, teacher: Path, corpus: Path, tmp_path: Path, select: str) -> None:
    from kdcache.teacher.dump import dump

    dump(dump_options(teacher, corpus, tmp_path / "c", select=select))
    explorer = Explorer(str(tmp_path / "c"), top=400)
    write_page(explorer, explorer.spread(2), str(tmp_path / "p.html"))
    with opened(browser, (tmp_path / "p.html").as_uri()) as page:
        if select == "ipps":
            assert page.is_disabled("#heat") and page.is_disabled("#tints [value=tail]")
            assert page.locator(".drawn").count() > 0
        else:
            assert page.text_content("#heat-says") == "T 1, exact" and entries(page)[-1][2] == "0"
        page.click("#tab-summary")
        assert "Bytes by stream" in page.text_content("#summary")


def test_a_teacher_and_another(browser: Any, cache: Path, corpus: Path, tmp_path: Path) -> None:
    from kdcache.teacher.dump import dump
    from tests.making import make_model, make_tokenizer

    make_tokenizer(tmp_path / "t")
    make_model(tmp_path / "t", scale=4)
    dump(dump_options(tmp_path / "t", corpus, tmp_path / "other", k=6))
    explorer = Explorer(str(cache), compare=str(tmp_path / "other"))
    write_page(explorer, explorer.spread(3), str(tmp_path / "p.html"))
    with opened(browser, (tmp_path / "p.html").as_uri()) as page:
        page.click("text=in largest disagreement")
        assert page.locator(".share.other").count() > 3
        worst = page.text_content(".statistics div:last-child dd")
        page.click("text=in largest disagreement")
        assert value(worst.split()[0]) >= value(page.text_content(".statistics div:last-child dd").split()[0])
        page.check("#tints [value=kl]", force=True)
        assert page.evaluate("document.body.dataset.tint") == "kl"


def test_a_served_cache_is_read_as_it_is_looked_at(browser: Any, cache: Path) -> None:
    explorer = Explorer(str(cache))
    last = len(open_cache(cache)) - 1
    with ExplorerServer(explorer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with opened(browser, server.url) as page:
                assert page.locator(".row").count() == 8
                page.fill("#row-number", str(last))
                page.keyboard.press("Enter")
                page.wait_for_selector(f"#row-{last}")
                page.wait_for_function(f"document.querySelector('#position h2').textContent.startsWith('Row {last},')")
                page.click("text=most surprising")
                assert "rows read so far" in page.text_content("#found")
                everywhere = explorer.find("wall", 0)["matches"]
                page.fill("#search", "wall")
                page.click("#search-whole")
                told = f"match 1 of {len(everywhere)} in all {last + 1} rows"
                page.wait_for_selector(f'#found:text-is("{told}")')
                page.click("#search-back")  # the last of all, in a row that is read for it
                end = everywhere[-1][0]
                page.wait_for_selector(f'#position h2:has-text("Row {end},")')
                assert "wall" in page.text_content(f"#row-{end} ~ .running")
        finally:
            server.shutdown()
            thread.join()
