from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.errors import ConfigurationError
from triptych.server import installation

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def package(tmp_path):
    """The layout of nvidia-pytriton's wheel, without its weight."""
    server = tmp_path / "site-packages" / "pytriton" / "tritonserver"
    for file in (
        server / "bin" / "tritonserver",
        server / "backends" / "python" / "libtriton_python.so",
        server / "python_backend_stubs" / VERSION / "triton_python_backend_stub",
    ):
        file.parent.mkdir(parents=True)
        file.touch()
    return server.parent


@pytest.fixture
def home(tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    return tmp_path / "venv" / "tritonserver"


def test_the_stub_of_this_python_lies_beside_the_backend(package, home):
    found = installation.prepare(package, home)
    assert found.backend_directory is not None
    backend = found.backend_directory / "python"
    assert {path.name for path in backend.iterdir()} == {
        "libtriton_python.so",
        "triton_python_backend_stub",
    }
    assert VERSION in os.readlink(backend / "triton_python_backend_stub")
    assert (home / "lib").is_dir()
    assert installation.prepare(package, home) == found


def test_a_stale_link_is_replaced(package, home):
    found = installation.prepare(package, home)
    assert found.backend_directory is not None
    link = found.backend_directory / "python" / "libtriton_python.so"
    link.unlink()
    link.symlink_to("/elsewhere")
    installation.prepare(package, home)
    assert link.exists()


def test_a_python_without_a_stub_is_named_with_those_served(package, home):
    stubs = package / "tritonserver" / "python_backend_stubs"
    (stubs / VERSION).rename(stubs / "2.7")
    with pytest.raises(ConfigurationError, match=rf"Python {VERSION}.*2\.7"):
        installation.prepare(package, home)


def test_no_tritonserver_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(installation, "_pytriton", lambda: None)
    monkeypatch.setattr(installation, "CONTAINER_BINARY", Path("/nowhere"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigurationError, match="scripts/setup"):
        installation.find()


def test_the_containers_server_is_found_on_path(monkeypatch, tmp_path):
    binary = tmp_path / "tritonserver"
    binary.touch(mode=0o755)
    monkeypatch.setattr(installation, "_pytriton", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installation.find() == installation.Installation(binary)


def test_the_environments_own_launcher_runs():
    installation.find()
    launcher = Path(sys.executable).with_name("tritonserver")
    said = subprocess.run([launcher, "--help"], capture_output=True, text=True, check=False)
    assert "--model-repository" in said.stdout + said.stderr
