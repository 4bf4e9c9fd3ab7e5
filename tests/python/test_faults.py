"""What a device or an allocation that fails leaves behind. fault.c makes it fail, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import SMALL_SHAPE, write_model

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("fault") / "fault.so"
    command = [
        "cc",
        "-Wall",
        "-Wextra",
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(HERE / "fault.c"),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return library


@pytest.mark.parametrize(("policy", "generic"), [("rkv", "0"), ("latest", "0"), ("rkv", "1")])
@pytest.mark.parametrize("function", ["alloc", "compute", "late", "backend"])
def test_a_failure_leaves_each_sequence_whole_or_empty(
    shim: Path, tmp_path: Path, policy: str, generic: str, function: str
) -> None:
    model = write_model(tmp_path / "small.gguf", SMALL_SHAPE)
    command = [sys.executable, str(HERE / "fault_child.py"), str(model), policy, function]
    env = {**os.environ, "LD_PRELOAD": str(shim), "RKV_GENERIC": generic}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    struck, lost, kept = map(int, run.stdout.split())
    assert struck >= (1 if function == "backend" else 4) and kept > 0
    moved = function in ("compute", "late") or (generic == "1" and function == "alloc")  # layer by layer
    assert (lost > 0) == moved
