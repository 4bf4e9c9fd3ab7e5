"""rkv-local devices: what llama.cpp can compute on."""

from __future__ import annotations

import ctypes
import json
from dataclasses import asdict, dataclass

import click

from rkv_local import _lib
from rkv_local.cli import ui

TYPES = ("CPU", "GPU", "iGPU", "accelerator", "meta")  # enum ggml_backend_dev_type
UNKNOWN_TYPE = "other"


@dataclass(frozen=True)
class Device:
    """A ggml backend device; memory in bytes."""

    name: str
    description: str
    type: str
    memory_free: int
    memory_total: int


def symbol(name: str) -> ctypes._FuncPointer:
    """A function of ggml, from whichever of our libraries has it."""
    folder = _lib.prepare()
    from llama_cpp import llama_cpp as lib

    candidates = [lib._lib]
    for path in sorted(folder.glob("*ggml*")):
        if path.suffix in (".so", ".dylib", ".dll") and not path.is_symlink():
            try:
                candidates.append(ctypes.CDLL(str(path)))
            except OSError:
                continue
    for candidate in candidates:
        if hasattr(candidate, name):
            return getattr(candidate, name)
    raise RuntimeError(f"{name} is in none of the libraries in {folder}")


def list_devices() -> list[Device]:
    """All devices, in llama.cpp's order."""
    _lib.prepare()
    from llama_cpp import llama_cpp as lib

    count = symbol("ggml_backend_dev_count")
    count.restype = ctypes.c_size_t
    get = symbol("ggml_backend_dev_get")
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    lib.llama_backend_init()
    texts = {}
    for field in ("name", "description"):
        texts[field] = symbol(f"ggml_backend_dev_{field}")
        texts[field].restype, texts[field].argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    kind = symbol("ggml_backend_dev_type")
    kind.restype, kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
    memory = symbol("ggml_backend_dev_memory")
    memory.restype = None
    memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
    devices = []
    for i in range(count()):
        device = get(i)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        number = kind(device)
        devices.append(
            Device(
                name=texts["name"](device).decode("utf-8", errors="replace"),
                description=texts["description"](device).decode("utf-8", errors="replace").strip(),
                type=TYPES[number] if 0 <= number < len(TYPES) else UNKNOWN_TYPE,
                memory_free=free.value,
                memory_total=total.value,
            )
        )
    return devices


def has_gpu() -> bool:
    """True if there is a device that llama.cpp would put layers on; a backend without a device is none."""
    return any(device.type in ("GPU", "iGPU") for device in list_devices())


@click.command("devices")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
def devices(as_json: bool, verbose: bool) -> None:
    """List the devices that llama.cpp can compute on."""
    _lib.prepare()
    from rkv_local.cli import nativelog

    nativelog.install(verbose)
    found = list_devices()
    if as_json:
        click.echo(json.dumps([asdict(d) for d in found], indent=2))
        return
    rows = [
        [d.name, d.type, f"{d.memory_free / ui.MIB:,.0f}", f"{d.memory_total / ui.MIB:,.0f}", d.description]
        for d in found
    ]
    head = ["NAME", "TYPE", "FREE MiB", "TOTAL MiB", "DESCRIPTION"]
    click.echo(ui.table(head, rows, [False, False, True, True, False]))
