"""Finds our libllama and makes llama-cpp-python load it instead of one of its own."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_PREPARED: dict[str, Path] = {}


def read_pin() -> dict[str, str]:
    """KEY=VALUE lines of llama-cpp.pin: what this package was made for."""
    lines = (_PACKAGE / "llama-cpp.pin").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _library_name() -> str:
    return {"darwin": "libllama.dylib", "win32": "llama.dll"}.get(sys.platform, "libllama.so")


def lib_dir() -> Path:
    """The folder with our libraries.

    RKV_LOCAL_LIB, for developers, comes first. Where this package is imported from a source tree, the
    libraries are those of the installed one.
    """
    override = os.environ.get("RKV_LOCAL_LIB")
    if override:
        return Path(override)
    bundled = _PACKAGE / "lib"
    if (bundled / _library_name()).is_file():
        return bundled
    try:
        installed = importlib.metadata.distribution("rkv-local").locate_file("rkv_local/lib")
    except importlib.metadata.PackageNotFoundError:
        return bundled
    return Path(str(installed))


def _loaded_elsewhere(folder: Path) -> str | None:
    """The library that an already imported llama_cpp uses, if it is not ours."""
    module = sys.modules.get("llama_cpp.llama_cpp")
    loaded = getattr(getattr(module, "_lib", None), "_name", None)
    if loaded is None or Path(loaded).resolve().parent == folder.resolve():
        return None
    return str(loaded)


def _llama_cpp_version() -> str | None:
    """Version of the llama-cpp-python that is, or will be, imported; None if it is not installed."""
    module = sys.modules.get("llama_cpp")
    if module is not None and hasattr(module, "__version__"):
        return str(module.__version__)
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return None


def _build_info(library: Path) -> str:
    """What rkv_build_info() of the library says. Raises ImportError if it cannot be loaded or is not ours."""
    if sys.platform == "win32":
        os.add_dll_directory(str(library.parent))
    try:
        handle = ctypes.CDLL(str(library))
    except OSError as error:
        raise ImportError(
            f"{library} cannot be loaded ({error}): build rkv-local again, pip install ."
        ) from error
    try:
        function = handle.rkv_build_info
    except AttributeError:
        raise ImportError(
            f"{library} is a stock llama.cpp: unset RKV_LOCAL_LIB, or build again, pip install ."
        ) from None
    function.restype = ctypes.c_char_p
    function.argtypes = []
    return str(function().decode("utf-8"))


def prepare() -> Path:
    """Make `import llama_cpp` load our libraries; the folder that they are in. Cheap when called again.

    Raises ImportError, in one line that says what to do, if llama_cpp was imported before with another
    library, if our library is missing, or if library, Python package and pin do not belong together.
    """
    folder = lib_dir()
    if _PREPARED.get("folder") == folder:
        return folder
    pin = read_pin()
    version, commit = pin["LLAMA_CPP_PYTHON_VERSION"], pin["LLAMA_CPP_COMMIT"]
    library = folder / _library_name()
    if not library.is_file():
        raise ImportError(f"{library} is missing: build it with `pip install .` or `python3 bootstrap.py`")
    found = _llama_cpp_version()
    if found is None:
        raise ImportError(
            "llama-cpp-python is not installed: "
            f'CMAKE_ARGS="-DLLAMA_BUILD=OFF" pip install llama-cpp-python=={version}'
        )
    if found != version:
        raise ImportError(
            f"llama-cpp-python {found} is installed, but this rkv-local needs {version}: "
            f'CMAKE_ARGS="-DLLAMA_BUILD=OFF" pip install llama-cpp-python=={version}'
        )
    elsewhere = _loaded_elsewhere(folder)
    if elsewhere:
        raise ImportError(
            f"llama_cpp was imported before rkv_local and uses {elsewhere}: import rkv_local first"
        )
    info, wanted = _build_info(library), f"llama-cpp-python {version}, llama.cpp {commit}"
    if info != wanted:
        raise ImportError(f"{library} was built for {info}, not for {wanted}: build it again, pip install .")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    _PREPARED["folder"] = folder
    return folder
