"""What the page takes from READMEs, which plots it takes as they are, and what it calls level."""

import os
import subprocess
import sys

import pytest

from helpers import ROOT
from helpers.report_runs import METHODS, one, runs
from recombine import report
from recombine.report import (
    agreement,
    drawn,
    page_bars,
    page_cards,
    page_inline,
    page_lead,
    plots,
    records,
    render,
    studies,
)
from recombine.report.records import Record, Runs
from recombine.report.table_data import Entry
from recombine.report.ties import level
from recombine.runner import grid

README = """# Joint against chain

Three tasks, `equal` bytes. More.

![JACTUS leads at a quarter of the bytes.](figure.svg)

## Findings

- **Joint** wins at 25 %.
  It does so on 2 of 3 tasks.
- See [the table](table.csv) and [nothing](gone.csv). <script>1</script>
- A third.
- A fourth.

## Below

- Not a finding.
"""
SVG = '<svg viewBox="0 0 300 200"><style>*{}</style><g id="axes_1"><path id="m1" d="M 0 0"/><use href="#m1"/></g></svg>'


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "EVIDENCE", tmp_path)
    return tmp_path


def folder(evidence, name: str, readme: str, **files: str):
    (evidence / name).mkdir(parents=True)
    for file, text in {"README.md": readme, **{key.replace("_", "."): text for key, text in files.items()}}.items():
        (evidence / name / file).write_text(text)


def test_the_leaderboard_leads_once_it_has_a_figure_and_findings(evidence):
    csv = "method,accuracy,low,high\ncrisp,60.5,58,63\nsvd_llm,50,,\n"
    folder(evidence, "compressors", "# Compressors\n\nAll.\n\n## Findings\n\n- One.\n", x_csv=csv)
    folder(evidence, "leaderboard", README.replace("## Findings", "## To come"), figure_svg=SVG, table_csv="a\n")
    found = studies.studies()
    assert studies.lead(found).name == "compressors"
    bars = page_lead.leading(studies.lead(found), evidence)
    assert "CRISP</span>" in bars and "60.5 (58 to 63)" in bars and ">50</b>" in bars and "SVD-LLM" in bars
    assert "left:92.1%;width:7.9%" in bars  # the interval, of 63

    (evidence / "leaderboard/README.md").write_text(README)
    first = studies.lead(studies.studies())
    assert (first.title, first.intro) == ("Joint against chain", "Three tasks, `equal` bytes.")
    assert first.findings[0] == "**Joint** wins at 25 %. It does so on 2 of 3 tasks." and len(first.findings) == 4
    shown = page_lead.leading(first, evidence)
    assert "<figcaption>JACTUS leads at a quarter of the bytes.</figcaption>" in shown
    assert "<li><b>Joint</b> wins" in shown and "A third." in shown and "A fourth." not in shown
    assert '<a href="leaderboard/table.csv">the table</a> and nothing. &lt;script&gt;' in shown
    assert (
        "<style" not in shown and 'id="plot-study-leaderboard-m1"' in shown and '"#plot-study-leaderboard-m1"' in shown
    )


def test_the_sentence_that_links_to_a_plot_is_its_caption(evidence):
    text = """# X

- **Tab. 7** ([table](../a/b/table.md), [plot](../a/b/memory.svg)): ten of 15 pairs. The
  [losses](../a/b/losses.svg) of all but `SVFit` fall. No more.

Of [another](../a/c/table.md). And [out](https://example.org/x.svg), [own](x.svg).
"""
    folder(evidence, "x", text)
    said = studies.said(studies.studies())
    assert set(said) == {"a/b", "a/c"} and said["a/c"].captions == {}
    assert said["a/b"].captions == {"memory": "ten of 15 pairs.", "losses": "The losses of all but `SVFit` fall."}
    assert page_inline.spoken(said["a/b"].captions["memory"]) == "Ten of 15 pairs."


