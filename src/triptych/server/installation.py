"""Which tritonserver to run, and what it needs to run our Python.

Two kinds are known. Triton's container has ``/opt/tritonserver``, complete. The wheel of
nvidia-pytriton has the server, the Python backend and one stub for each version of Python, but
not together: the backend wants the stub of our Python beside it, and the loader must find
libpython. `prepare` lays that out once, as links, in the virtual environment.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import msgspec

from triptych.errors import ConfigurationError

CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")


class Installation(msgspec.Struct, frozen=True):
    """A tritonserver that can run Python models."""

    binary: Path
    backend_directory: Path | None = None
    """None: where the binary looks by itself."""
    library_path: tuple[Path, ...] = ()
    """Directories for LD_LIBRARY_PATH."""

    def environ(self, base: dict[str, str]) -> dict[str, str]:
        """``base`` with what the server and its Python stubs need.

        The stub asks ``python3`` on PATH for its packages, so this environment's comes first.
        """
        path = [str(Path(sys.prefix) / "bin"), base.get("PATH", os.defpath)]
        libraries = [*map(str, self.library_path), base.get("LD_LIBRARY_PATH", "")]
        return {
            **base,
            "PATH": os.pathsep.join(path),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        }


def find() -> Installation:
    """The tritonserver of this environment, else the one on PATH, else the container's.

    Raises:
        ConfigurationError: There is none.
    """
    if (package := _pytriton()) is not None:
        return prepare(package, Path(sys.prefix) / "tritonserver")
    if on_path := shutil.which("tritonserver"):
        return Installation(Path(on_path))
    if CONTAINER_BINARY.is_file():
        return Installation(CONTAINER_BINARY)
    raise ConfigurationError(
        "no tritonserver: install nvidia-pytriton (scripts/setup does) or run in Triton's container"
    )


def prepare(package: Path, home: Path) -> Installation:
    """Lay out nvidia-pytriton's server for this version of Python under ``home``.

    Args:
        package: Directory of the package ``pytriton``.
        home: Where to put ``backends/`` and ``lib/``.

    Raises:
        ConfigurationError: The wheel has no stub for this Python, or Python no shared library.
    """
    server = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        served = sorted(path.name for path in stub.parents[1].iterdir())
        raise ConfigurationError(
            f"nvidia-pytriton has no stub for Python {version}; it has {', '.join(served)}"
        )
    backends, libraries = home / "backends", home / "lib"
    for source in (server / "backends" / "python").iterdir():
        _link(source, backends / "python" / source.name)
    _link(stub, backends / "python" / stub.name)
    libpython = _libpython()
    _link(libpython, libraries / libpython.name)
    binary = server / "bin" / "tritonserver"
    installation = Installation(
        binary, backends, (package.parent / "nvidia_pytriton.libs", libraries)
    )
    _write(home.parent / "bin" / "tritonserver", _launcher(installation), mode=0o755)
    return installation


def _pytriton() -> Path | None:
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _libpython() -> Path:
    """The shared libpython that the stub is linked to."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    places = [sysconfig.get_config_var("LIBDIR") or ""]
    places.append(os.path.join(places[0], sysconfig.get_config_var("MULTIARCH") or ""))
    for place in places:
        if ".so" in name and (path := Path(place, name)).is_file():
            return path
    raise ConfigurationError(
        f"this Python ({sys.base_prefix}) has no shared libpython, which Triton's Python stub "
        f"loads; on Debian and Ubuntu install libpython{sys.version_info.major}."
        f"{sys.version_info.minor}, with pyenv build with --enable-shared"
    )


def _launcher(installation: Installation) -> str:
    """A ``tritonserver`` for the shell, with what `Installation.environ` sets."""
    libraries = os.pathsep.join(map(str, installation.library_path))
    return (
        "#!/bin/sh\n"
        "# Made by triptych.server.installation: the tritonserver of nvidia-pytriton with this\n"
        "# environment's Python.\n"
        f"export PATH='{Path(sys.prefix) / 'bin'}'\"${{PATH:+:$PATH}}\"\n"
        f"export LD_LIBRARY_PATH='{libraries}'\"${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}\"\n"
        f"exec '{installation.binary}' --backend-directory='{installation.backend_directory}' "
        '"$@"\n'
    )


def _link(source: Path, link: Path) -> None:
    """Make ``link`` point to ``source``; another process may be doing the same."""
    if link.is_symlink() and os.readlink(link) == str(source):
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=link.parent.parent) as scratch:
        fresh = Path(scratch) / link.name
        fresh.symlink_to(source)
        fresh.replace(link)


def _write(path: Path, text: str, mode: int) -> None:
    """Replace a file if it says something else; a read-only environment keeps what it has."""
    with contextlib.suppress(OSError):
        if path.read_text() == text:
            return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, mode)
    os.replace(file.name, path)
