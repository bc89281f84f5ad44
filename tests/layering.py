"""The order of imports between the parts of the engine; `python -m tests.layering` prints it.

A part is a file or folder of `engine/`, and a room is a folder of a part. Parts may only import parts printed above
them, and rooms only rooms of the same part printed above them; files at the top of a part count one by one. Within a
room, modules may import each other but never in a circle.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import engine

PACKAGE = Path(engine.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
PUBLIC = "engine"
"""The package's own file: it loads the public names on demand, so its arrows are not imports."""


def module_name(path: Path) -> str:
    """Dotted name of a file of the package; a package goes by its folder's name."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in MODULES}


def imports(path: Path) -> list[str]:
    """Full names of all modules a file imports, also inside functions and for type checking only."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.append(name if name in NAMES else str(node.module))
    return found


def part_of(name: str) -> str:
    """The file or folder of `engine/` that a module belongs to."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else PUBLIC


def room_of(name: str) -> str:
    """Of a module inside a part: its folder, or its own name at the top of the part."""
    pieces = name.split(".")
    return pieces[2] if len(pieces) > 2 else "__init__"


def parts_with_rooms() -> list[str]:
    """The parts that have folders."""
    folders = {path.relative_to(PACKAGE).parts[0] for path in MODULES if len(path.relative_to(PACKAGE).parts) > 2}
    return sorted(folders)


Arrows = dict[str, set[str]]


def arrows(names: Iterable[str], place: Callable[[str], str]) -> Arrows:
    """For each place, the other places that its modules import."""
    graph: Arrows = {}
    chosen = set(names)
    for name in chosen - {PUBLIC}:
        targets = graph.setdefault(place(name), set())
        for target in imports(NAMES[name]):
            if target in chosen and target != PUBLIC and place(target) != place(name):
                targets.add(place(target))
    return graph


def order(graph: Mapping[str, set[str]]) -> list[str]:
    """Places from the lowest up.

    Raises:
        CycleError: two places import each other, directly or through others.
    """
    sorter = TopologicalSorter({place: sorted(targets) for place, targets in sorted(graph.items())})
    return list(sorter.static_order())


def parts() -> Arrows:
    """Imports between the parts of the engine."""
    return arrows(NAMES, part_of)


def rooms(part: str) -> Arrows:
    """Imports between the rooms of a part."""
    return arrows([name for name in NAMES if name.startswith(f"engine.{part}.")], room_of)


def modules() -> Arrows:
    """Imports between single modules."""
    return arrows(NAMES, lambda name: name)


def main() -> None:
    """Print every order, or the circle that forbids one."""
    for title, graph in (("engine", parts()), *((f"engine/{part}", rooms(part)) for part in parts_with_rooms())):
        print(title)
        try:
            for place in order(graph):
                print(f"  {place:20} imports {', '.join(sorted(graph[place])) or 'nothing'}")
        except CycleError as error:
            print(f"  circle: {' -> '.join(error.args[1])}")


if __name__ == "__main__":
    main()
