"""Greedy tokens of a model whose layers lie on RPC servers. A process of its own: a device stays registered.

python rpc_client.py MODEL POLICY TEXT N ENDPOINT...    prints JSON
python rpc_client.py serve ENDPOINT                     is a server of this machine's CPU
"""

from __future__ import annotations

import ctypes
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import reference as ref
from engine_tools import Context, Model, Options
from rkv_local import _lib

_lib.prepare()
import llama_cpp  # noqa: E402  (prepare() says which library it loads)
from llama_cpp import _logger  # noqa: E402

_libraries = Path(llama_cpp.llama_cpp._lib._name).parent
_rpc_library = next(iter(sorted(_libraries.glob("*ggml-rpc.*"))), None)


def has_rpc() -> bool:
    """The libraries were built with -DGGML_RPC=ON."""
    return _rpc_library is not None


@contextmanager
def logged() -> Iterator[list[str]]:
    """What llama.cpp logs meanwhile."""
    lines: list[str] = []
    callback = llama_cpp.llama_log_callback(
        lambda _level, text, _data: lines.append(text.decode(errors="replace"))
    )
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def greedy(context: Context, prompt: list[int], n: int) -> list[int]:
    logits = context.feed(prompt, last_only=True)[-1]
    out: list[int] = []
    for _ in range(n):
        out.append(int(logits.argmax()))
        logits = context.feed(out[-1:])[-1]
    return out


def budget_options(policy: str, n_threads: int) -> Options:
    """A budget of 256 that is reached again and again."""
    return Options(
        ref.Spec(policy, budget=256), 64, 64, n_ctx=2048, n_threads=n_threads, type_k="f16", type_v="f16"
    )


def serve(endpoint: str) -> None:
    """Never returns."""
    rpc, base = ctypes.CDLL(str(_rpc_library)), _base()
    base.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    cpu = base.ggml_backend_dev_by_type(0)
    rpc.ggml_backend_rpc_start_server(
        endpoint.encode(), None, ctypes.c_size_t(1), ctypes.c_size_t(1), (ctypes.c_void_p * 1)(cpu)
    )


def _base() -> ctypes.CDLL:
    return ctypes.CDLL(str(next(iter(sorted(_libraries.glob("*ggml.*"))))))


def register(endpoints: list[str]) -> list[int]:
    """The servers become devices of this process, GPUs as far as llama.cpp is concerned."""
    rpc, base = ctypes.CDLL(str(_rpc_library)), _base()
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    base.ggml_backend_reg_dev_get.restype = ctypes.c_void_p
    devices = []
    for endpoint in endpoints:
        reg = rpc.ggml_backend_rpc_add_server(endpoint.encode())
        if not reg:
            raise RuntimeError(f"no server at {endpoint}")
        base.ggml_backend_register(ctypes.c_void_p(reg))
        devices.append(base.ggml_backend_reg_dev_get(ctypes.c_void_p(reg), ctypes.c_size_t(0)))
    return devices


@contextmanager
def started(n: int) -> Iterator[list[str]]:
    """Endpoints of server processes on loopback."""
    endpoints, processes = [], []
    for _ in range(n):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoints.append(f"127.0.0.1:{free.getsockname()[1]}")
        processes.append(
            subprocess.Popen([sys.executable, __file__, "serve", endpoints[-1]], stdout=subprocess.DEVNULL)
        )
    try:
        for endpoint, process in zip(endpoints, processes, strict=True):
            host, port = endpoint.split(":")
            for _ in range(100):
                assert process.poll() is None, "the server did not start"
                with socket.socket() as probe:
                    if probe.connect_ex((host, int(port))) == 0:
                        break
                time.sleep(0.1)
        yield endpoints
    finally:
        for process in processes:
            process.kill()
            process.wait()


class RemoteModel(Model):
    """All layers on RPC servers, shared out evenly."""

    def __init__(self, path: Path, endpoints: list[str]) -> None:
        devices = register(endpoints)
        self._devices = (ctypes.c_void_p * (len(devices) + 1))(*devices, None)
        super().__init__(path)

    def adjust(self, mparams: llama_cpp.llama_model_params) -> None:
        mparams.n_gpu_layers = 99
        mparams.devices = ctypes.addressof(self._devices)


def main() -> None:
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    path, policy, text, n = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    with logged() as lines:
        model = RemoteModel(path, sys.argv[5:])
        with Context(model, budget_options(policy, 1)) as context:
            tokens = greedy(context, model.tokenize(text), n)
            stats = context.stats
            positions = [context.all_positions(il).tolist() for il in range(model.n_layer)]
    report = {"tokens": tokens, "compactions": stats.compactions, "ms": stats.t_compaction_us / 1e3}
    print(json.dumps({**report, "positions": positions, "log": "".join(lines)}))


if __name__ == "__main__":
    main()
