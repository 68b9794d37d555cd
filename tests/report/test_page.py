"""The page over all results in a real browser: it sorts, filters, copies, changes its colours, and escapes what it is
given. What needs no browser is tested without.
"""

import os
import re
import subprocess
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import CHROMIUM, browser
from helpers import ROOT
from helpers.report_runs import EVIL, METHODS, PLOTS, SCORES, one, runs
from recombine.errors import UsageError
from recombine.report import page, page_svg, records
from recombine.report.records import Runs
from recombine.runner import grid

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of: a table without CERSA's b, one with three failures, one not run, one that cannot be read. With a
    result.json of one run."""
    here = tmp_path_factory.mktemp("page")
    old = Path.cwd()
    os.chdir(here)
    try:
        part = runs(
            lambda c: (c["method"], c["data.task"]) != ("CERSA", "b"), command=lambda c: f"run.py '{EVIL}' {c['seed']}"
        )
        done = one("x/first", part, title=f"First: {EVIL}", notes=[EVIL])
        (folder := done.experiment.folder / part.records[0].cell).mkdir(parents=True)
        (folder / "result.json").write_text("{}")
        empty = runs(lambda c: c["method"] != "SVFit")
        failed = one("x/second", empty, title="Second: some failed")
        lost = {
            c.folder: EVIL for c in failed.experiment.cells if c.labels["method"] == "SVFit" and c.labels["seed"] == "0"
        }
        failed = one("x/second", Runs(empty.records, empty.cells, lost), title="Second: some failed")
        reports = [
            done,
            failed,
            one("x/third", runs(lambda c: False), title="Third: to come"),
            page.Unread("x/fourth", EVIL),
        ]
        path = here / "outputs" / "report.html"
        path.write_text(page.html(reports, path.parent))
    finally:
        os.chdir(old)
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(chromium, written):
    chromium.look(1280, 900)
    chromium.open(written)
    chromium.js("localStorage.clear()")
    chromium.open(written)
    return chromium


def column(tab, i: int, kind: str = "results") -> list[str]:
    """A column of the first table of a kind, as it stands on the page: what is hidden is left out."""
    return tab.js(
        f"[...document.querySelector('table.{kind}').tBodies[0].rows].filter(row => row.checkVisibility())"
        f".map(row => row.cells[{i}].firstChild?.textContent ?? '')"
    )


def sort_of(tab, i: int) -> str | None:
    return tab.js(f"document.querySelector('.results thead').rows[0].cells[{i}].getAttribute('aria-sort')")


@needs_browser
def test_a_column_is_sorted_by_mouse_and_keyboard(tab):
    means = [100 * SCORES[i, 0].mean() for i in range(3)]
    best_first = [METHODS[i] for i in sorted(range(3), key=lambda i: -means[i])]
    tab.click(".results thead th:nth-child(2) button")  # top-1: best is most
    assert column(tab, 0) == best_first and sort_of(tab, 1) == "descending"
    tab.press("Enter")  # the button has the focus
    assert column(tab, 0) == best_first[::-1] and sort_of(tab, 1) == "ascending"
    tab.press("Enter")
    assert column(tab, 0) == list(METHODS) and sort_of(tab, 1) is None
    tab.press("Tab")  # to the next column, b, which CERSA lacks
    for direction in ("descending", "ascending"):
        tab.press("Enter")
        assert column(tab, 0)[-1] == "CERSA" and sort_of(tab, 2) == direction and column(tab, 2)[-1] == "—"
    tab.click(".results thead th:first-child button")
    assert column(tab, 0) == sorted(METHODS) and sort_of(tab, 0) == "ascending" and sort_of(tab, 2) is None


@needs_browser
def test_rows_are_filtered_by_words(tab):
    assert tab.js("document.querySelectorAll('.results').length") == 2  # of three rows: no box
    assert tab.js("document.querySelector('section[id=\"x/first\"] .both').querySelectorAll('.tools').length") == 0
    tab.click("section details summary")
    assert len(column(tab, 0, "each")) == 24
    tab.click("section details .tools input")
    tab.write("lora 2 a")  # words of any cells, here method and seed
    assert set(column(tab, 0, "each")) == {"LoRA"} and len(column(tab, 0, "each")) < 24
    assert tab.js("document.querySelector('details .tools output').textContent").endswith(" of 24")


def seen(tab, selector: str) -> list[str]:
    """The experiments of the elements that are shown."""
    return tab.js(
        f"[...document.querySelectorAll('{selector}')].filter(e => e.checkVisibility()).map(e => e.dataset.of)"
    )


@needs_browser
def test_cards_and_index_lead_to_every_experiment_and_a_filter_chooses_them(tab):
    names = ["x/first", "x/second"]
    assert seen(tab, ".cards > li") == names == seen(tab, ".contents li[data-of]")
    runs_done = tab.js("[...document.querySelectorAll('.cards .runs')].map(line => line.textContent)")
    assert runs_done == ["24 of 27 runs", "18 of 27 runs, 3 failed"]
    for where in ".cards a", ".contents a":
        for name in names:
            tab.click(f'{where}[href="#{name}"]')
            assert tab.js("document.querySelector(':target').id") == name
    assert tab.js("document.querySelector('#not-run summary').textContent") == "1 experiment has not been run (27 runs)"
    assert seen(tab, "#not-run li") == []
    tab.click("#not-run summary")
    assert seen(tab, "#not-run li") == ["x/third"]
    tab.click("#experiments .tools input")
    tab.write("second")
    assert tab.js("document.querySelector('#experiments output').textContent") == "1 of 2"
    assert seen(tab, "[data-of]") == ["x/second"] * 3


@needs_browser
@pytest.mark.parametrize("width", [390, 1400])
def test_the_index_stays_in_sight(tab, width):
    tab.look(width, 800)
    tab.js("document.getElementById('x/second').scrollIntoView()")
    top = tab.js("document.querySelector('.contents').getBoundingClientRect().top")
    title = tab.js("document.getElementById('x-second-title').getBoundingClientRect().top")
    bar = tab.js("document.querySelector('.contents').offsetHeight") if width < 1200 else 0
    assert abs(top) < 2 and title > bar
    marked = "document.querySelector('.contents [aria-current]')?.textContent"
    assert (
        tab.js(
            f"(async () => {{ for (let i = 0; i < 300 && {marked} !== 'Second'; i++) "
            f"await new Promise(done => setTimeout(done, 10)); return {marked}; }})()"
        )
        == "Second"
    )


@needs_browser
def test_a_table_and_its_plots_stand_side_by_side_where_there_is_room(tab):
    places = (
        "['.sheet', '.plots'].map(part => document.querySelector(`.both > ${part}`).getBoundingClientRect().toJSON())"
    )
    tab.look(1700, 900)
    sheet, plots = tab.js(places)
    assert plots["left"] > sheet["right"] and abs(plots["top"] - sheet["top"]) < 2
    tab.look(390, 800)
    sheet, plots = tab.js(places)
    assert plots["top"] >= sheet["bottom"]


@needs_browser
def test_text_in_plots_is_readable_on_a_phone(tab):
    """As drawn: the font's size in the plot's own units times its scale."""
    tab.look(390, 844)
    sizes = tab.js(
        "[...document.querySelectorAll('figure svg text')].map(t => parseFloat(getComputedStyle(t).fontSize)"
        " * t.getScreenCTM().a).filter(size => size > 0)"  # a turned text has another a
    )
    assert len(sizes) > 20 and min(sizes) >= 8


@needs_browser
def test_two_methods_are_compared_over_all_tasks(chromium, tmp_path):
    """Told apart beyond both errors only: LoRA leads on a, loses on b; on c the test set has no known size."""
    accuracy = {("LoRA", "a"): 0.9, ("LoRA", "b"): 0.4}

    def test(cell: dict) -> dict:
        return {"acc": accuracy.get((cell["method"], cell["data.task"]), 0.6) + 0.01 * int(cell["seed"])}

    wide = runs(test=lambda c: test(c), data=lambda c: {"sizes": {"test": 1000} if c["data.task"] != "c" else {}})
    near = runs(
        lambda c: c["method"] != "SVFit",
        test=lambda c: {"acc": 0.6 + 0.01 * int(c["seed"]) + 0.02 * (c["method"] == "LoRA")},
        data=lambda c: {"sizes": {"test": 1000}},
    )
    apart = runs(
        test=lambda c: {"acc": 0.9 if c["method"] == "LoRA" else 0.1 + 0.001 * int(c["seed"])}, data=lambda c: {}
    )
    reports = [one(f"x/{title}", found, title=f"{title}: x") for title, found in
               (("Wide", wide), ("Near", near), ("Apart", apart))]  # fmt: skip
    (path := tmp_path / "page.html").write_text(page.html(reports, tmp_path))
    chromium.look(1280, 900)
    chromium.open(path)
    choose = "(i, v) => { const s = document.querySelectorAll('#compare select')[i]; s.value = v; s.onchange(); }"
    for i, name in enumerate(("LoRA", "CERSA")):
        chromium.js(f"({choose})({i}, '{name}')")
    found = chromium.js(
        "[...document.querySelector('#compare tbody').rows].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert found[0] == ["Wide: a", "91.0 ± 1.0", "61.0 ± 1.0", "LoRA better, 3 seeds"]
    assert found[1] == ["Wide: b", "41.0 ± 1.0", "61.0 ± 1.0", "CERSA better, 3 seeds"]
    assert found[2] == ["Wide: c", "61.0 ± 1.0", "61.0 ± 1.0", "level"]
    assert [row[3] for row in found[3:6]] == ["level"] * 3 and [row[0] for row in found[3:6]] == [
        f"Near: {t}" for t in "abc"
    ]
    assert [row[3] for row in found[6:]] == ["not known"] * 3  # no error of the test set
    said = "LoRA is better than CERSA in 1, level in 4, worse in 1 of 9 places, and in 3 it is not known."
    assert chromium.js("document.querySelector('.verdict').textContent") == said
    chromium.js(f"({choose})(0, 'SVFit')")
    assert len(chromium.js("[...document.querySelector('#compare tbody').rows].map(r => r.cells[0].textContent)")) == 6


@needs_browser
def test_the_theme_is_the_systems_until_it_is_chosen(tab, written):
    paper = "getComputedStyle(document.body).backgroundColor"
    line = "getComputedStyle(document.querySelector('svg path[style*=\"var(--line)\"]')).stroke"
    tab.look(1280, 900, dark=False)
    light = tab.js(paper), tab.js(line)
    tab.look(1280, 900, dark=True)
    dark = tab.js(paper), tab.js(line)
    assert light[0] == "rgb(255, 255, 255)" and light[0] != dark[0] and light[1] != dark[1]  # plots follow
    assert tab.js("document.querySelector('.theme').textContent") == "Light"
    tab.click(".theme")
    assert tab.js("document.documentElement.dataset.theme") == "light" and tab.js(paper) == light[0]
    tab.open(written)
    assert tab.js(paper) == light[0] and tab.js("document.querySelector('.theme').textContent") == "Dark"  # it is kept
    tab.click(".theme")
    assert (tab.js(paper), tab.js(line)) == dark


@needs_browser
def test_a_command_is_copied(tab, written):
    tab.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    tab.click("section code.command + .copy")
    assert tab.js("navigator.clipboard.readText()") == "python run.py experiment=x/first"
    assert tab.js("document.querySelector('section .copy').textContent") == "Copied"


@needs_browser
def test_nothing_given_runs_and_nothing_else_is_loaded(tab, written):
    problems = ("Log.entryAdded", "Runtime.exceptionThrown", "Security")
    assert [e for e in tab.events if e.get("method", "").startswith(problems)] == []
    asked = [e["params"]["request"]["url"] for e in tab.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
    assert tab.js("document.title") == "recombine: results" and tab.js("document.querySelectorAll('img').length") == 0
    assert tab.js("document.querySelector('section[data-of] h2').textContent") == f"First: {EVIL}"
    assert tab.js("document.querySelector('.each code').textContent") == f"run.py '{EVIL}' 0"
    assert tab.js("document.querySelector('section[data-of] .failed li').textContent").startswith(
        f"3 failed: {EVIL}SVFit / "
    )
    tab.js("document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 2'}))")
    assert tab.js("document.title") == "recombine: results"  # the page's policy refuses it


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 1024])
def test_a_wide_table_scrolls_and_the_page_does_not(tab, width):
    tab.look(width, 800)
    tab.js("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert tab.js("document.documentElement.scrollWidth") <= width
    assert tab.js("[...document.querySelectorAll('.each')].some(e => e.offsetWidth > e.parentElement.clientWidth)")


class Outline(HTMLParser):
    """Checks that elements nest and ids are unique; collects links."""

    VOID = ("meta", "br", "input")

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.ids, self.links = [], [], []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.stack += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.ids += [dict(attrs)["id"]] if "id" in dict(attrs) else []

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_page_is_well_formed_and_its_links_lead_somewhere(written):
    text = written.read_text()
    found = Outline(text)
    assert len(found.ids) == len(set(found.ids))
    assert set(re.findall(r'(?:href="#|url\(#)([\w-]+)', text)) <= set(found.ids) | {"x"}  # of the plots
    for address in found.links:
        if address.startswith("#"):
            assert address[1:] in found.ids
        else:
            assert (written.parent / address).is_file()
    assert sum(address.endswith("result.json") for address in found.links) == 1
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)


def test_the_table_says_what_the_report_says(written):
    text = written.read_text()
    mean = f"{100 * SCORES[0, 0].mean():.1f}"
    deviation = f"{100 * SCORES[0, 0].std(ddof=1):.1f}"
    tie = '(<abbr class="tie">=</abbr>)?'
    assert re.search(
        rf"<td [^>]*>(<strong>)?{mean}(</strong>)? ± {deviation}{tie}<small>paper [\d.]+ \([+−][\d.]+\)", text
    )
    assert ">CERSA</text>" in text and text.count(f"{escape(EVIL, quote=False)}</text>") == 2  # plots have text
    assert text.count("<figure>") == 2 * len(PLOTS) and "<figcaption>Losses" in text


def test_over_all_experiments(tmp_path, monkeypatch, capsys):
    """Every experiment of conf/ with a table is on the page, not run, and one that breaks does not take it along."""
    from recombine.report import __main__ as command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "EVIDENCE", tmp_path / "experiments")
    chosen = tmp_path / "conf"
    for name in ("offline/base", "offline/cersa_fig03", "crisp/tab04", "start"):
        (chosen / "experiment" / name).parent.mkdir(parents=True, exist_ok=True)
        (chosen / "experiment" / f"{name}.yaml").write_text((ROOT / "conf/experiment" / f"{name}.yaml").read_text())
    monkeypatch.setattr(page, "CONF", chosen)
    broken = grid.load("crisp/tab04").cells[0].folder
    (folder := tmp_path / "outputs/crisp/tab04" / broken).mkdir(parents=True)
    (folder / "result.json").write_text("{")
    assert command.main(["--page"]) == 1
    out, err = capsys.readouterr()
    assert (
        "wrote outputs/report.html" in out and err.startswith("report: crisp/tab04: outputs/") and err.count("\n") == 1
    )
    text = (tmp_path / "outputs/report.html").read_text()
    assert "1 of 2 experiments have been started; 0 of " in text and text.count("not a readable result") == 2
    assert 'id="offline/cersa_fig03"' in text and "start" not in Outline(text).ids
    with pytest.raises(UsageError, match="must end in .html"):
        page.write(tmp_path / "cersa/tab09")
    assert command.main(["--page", "p.html", "cersa/tab09"]) == 2 and "leave out cersa/tab09" in capsys.readouterr().err


def test_no_torch_for_a_page():
    code = "import sys, recombine.report.page; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


def test_dark_colours_of_data_are_made_legible_and_others_left():
    assert page_svg.legible("#e69f00") == "#e69f00"
    light, dark = re.fullmatch(r"light-dark\((#\w{6}), (#\w{6})\)", page_svg.legible("#440154")).groups()
    assert light == "#440154" and all(dark[i : i + 2] > light[i : i + 2] for i in (1, 3, 5))
    assert page_svg.themed("fill: none; stroke: #000000") == "fill: none; stroke: var(--ink)"
