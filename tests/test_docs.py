"""The documentation: every program in it runs, every command and option it names exists, and every page has its place."""

import contextlib
import importlib.util
import re
from pathlib import Path
from unittest import mock

import pytest

from vitcore.blocks import BLOCKS
from vitcore.positions import POSITIONS
from vitcore.stems import STEMS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def programs(page: Path) -> str:
    """The page's Python blocks as one program, each at its own lines."""
    text, inside, lines = page.read_text(), False, []
    for line in text.splitlines():
        fence = line.strip().startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line.strip() == "```python" if fence else inside
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("name", ["extending.md", "index.md", "kernels.md", "library.md"])
def test_the_programs_on_a_page_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = programs(DOCS / name)
    assert "vitcore." in source
    with contextlib.ExitStack() as tables:  # which a page may add entries to
        for table in (STEMS, POSITIONS, BLOCKS):
            tables.enter_context(mock.patch.dict(table))
        exec(compile(source, name, "exec"), {"__name__": "__page__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_exist(page):
    for module, rest in re.findall(r"python -m ((?:train|bench|vitcore)[a-z_.]*[a-z_])([^\n`|]*)", page.read_text()):
        found = importlib.util.find_spec(module)
        assert found is not None, f"{page.name} names python -m {module}: no such module"
        options = re.findall(r"(?<!\S)--([a-z][a-z-]*)", rest.partition("#")[0])
        declared = " ".join(path.read_text() for folder in ("train", "bench", "vitcore") for path in (ROOT / folder).rglob("*.py"))
        for option in options:
            field = option.removeprefix("no-").replace("-", "_")
            known = re.search(rf"^\s+{field}: |\"--{option}\"", declared, re.MULTILINE)
            assert known, f"{page.name}: python -m {module} --{option}: no job declares it"


def test_every_page_is_in_the_site():
    named = set(re.findall(r"([a-z0-9-]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert {page.name for page in PAGES} == named
