"""The rooms of the package: what imports what, in which direction, and how large the parts are.

A room is a top-level module or folder of the package. There is an arrow from one room to another if any module of the
first imports any of the second; imports in functions and for type checking count as well.

`python tests/test_rooms.py [PACKAGE FOLDER]` prints the numbers, also of another checkout.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest


PACKAGE = Path(__file__).parents[1] / "peft_pvm"
MOST_ARROWS, MOST_FLOORS, MOST_MODULES = 66, 8, 145  # modules beside those of methods, which may grow in number
MOST_LINES, MOST_PARAMETERS = 60, 7  # of a function

# Which rooms a room may import, from the top of the house to its bottom. "" is the package's own __init__.py.
TOKENS = {"utils", "tokens"}
ATTENTION = TOKENS | {"attention"}
TUNERS = ATTENTION | {"folders", "tuners"}
METHODS = TUNERS | {"methods"}
SIDE_ROOMS = METHODS | {"", "env"}  # what integrations, probe, bench and demo stand on
ALLOWED = {
    "cli": SIDE_ROOMS | {"integrations", "compare", "probe", "bench", "demo"},
    "compare": SIDE_ROOMS | {"probe"},
    "integrations": SIDE_ROOMS | {"probe"},
    "training": SIDE_ROOMS,
    "probe": SIDE_ROOMS,
    "bench": SIDE_ROOMS,
    "demo": SIDE_ROOMS | {"training"},
    "": METHODS,
    "env": {"utils", ""},
    "methods": TUNERS,
    "tuners": ATTENTION | {"folders"},
    "folders": TOKENS,
    "attention": TOKENS,
    "tokens": {"utils"},
    "utils": set(),
}
OTHER_ARROWS: dict[tuple[str, str], str] = {}  # the reasons why these are there all the same

NAMELESS = ("tokens", "attention", "tuners", "folders", "utils")  # rooms that name no method
METHOD_NAME = re.compile(r"(?<!peft[-_ ])pvm|dipe|t-?drs", re.IGNORECASE)
# A module, a part of its line, and the reason why that names a method.
NAMED: dict[tuple[str, str], str] = {
    ("folders.base_checkpoint", "model-pvm.safetensors"): "a name on the disk, which copies that exist have",
    ("tokens.positions", "arXiv 2603.10863"): "anchors are defined there",
    ("utils.distractors", "arXiv 2603.10863"): "whose protocol it is",
    ("tuners.active", "with attached(model"): "an example",
    ("tuners.names", "runs/pvm"): "an example",
    ("tuners.loading", "add_adapters(model, {"): "an example",
    ("tuners.loading", "load_adapters(model, ["): "an example",
}

# Functions that are longer, and why they are in one piece.
LONG_FUNCTIONS = {"peft_pvm.methods.tdrs.triton_kernel._pass": "one kernel, whose parts share some forty tensors"}


def lines_of(function: ast.FunctionDef) -> int:
    """From `def` on, without decorators."""
    return function.end_lineno - function.lineno + 1


def parameters_of(function: ast.FunctionDef) -> int:
    """Named parameters, without `self`."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return len([parameter for parameter in named if parameter.arg not in ("self", "cls")])


