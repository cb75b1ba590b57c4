"""The rooms of the package: arrows between them go down only, and none of their files is long."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nspo2_trl"
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
FLOORS = ["rows", "config", "retain_config", "metrics", "engine", "layout", "projections", "training", "cli"]


def imports(name: str) -> set[str]:
    """Modules of the package that module `name` imports, for types and inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("nspo2_trl")):
            base = list(Path(name).parts[: -node.level]) if node.level else []
            path = [*base, *(node.module or "").removeprefix("nspo2_trl").strip(".").split(".")]
            path = "/".join(part for part in path if part)
            whole = [f"{path}/{alias.name}".strip("/") for alias in node.names]
            found |= {path} if path in MODULES else {module for module in whole if module in MODULES}
    return found


def floor(name: str) -> int:
    return FLOORS.index(name.split("/")[0])


INSIDE = [name for name in MODULES if name != "__init__"]


@pytest.mark.parametrize("name", INSIDE)
def test_arrows_go_down(name):
    above = {module for module in imports(name) if floor(module) > floor(name)}
    assert not above, f"{name} imports {above}"


def test_no_module_imports_itself_by_way_of_others():
    reached = {name: imports(name) for name in INSIDE}
    for _ in INSIDE:
        reached = {name: found.union(*(reached[module] for module in found)) for name, found in reached.items()}
    assert not [name for name in INSIDE if name in reached[name]]


@pytest.mark.parametrize("name", [name for name in INSIDE if name.startswith("engine/")])
def test_the_engine_needs_torch_alone(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        for module in modules:
            root = module.split(".")[0]
            assert root in ("torch", "__future__") or root in __import__("sys").stdlib_module_names, module
    assert all(module in ("config", "metrics") or module.startswith("engine/") for module in imports(name))


@pytest.mark.parametrize("name", [name for name in INSIDE if name.startswith("layout/")])
def test_the_layout_knows_no_nspo2(name):
    assert all(module.startswith("layout/") or module == "engine/shards" for module in imports(name))


@pytest.mark.parametrize("room", FLOORS[4:])
def test_a_room_says_what_may_enter(room):
    assert len(ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())).split()) > 20


@pytest.mark.parametrize("name", MODULES)
def test_no_module_is_long(name):
    assert len(MODULES[name].read_text().splitlines()) <= 250
