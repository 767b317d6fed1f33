"""Which room may import which, read from the source."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "triptych"
BASE = {"contract", "settings", "errors", "logs", "processes", "pulse", "restarts"}
MIDDLE = {"chat", "media", "families", "encode", "remote", "handover", "engines"}
ALLOWED = {
    **{room: {room, *BASE} for room in MIDDLE},
    "encode": {"encode", "families", *BASE},
    "engines": {"engines", "families", *BASE},
    "stages": {"stages", *MIDDLE, *BASE},
    "server": {"server", *BASE},
    "gateway": {"gateway", "chat", *BASE},
    "matrix": {"matrix", "chat", "families", "engines", *BASE},
    "cli": {"cli", "server", "gateway", "matrix", "media", *BASE},
    **{room: BASE for room in BASE},
    "__init__": set(),
}
ENGINE_PACKAGES = {"vllm": "vllm", "sglang": "sglang", "tensorrt_llm": "trtllm"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_imports_go_one_way(path):
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("triptych.")}
    known = {other for other in rooms if other in ALLOWED}
    assert known <= ALLOWED[room(path)]


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_tritons_python_backend_is_imported_by_stages_alone(path):
    if "triton_python_backend_utils" in imports(path):
        assert room(path) == "stages"


@pytest.mark.parametrize("path", SOURCES, ids=ids)
def test_an_engines_package_is_imported_in_its_own_file(path):
    for package, stem in ENGINE_PACKAGES.items():
        if any(name.split(".")[0] == package for name in imports(path)):
            assert room(path) in {"engines", "handover"}
            assert path.stem.startswith(stem)


@pytest.mark.parametrize("path", sorted((ROOT / "client").rglob("*.py")), ids=ids)
def test_the_client_is_light(path):
    roots = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    light = {"grpc", "google", "httpx", "msgspec", "numpy", "PIL", "pybase64", "tritonclient"}
    assert roots - {"triptych_client"} <= light


@pytest.mark.parametrize("path", sorted((ROOT / "model_repository").glob("*/1/model.py")), ids=ids)
def test_model_py_only_wires(path):
    *imported, model = [
        node
        for node in ast.parse(path.read_text()).body
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    assert all(isinstance(node, ast.ImportFrom) for node in imported)
    assert all(node.module.split(".")[0] in {"triptych", "__future__"} for node in imported)
    if isinstance(model, ast.ClassDef):
        assert model.name == "TritonPythonModel"
        assert all(isinstance(node, ast.Assign | ast.Expr | ast.Pass) for node in model.body)
    else:
        assert isinstance(model, ast.ImportFrom | ast.Assign)
