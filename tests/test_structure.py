"""The house is as docs/how-it-works.md draws it: rooms in reading order, arrows that run one way, no circle."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dist_optim"
AT_THE_ROOT = {"__init__", "errors", "files", "generators", "overrides", "run", "cli"}
Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, known: set[str]) -> set[str]:
    """Modules of ours that a file names in its import statements, wherever they stand: TYPE_CHECKING hides none."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or ({node.module} & known)
    return found


def import_graph() -> Graph:
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    return {name: imports_of(path.read_text(), set(files)) - {name} for name, path in files.items()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def rooms_in_order(page: str) -> list[str]:
    table = page.partition("| room |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


def arrows_back_up(graph: Graph, order: list[str]) -> list[str]:
    """Imports of a room that stands below the one that imports it; the package itself stands above its doors only."""
    place = {**{room: at for at, room in enumerate(order)}, "": order.index("run") - 0.5}
    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if room_of(other) != room_of(module) and place[room_of(other)] > place[room_of(module)]
    ]


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules of which each reaches itself through the others."""
    reach = {module: reachable(graph, module) for module in graph}
    groups = {frozenset(other for other in reach[m] if m in reach[other]) for m in reach if m in reach[m]}
    return sorted(sorted(group) for group in groups)


def reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for other in graph[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def test_every_room_is_on_the_page_and_nothing_else() -> None:
    order = rooms_in_order((ROOT / "docs" / "how-it-works.md").read_text())
    rooms = {room_of(module) for module in import_graph()} - {""}
    assert set(order) == rooms and len(order) == len(rooms)


def test_only_a_handful_of_files_stands_at_the_root() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_ROOT


def test_imports_run_up_the_list() -> None:
    order = rooms_in_order((ROOT / "docs" / "how-it-works.md").read_text())
    assert arrows_back_up(import_graph(), order) == []


def test_no_two_files_import_each_other() -> None:
    assert circles(import_graph()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from dist_optim.stepping.optimizer import DistributedOptimizer",
        "if TYPE_CHECKING:\n    from dist_optim.stepping.optimizer import DistributedOptimizer",
        "def late():\n    from dist_optim.stepping import optimizer",
    ],
)
def test_an_arrow_back_up_and_a_circle_are_seen(source: str) -> None:
    graph = import_graph()
    order = rooms_in_order((ROOT / "docs" / "how-it-works.md").read_text())
    graph["dist_optim.exchange.plan"] |= imports_of(source, set(graph))
    assert "dist_optim.exchange.plan imports dist_optim.stepping.optimizer" in arrows_back_up(graph, order)
    assert any("dist_optim.exchange.plan" in circle for circle in circles(graph))


def scripts_graph() -> tuple[Graph, dict[str, str]]:
    """Of what stands beside the package: who imports whom, and the folder of each."""
    files = {
        ".".join(path.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__"): path
        for folder in ("launch", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    }
    folders = {name: path.relative_to(ROOT).parts[0] for name, path in files.items()}
    return {name: imports_of(path.read_text(), set(files)) - {name} for name, path in files.items()}, folders


def out_of_reach(script: str) -> set[str]:
    """What a script imports, or what it imports does, from other folders than its own: Python does not look there."""
    graph, folders = scripts_graph()
    folder, _, name = script.removesuffix(".py").partition("/")
    return {other for other in reachable(graph, name) if folders[other] != folder}


def test_what_make_runs_finds_all_that_it_imports() -> None:
    scripts = re.findall(
        r"^\t@.*\bpython ((?:tests|benchmarks)/\w+\.py)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert len(scripts) > 15
    assert {script: found for script in scripts if (found := out_of_reach(script))} == {}


def test_a_script_that_needs_another_folder_is_seen() -> None:
    assert "train" in out_of_reach("tests/train_runs.py")