@dataclass(frozen=True)
class Module:
    """A module of a package, from its source.

    Attributes:
        name: With dots, without the package's.
        path: Its file.
    """

    name: str
    path: Path

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]

    @functools.cached_property
    def source(self) -> str:
        return self.path.read_text()

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    def imports(self, package: str) -> Iterator[str]:
        """What it imports of its own package, as names without the package's, and all names it imports of another."""
        inside = [package, *filter(None, self.name.split("."))]
        if self.path.name != "__init__.py":
            inside.pop()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                start = inside[: len(inside) - node.level + 1] if node.level else []
                source = ".".join([*start, *filter(None, [node.module])])
                yield from (f"{source}.{alias.name}" for alias in node.names)

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef]]:
        """Each function and method, with its name after the module's."""

        def visit(node: ast.AST, place: str) -> Iterator[tuple[str, ast.FunctionDef]]:
            for child in ast.iter_child_nodes(node):
                is_function = isinstance(child, ast.FunctionDef)
                name = f"{place}.{child.name}" if is_function or isinstance(child, ast.ClassDef) else place
                if is_function:
                    yield name, child
                yield from visit(child, name)

        yield from visit(self.tree, self.name)

    def casts(self) -> int:
        calls = (node.func for node in ast.walk(self.tree) if isinstance(node, ast.Call))
        return sum(ast.unparse(call) in ("cast", "typing.cast") for call in calls)

    def ignores(self) -> int:
        return len(re.findall(r"# type: ignore", self.source))