def test_every_plot_of_the_evidence_has_a_sentence_and_is_drawn_from_its_records(tmp_path, monkeypatch):
    """So that a page over committed evidence needs no matplotlib, and no caption is a name."""
    monkeypatch.chdir(tmp_path)  # where no results are
    said = studies.said(studies.studies())
    for path in sorted(records.EVIDENCE.glob("*/*/*.svg")):
        name = path.parent.relative_to(records.EVIDENCE).as_posix()
        made = report.build(grid.read(name))
        key = drawn.digest(path.stem, made.experiment.report["plots"][path.stem], made.runs)
        assert drawn.kept(path, key), f"python -m recombine.report {name} --save"
        assert made.committed and said[name].captions[path.stem].endswith("."), (name, path.stem)


def test_a_plot_is_taken_as_it_is_only_if_nothing_has_changed(tmp_path):
    found, spec = runs(), {"p": {"kind": "curves", "y": "curves.train/loss", "line": "method"}}
    (path,) = plots.save(spec, found, tmp_path)
    assert drawn.kept(path, drawn.digest("p", spec["p"], found)).startswith("<?xml")
    fewer = Runs(found.records[1:], found.cells, {})
    assert drawn.kept(path, drawn.digest("p", spec["p"], fewer)) is None
    assert drawn.kept(path, drawn.digest("p", spec["p"] | {"ylog": True}, found)) is None
    assert drawn.kept(tmp_path / "none.svg", "") is None


def test_a_page_over_the_evidence_draws_nothing(tmp_path):
    code = (
        "import sys; from pathlib import Path; from recombine.report import page, studies\n"
        "text = page.html(list(page.read()), Path('outputs'), studies.studies())\n"
        "print(len(text) > 3e5, [m for m in ('torch', 'matplotlib') if m in sys.modules])"
    )
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}  # without results
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **where)
    assert found.stdout.strip() == "True []"


@pytest.mark.parametrize(
    "name",
    ["start", "offline/cersa_tab07_09", "offline/crisp_tab02", "offline/jactus_fig03", "jactus/vision", "cersa/tab08"],
)
def test_an_experiment_read_without_hydra_is_the_composed_one(name):
    light, full = grid.read(name), grid.load(name)
    assert light.grid == full.grid and light.report == full.report
    if light.grid:
        assert render.text(report.build(light).table) == render.text(report.build(full).table)


def test_level_is_what_errors_do_not_tell_apart():
    best = Entry(60.0, 1.0, 2, 2, error=0.5, digits=1)
    assert level(Entry(57.1, 1.0, 2, 2, error=0.5), best) and not level(Entry(56.9, 1.0, 2, 2, error=0.5), best)
    assert level(Entry(55.0, None, 1, 1, error=5.0), best) and not level(Entry(50.0, None, 1, 1, error=5.0), best)
    alone = Entry(60.0, None, 1, 1)
    assert level(Entry(60.04, None, 1, 1), alone) and not level(Entry(60.06, None, 1, 1), alone)  # as printed


def test_a_card_says_what_is_level_and_what_chance_gives():
    found = one("x/card", runs())
    text = page_cards.card(found, None)
    same, pairs, mean, deviation = agreement.of_column(found.table, 0)
    assert f"{same:g} of {pairs} pairs in the paper's order (a); chance gives {mean:g} ± {deviation:.1f}." in text
    assert any(f"Highest: {name}, " in text for name in METHODS)
    alone = Runs(
        [Record(r.labels, r.data, r.cell) for r in found.runs.records if r.labels["seed"] == "0"],
        [cell for cell in found.runs.cells if cell["seed"] == "0"],
        {},
    )
    assert "; of one run each." in page_cards.best(one("x/one", alone).table)


def test_bars_start_from_zero():
    drawn_bars = page_bars.thumb([50.0, 100.0], {1})
    assert 'width="75.0"' in drawn_bars and 'width="150.0"' in drawn_bars and drawn_bars.count('class="first"') == 1
