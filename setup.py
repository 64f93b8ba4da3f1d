"""What pyproject.toml cannot say: a checkout has four packages side by side, the wheel has one.

In a checkout, and where it is installed with `pip install -e`, code says `from kernels...`, `from train...` and people say
`python -m train.pretrain`. Installed for good, such names would be anybody's: a `train.py` beside the user's script would take the
place of ours. So the wheel holds kernels, train and bench within vitcore, and every import and every module's name in a string or
a docstring there begins with `vitcore.`.
"""

import ast
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

INNER = ("bench", "kernels", "train")
OUTER = "vitcore"
EDITABLE = any(command in sys.argv for command in ("editable_wheel", "develop"))
DATA = {"kernels": ["py.typed"], "vitcore": ["py.typed"], "bench": ["calibration.json"]}

# A dotted name in a text; what stands before it tells a module's name from a file's.
NAME = re.compile(rf"(?<![\w./\\-])(?:{'|'.join(INNER)})(?:\.[A-Za-z_]\w*)+")
BEFORE_A_FIELD = re.compile(rf"(?<![\w./\\-])(?:{'|'.join(INNER)})\.$")  # f"kernels.{op}.tpu"


def found() -> list[str]:
    """The packages of the checkout."""
    return find_packages(include=[pattern for name in (OUTER, *INNER) for pattern in (name, f"{name}.*")])


def modules(root: Path) -> set[str]:
    """Of the packages that move, every module there is."""
    names = (path.relative_to(root).with_suffix("").parts for inner in INNER for path in (root / inner).rglob("*.py"))
    return {".".join(parts).removesuffix(".__init__") for parts in names}


def rewritten(source: str, known: set[str]) -> str:
    """A file's text as it stands within vitcore. ValueError for an import that cannot move: `import train.x` binds the name train.

    known: the modules that move, by the names they have in a checkout.
    """
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    tree, places = ast.parse(source), set()
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node) if part is not node}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in INNER:
                    if alias.asname is None:
                        raise ValueError(f"line {node.lineno}: import {alias.name}: say `from ... import ...`, or `as`")
                    places.add(span(alias)[0])
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in INNER:
            start, end = span(node)
            places.add(start + data[start:end].index((node.module or "").encode(), len("from")))
        elif id(node) not in within and (isinstance(node, ast.JoinedStr) or is_text(node)):
            start, end = span(node)
            text = data[start:end].decode()
            places |= {start + len(text[:at].encode()) for at in named(text, known, fields=isinstance(node, ast.JoinedStr))}
    for place in sorted(places, reverse=True):
        data = data[:place] + f"{OUTER}.".encode() + data[place:]
    return data.decode()


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def named(text: str, known: set[str], *, fields: bool) -> Iterator[int]:
    """Where modules are named in a string's text; fields: it is an f-string, and what is in braces is code."""
    for start, literal in literals(text) if fields else [(0, text)]:
        for match in NAME.finditer(literal):
            parts = match[0].split(".")
            if any(".".join(parts[:n]) in known for n in range(2, len(parts) + 1)):
                yield start + match.start()
        if fields and text[start + len(literal) :].startswith("{") and (match := BEFORE_A_FIELD.search(literal)):
            yield start + match.start()


def literals(text: str) -> Iterator[tuple[int, str]]:
    """(start, text) of what is not in braces in an f-string."""
    depth, start, at = 0, 0, 0
    while at < len(text):
        if text[at : at + 2] in ("{{", "}}") and not depth:
            at += 2
            continue
        if text[at] == "{":
            if not depth:
                yield start, text[start:at]
            depth += 1
        elif text[at] == "}":
            depth -= 1
            start = at + 1
        at += 1
    yield start, text[start:]


class Build(build_py):
    """Copies the packages, and in a copy that is not a checkout's rewrites the names."""

    def run(self):
        if EDITABLE:
            return super().run()
        shutil.rmtree(self.build_lib, ignore_errors=True)  # or what an earlier build left would be in the wheel, too
        super().run()
        known = modules(Path(__file__).resolve().parent)
        for path in sorted((Path(self.build_lib) / OUTER).rglob("*.py")):
            try:
                text = rewritten(path.read_text(encoding="utf-8"), known)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            path.write_text(text, encoding="utf-8")


def moved(names: Iterable[str]) -> list[str]:
    return [f"{OUTER}.{name}" if name.split(".")[0] in INNER else name for name in names]


if __name__ == "__main__":
    inner = {} if EDITABLE else {f"{OUTER}.{name}": name for name in INNER}
    setup(
        packages=found() if EDITABLE else moved(found()),
        package_dir={OUTER: OUTER, **inner},
        package_data=DATA if EDITABLE else dict(zip(moved(DATA), DATA.values(), strict=True)),
        cmdclass={"build_py": Build},
        entry_points={"console_scripts": [f"vitcore = {'train' if EDITABLE else f'{OUTER}.train'}.command:main"]},
    )
