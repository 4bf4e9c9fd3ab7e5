"""What llama.cpp can compute on, and how much memory is free there and in main memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import _lib

TYPES = ("CPU", "GPU", "iGPU", "accelerator", "meta")  # enum ggml_backend_dev_type
UNKNOWN_TYPE = "other"
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@dataclass(frozen=True)
class Device:
    """A ggml backend device; memory in bytes."""

    name: str
    description: str
    type: str
    memory_free: int
    memory_total: int

    @property
    def is_gpu(self) -> bool:
        """Whether llama.cpp puts layers on it. A backend without memory to give is none."""
        return self.type in ("GPU", "iGPU")


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
    return any(device.is_gpu for device in list_devices())


def main_memory() -> tuple[int, int]:
    """(available, total) bytes of main memory for this process: the machine's, or its container's if less.

    Available as Linux counts it: free, or given up at once (caches). Elsewhere what ggml says of the CPU.
    """
    info = _meminfo()
    if info is None:
        cpu = next((d for d in list_devices() if d.type == "CPU"), None)
        return (cpu.memory_free, cpu.memory_total) if cpu else (0, 0)
    available, total = info
    for limit, used in _cgroup_limits():
        available, total = min(available, max(0, limit - used)), min(total, limit)
    return available, total


def _meminfo() -> tuple[int, int] | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
        return kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """(limit, used) of the control groups that limit this process; file caches do not count as used."""
    found = []
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),  # version 2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            stat = (root / used).with_name("memory.stat").read_text().splitlines()
            reclaimable = next((int(s.split()[1]) for s in stat if s.split()[0] == cache), 0)
            found.append((int((root / limit).read_text()), int((root / used).read_text()) - reclaimable))
        except (OSError, ValueError, IndexError):  # no such group, or "max"
            continue
    return found


def resident() -> int:
    """Resident bytes of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def peak_resident() -> int | None:
    """The most resident bytes that this process ever had; None where the system does not say."""
    try:  # not getrusage here: its figure may be the parent's, from before exec
        status = Path("/proc/self/status").read_text()
        return next(int(s.split()[1]) * 1024 for s in status.splitlines() if s.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_large_blocks() -> None:
    """Have glibc give blocks of 128 KiB or more back to the system when they are freed.

    That is its default only until the first is freed: the limit then grows, to 32 MiB, and buffers that were
    used while weights were read, or for a smaller batch, stay resident beside those that come after them.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)


def driver_used(pid: int) -> int | None:
    """Bytes of NVIDIA device memory that the driver says a process holds, its own overhead among them.

    None where it does not say: no such driver, or a container that hides process numbers.
    """
    rows = nvidia_smi("--query-compute-apps=pid,used_memory")
    mine = [int(mib) << 20 for number, mib in rows if number == str(pid) and mib.isdigit()]
    return sum(mine) if mine else None


def device_used() -> int | None:
    """Bytes of NVIDIA device memory in use by all processes; None without such a driver."""
    rows = nvidia_smi("--query-gpu=memory.used")
    used = [int(row[0]) << 20 for row in rows if row[0].isdigit()]
    return sum(used) if used else None


def nvidia_smi(query: str) -> list[list[str]]:
    """Rows of nvidia-smi's answer; none where it is absent or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
