"""The pages for readers: links, commands, the length of the README, the table of methods."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

import recombine.runtime.naming  # noqa: F401  resolvers that conf/config.yaml uses
from helpers import CONF, ROOT
from scripts import docs_methods

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "experiments").glob("*/README.md"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{page.name}: {target.name} has no heading #{anchor}"


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s:]+)", page.read_text())
        todo += [(page.parent / link).resolve() for link in links]
    assert {page for page in PAGES if page.parent == ROOT / "docs"} <= reached


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_table_of_methods_is_made_from_the_code():
    text = docs_methods.PAGE.read_text()
    assert docs_methods.page(text) == text, "run python scripts/docs_methods.py"
    names = re.findall(r"^\| `(\w+)` \| \[", text, flags=re.M)
    assert names == sorted(path.stem for path in (ROOT / "conf/method").glob("*.yaml"))


def test_a_page_out_of_date_is_reported(tmp_path, monkeypatch, capsys):
    page = tmp_path / "methods.md"
    page.write_text(docs_methods.PAGE.read_text().replace("| `cersa` |", "| `old` |"))
    monkeypatch.setattr(docs_methods, "PAGE", page)
    assert docs_methods.main(["--check"]) == 1
    assert "run python scripts/docs_methods.py" in capsys.readouterr().err
    assert docs_methods.main([]) == 0 and docs_methods.main(["--check"]) == 0
    assert page.read_text() == (ROOT / "docs/methods.md").read_text()


def commands(page: Path) -> list[str]:
    """The calls of run.py in the indented blocks of a page, each on one line."""
    text = page.read_text().replace("\\\n", " ")
    calls = re.findall(r"^    \S*python run\.py(.*)$", text, flags=re.M)
    return [call for call in calls if "--config-dir" not in call]  # test_extending.py runs those


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_compose(page):
    """Groups, choices and keys of every command exist; of a sweep the first value of each axis is composed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for command in commands(page):
            words = [word for word in shlex.split(command, comments=True) if "=" in word]
            overrides = []
            for override in OverridesParser.create().parse_overrides(words):
                if not override.is_sweep_override():
                    overrides.append(override.input_line)
                elif override.is_discrete_sweep():  # of a tag(log, interval(...)) there is no first
                    overrides.append(f"{override.key_or_group}={next(override.sweep_string_iterator())}")
            compose("config", overrides, return_hydra_config=True)
