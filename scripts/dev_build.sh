#!/usr/bin/env bash
# An incremental build for work on native/ and patches/: build/dev/install/rkv_local/lib, for RKV_LOCAL_LIB.
# Arguments go to CMake: scripts/dev_build.sh -DRKV_LLAMA_CPP_SOURCE=TREE -DRKV_APPLY_PATCHES=OFF
# Needs cmake, ninja, scikit-build-core and unidiff (pip install -e '.[dev]', or a .venv from bootstrap.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
export CCACHE_BASEDIR="${CCACHE_BASEDIR:-$PWD}" CCACHE_NOHASHDIR=1
export CCACHE_SLOPPINESS=time_macros,include_file_mtime,include_file_ctime,locale
cmake -G Ninja -S . -B build/dev -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v python3)" "$@"
cmake --build build/dev --target rkv rkv-tests
cmake --install build/dev --prefix build/dev/install > /dev/null
echo "export RKV_LOCAL_LIB=$PWD/build/dev/install/rkv_local/lib"
