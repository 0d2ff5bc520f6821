"""README and docs: links lead somewhere, commands resolve, and the README stays short."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

import main
from studies.engine.resolver import resolve

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "assets/pair/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = re.compile(r"^python main\.py ((?:fit|validate|test|predict) .*)$", re.MULTILINE)
FOLDERS = "configs|studies|benchmarks|assets|tests|lightning_modules|datamodules|callbacks|cli"
FILE = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w/]+\.(?:yaml|py|json|svg|md)")


def anchors(text: str) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run_commands(text: str) -> list[str]:
    """The command lines of runs in a page's shell blocks, without the program's name."""
    blocks = [block.replace("\\\n", " ") for block in BLOCK.findall(text)]
    return [line for block in blocks for line in RUN.findall(block) if "$" not in line]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not heading or heading in anchors(target.read_text()), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_names_exist(page):
    named = set(FILE.findall(page.read_text())) - {"studies/mine.yaml"}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_resolve(page, workplace):
    (workplace / "tests").symlink_to(ROOT / "tests")
    for line in run_commands(page.read_text()):
        assert resolve(*shlex.split(line, comments=True))["model"], line


def test_the_study_of_the_readme_is_one(workplace, capsys):
    (study,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    Path("mine.yaml").write_text(study)
    main.main(["study", "mine.yaml", "--report-only"])
    assert "0 of 15 runs finished" in capsys.readouterr().out


def test_the_readme_is_short_and_has_the_two_commands():
    text = Path(ROOT, "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(run_commands(text)) > 5
    for number in (1, 2):
        assert f"<!-- command {number} -->\n```bash\n" in text
