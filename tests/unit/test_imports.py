"""Imports inside exact_megatron: they point one way, in no circle, and no file takes another's _private names.

Read from the source, wherever an import stands (in a function, for type checkers only, or as a name in cli.py's table).
Run alone: check_imports.py [CHECKOUT].
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

NAME = "exact_megatron"

# The method first, then its uses: a room imports from its own line and from those above it.
ORDER = (
    ("ranges", "refusals", "config", "packing", "blend", "batch_context", "attention"),
    ("exposure", "index_caches", "qk_timing", "utils"),
    ("allocation",),
    ("loss", "reporting"),
    ("dataset",),
    ("training", "integrations"),
    ("prepare",),
    ("convert", "evaluation", "planning"),
    ("benchmark", "study"),
    ("commands", "launch"),
    ("cli",),
    ("__main__",),
)
APART = (("training", "integrations"),)  # rooms of one line that do not know each other


@dataclass(frozen=True)
class Import:
    """`importer` and `imported` are modules by their dotted names; `names` of the imported one that the importer uses.

    `statement`: an import statement, else a use of an attribute of a module that one brought."""

    importer: str
    imported: str
    names: tuple[str, ...]
    where: str
    statement: bool = True


def modules(folder: Path) -> dict[str, Path]:
    """Dotted name -> file of every module in the package's folder."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [NAME, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """The part of the package that a module belongs to; "" is the package itself, which everyone may import."""
    return (module.split(".") + [""])[1]


def read_imports(folder: Path) -> list[Import]:
    """All imports of the package's modules among each other."""
    known, found = modules(folder), []
    for name, path in known.items():
        tree = ast.parse(path.read_text(), str(path))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        local: dict[str, str] = {}  # names that stand for a module
        for node in ast.walk(tree):
            targets: list[tuple[str, tuple[str, ...]]] = []
            if isinstance(node, ast.Import):
                for alias in node.names:
                    targets.append((alias.name, ()))
                    if alias.asname:
                        local[alias.asname] = alias.name
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    if f"{source}.{alias.name}" in known:
                        targets.append((f"{source}.{alias.name}", ()))
                        local[alias.asname or alias.name] = f"{source}.{alias.name}"
                    else:
                        targets.append((source, (alias.name,)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("."):
                targets.append((package + node.value, ()))  # ".commands.train", a module of cli.py's table
            for target, names in targets:
                if target in known and target != name:
                    found.append(Import(name, target, names, f"{path.relative_to(folder.parent)}:{node.lineno}"))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and local.get(node.value.id) in known
            ):
                where = f"{path.relative_to(folder.parent)}:{node.lineno}"
                found.append(Import(name, local[node.value.id], (node.attr,), where, False))
    return found


def against_the_order(imports: list[Import]) -> list[str]:
    """One line for each import that points the wrong way, or that concerns a room that ORDER does not name."""
    level = {name: number for number, line in enumerate(ORDER) for name in line}
    pairs = {(room(found.importer), room(found.imported)) for found in imports}
    problems = []
    for found in (i for i in imports if i.statement):
        here, there = room(found.importer), room(found.imported)
        unknown = {here, there} - level.keys() - {""}
        if unknown:
            problems.append(f"{found.where}: ORDER does not name {', '.join(sorted(unknown))}")
        elif "" not in (here, there) and level[here] < level[there]:
            problems.append(f"{found.where}: {here} imports {there} ({found.imported}), which comes after it")
        elif here != there and level.get(here) == level.get(there) and (there, here) in pairs:
            problems.append(f"{found.where}: {here} and {there} import each other")
        elif any(here != there and {here, there} == set(pair) for pair in APART):
            problems.append(
                f"{found.where}: {here} imports {there} ({found.imported}), and neither is to know the other"
            )
    return sorted(set(problems))


def circles(imports: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others in the group (strongly connected components)."""
    graph: dict[str, set[str]] = {}
    for found in imports:
        graph.setdefault(found.importer, set()).add(found.imported)
        graph.setdefault(found.imported, set())

    def reachable(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for following in graph[waiting.pop()] - seen:
                seen.add(following)
                waiting.append(following)
        return seen

    reach = {module: reachable(module) for module in graph}
    groups = {frozenset(other for other in reach[module] if module in reach[other]) for module in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def private_names(imports: list[Import]) -> list[str]:
    """One line for each _private name of another file."""
    return sorted(
        {
            f"{found.where}: {found.imported}.{name} is private"
            for found in imports
            for name in found.names
            if name.startswith("_") and not name.startswith("__")
        }
    )


def private_attributes(folder: Path) -> list[str]:
    """One line for each `thing._name` whose `_name` is a function or method of other files of the package alone."""
    trees = {path: ast.parse(path.read_text(), str(path)) for path in sorted(folder.rglob("*.py"))}
    defined = {
        path: {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for path, tree in trees.items()
    }
    everywhere = set().union(*defined.values())
    return sorted(
        f"{path.relative_to(folder.parent)}:{node.lineno}: {ast.unparse(node)} is private"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in ("_asdict", "_replace")  # of a NamedTuple, public
        and ast.unparse(node.value) not in ("self", "cls")
        and node.attr in everywhere - defined[path]
    )


def links(imports: list[Import], group: list[str]) -> list[str]:
    """The imports that make a group a circle."""
    return sorted(
        {
            f"{i.where}: {i.importer} -> {i.imported}"
            for i in imports
            if i.statement and {i.importer, i.imported} <= set(group)
        }
    )


FOLDER = Path(__file__).resolve().parents[2] / NAME  # of tests/unit/test_imports.py


def test_imports_point_one_way() -> None:
    assert against_the_order(read_imports(FOLDER)) == []


def test_no_modules_import_each_other() -> None:
    imports = read_imports(FOLDER)
    assert [links(imports, group) for group in circles(imports)] == []


def test_no_file_takes_private_names_of_another() -> None:
    assert private_names(read_imports(FOLDER)) + private_attributes(FOLDER) == []


def main() -> int:
    folder = Path(sys.argv[1], NAME) if len(sys.argv) > 1 else FOLDER
    imports = read_imports(folder)
    groups = circles(imports)
    print(f"circles: {len(groups)}")
    for group in groups:
        print("  " + ", ".join(group), *(f"    {link}" for link in links(imports, group)), sep="\n")
    for title, lines in (
        ("against the order", against_the_order(imports)),
        ("private names", private_names(imports) + private_attributes(folder)),
    ):
        print(f"{title}: {len(lines)}", *(f"  {line}" for line in lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