class House:
    """A package, from its sources.

    Args:
        folder: Of the package.
    """

    def __init__(self, folder: Path):
        self.package = folder.name
        self.modules = {}
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self.modules[name] = Module(name, path)

    @functools.cached_property
    def graph(self) -> nx.DiGraph:
        """Which module imports which. To import a module does not count as an import of the folder it lies in."""
        graph = nx.DiGraph()
        graph.add_nodes_from(self.modules)
        for module in self.modules.values():
            for name in module.imports(self.package):
                start, _, found = name.partition(".")
                if start == self.package:
                    while found not in self.modules:  # a name in a module
                        found = found.rpartition(".")[0]
                    if found != module.name:
                        graph.add_edge(module.name, found)
        return graph

    @functools.cached_property
    def rooms(self) -> nx.DiGraph:
        graph = nx.DiGraph()
        graph.add_nodes_from(module.room for module in self.modules.values())
        for importing, imported in self.graph.edges:
            ends = self.modules[importing].room, self.modules[imported].room
            if ends[0] != ends[1]:
                graph.add_edge(*ends)
        return graph

    def circles(self) -> list[list[str]]:
        """Modules that import one another, directly or through others."""
        return sorted(sorted(part) for part in nx.strongly_connected_components(self.graph) if len(part) > 1)

    def floors(self) -> list[list[str]]:
        """The longest way down, from room to room; rooms in a circle are on one floor."""
        condensed = nx.condensation(self.rooms)
        return [sorted(condensed.nodes[part]["members"]) for part in nx.dag_longest_path(condensed)]

    def lines(self) -> int:
        return sum(len(module.source.splitlines()) for module in self.modules.values())

    def functions(self, measure: Callable[[ast.FunctionDef], int], most: int) -> dict[str, int]:
        """The functions of which there is more than so much, largest first."""
        found = {
            f"{self.package}.{name}": measure(function)
            for module in self.modules.values()
            for name, function in module.functions()
        }
        return {name: found[name] for name in sorted(found, key=lambda name: -found[name]) if found[name] > most}

    def named_methods(self, rooms: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """Each line in these rooms in which a method is named, with its module."""
        for module in self.modules.values():
            if module.room in rooms:
                lines = module.source.splitlines()
                yield from ((module.name, line.strip()) for line in lines if METHOD_NAME.search(line))


@pytest.fixture(scope="module")
def house() -> House:
    return House(PACKAGE)


def test_no_modules_import_one_another(house: House):
    assert house.circles() == []


def test_the_house_is_of_this_size(house: House):
    numbers = {
        "arrows": (len(house.rooms.edges), MOST_ARROWS),
        "floors": (len(house.floors()), MOST_FLOORS),
        "modules": (sum(module.room != "methods" for module in house.modules.values()), MOST_MODULES),
    }
    assert {what: number for what, number in numbers.items() if number[0] > number[1]} == {}


def test_imports_run_one_way(house: House):
    assert sorted(house.rooms) == sorted(ALLOWED)
    others = [arrow for arrow in house.rooms.edges if arrow[1] not in ALLOWED[arrow[0]]]
    assert sorted(others) == sorted(OTHER_ARROWS)


def test_methods_do_not_import_one_another(house: House):
    between = {tuple(".".join(name.split(".")[:2]) for name in arrow) for arrow in house.graph.edges}
    inside = {arrow for arrow in between if all(name.startswith("methods.") for name in arrow)}
    assert {arrow for arrow in inside if arrow[0] != arrow[1]} == set()


def test_the_package_does_not_import_experiments(house: House):
    imported = {name.partition(".")[0] for module in house.modules.values() for name in module.imports(house.package)}
    assert imported & {"experiments", "tests"} == set()


def test_rooms_below_the_methods_name_none(house: House):
    assert set(NAMELESS) <= set(house.rooms)
    named = set(house.named_methods(NAMELESS))
    allowed = {line for line in named for module, part in NAMED if line[0] == module and part in line[1]}
    assert sorted(named - allowed) == []
    unused = [(module, part) for module, part in NAMED if not any(n == module and part in line for n, line in named)]
    assert unused == [], "what these exceptions are for is gone"


def test_functions_are_short(house: House):
    assert sorted(house.functions(lines_of, MOST_LINES)) == sorted(LONG_FUNCTIONS)


def test_a_circle_an_arrow_and_a_name_are_seen(tmp_path: Path):
    files = {
        "__init__.py": "from .tokens import families\n",
        "tokens/__init__.py": "",
        "tokens/families.py": "def find():\n    from ..tuners.base import Tuner\n",
        "tuners/__init__.py": "",
        "tuners/base.py": "from peft_pvm.tokens.families import find\nimport peft_pvm\nx = 'T-DRS'  # of peft_pvm\n",
    }
    for name, text in files.items():
        path = tmp_path / "peft_pvm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    house = House(tmp_path / "peft_pvm")
    assert house.circles() == [["", "tokens.families", "tuners.base"]]
    assert set(house.rooms.edges) == {("", "tokens"), ("tokens", "tuners"), ("tuners", "tokens"), ("tuners", "")}
    assert len(house.floors()) == 1
    assert list(house.named_methods(NAMELESS)) == [("tuners.base", "x = 'T-DRS'  # of peft_pvm")]


def show(folder: Path) -> None:
    house = House(folder)
    modules = house.modules.values()
    for title, number in {
        "rooms": len(house.rooms),
        "arrows between rooms": len(house.rooms.edges),
        "circles of modules": len(house.circles()),
        "floors": len(house.floors()),
        "modules": len(modules),
        "lines": house.lines(),
        f"functions over {MOST_LINES} lines": len(house.functions(lines_of, MOST_LINES)),
        f"over {MOST_PARAMETERS} parameters": len(house.functions(parameters_of, MOST_PARAMETERS)),
        "casts": sum(module.casts() for module in modules),
        "type: ignore": sum(module.ignores() for module in modules),
    }.items():
        print(f"{title:<27} {number:>6}")
    print("\ncircles")
    for circle in house.circles():
        print("  " + ", ".join(name or house.package for name in circle))
    print("\nfloors, the longest way down")
    for floor in house.floors():
        print("  " + ", ".join(room or house.package for room in floor))
    print("\nroom, modules, lines, what it imports")
    for room in sorted(house.rooms, key=lambda room: (-house.rooms.out_degree(room), room)):
        own = [module for module in modules if module.room == room]
        lines = sum(len(module.source.splitlines()) for module in own)
        imported = ", ".join(name or house.package for name in sorted(house.rooms.successors(room)))
        print(f"  {room or house.package:<16} {len(own):>3} {lines:>6}  {imported}")
    for what, measure, most in (("lines", lines_of, MOST_LINES), ("parameters", parameters_of, MOST_PARAMETERS)):
        print(f"\nfunctions of more than {most} {what}")
        for name, number in house.functions(measure, most).items():
            print(f"  {number:>4}  {name}")


if __name__ == "__main__":
    show(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE)
