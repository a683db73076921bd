"""Write the generated part of docs/architecture.md: the rooms of the package, and which imports which.

`python docs/draw_architecture.py` rewrites the text between the two markers. The arrows are the imports that
tests/unit/test_imports.py reads, and the descriptions are the first lines of the docstrings.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.unit.test_imports import FOLDER, ORDER, Import, read_imports, room  # noqa: E402

PAGE = ROOT / "docs" / "architecture.md"
BEGIN = "<!-- written by docs/draw_architecture.py: do not edit -->"
END = "<!-- end of what docs/draw_architecture.py writes -->"


def graph(imports: list[Import]) -> dict[str, set[str]]:
    """Room -> rooms that it imports."""
    found: dict[str, set[str]] = {}
    for one in imports:
        here, there = room(one.importer), room(one.imported)
        if one.statement and here and there and here != there:
            found.setdefault(here, set()).add(there)
            found.setdefault(there, set())
    return found


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The edges that do not follow from the others (transitive reduction). `edges` must have no circle."""

    def below(start: str) -> set[str]:
        return edges[start].union(*(below(node) for node in edges[start]))

    return {node: to - set().union(*(below(other) for other in to)) for node, to in edges.items()}


def rooms() -> dict[str, Path]:
    """Room -> the file with its docstring, in the order of imports."""
    order = [name for line in ORDER for name in line if not name.startswith("_")]
    return {
        name: path
        for name in order
        for path in (FOLDER / f"{name}.py", FOLDER / name / "__init__.py")
        if path.is_file()
    }


def label(name: str, path: Path) -> str:
    return f"{name}/" if path.name == "__init__.py" else path.name


def block() -> str:
    """The generated part: a Mermaid picture and a table."""
    files, edges = rooms(), reduced(graph(read_imports(FOLDER)))
    lines = ["```mermaid", "flowchart BT"]
    for name, path in files.items():
        node = name + ('["{}"]' if path.name == "__init__.py" else '(["{}"])').format(label(name, path))
        targets = [other for other in files if other in edges.get(name, ())]
        lines.append(f"    {node}" + (f" --> {' & '.join(targets)}" if targets else ""))
    lines += ["```", "", "| room | what it is |", "| --- | --- |"]
    for name, path in files.items():
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        lines.append(f"| `{label(name, path)}` | {summary.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def drawn(page: str) -> str:
    """The page with its generated part as it should be.

    Raises:
        ValueError: the page does not have both markers, once each and in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"{PAGE} must have these two lines, once each and in this order:\n{BEGIN}\n{END}")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    return f"{before}{BEGIN}\n\n{block()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))
