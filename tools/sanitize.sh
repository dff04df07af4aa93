#!/usr/bin/env bash
# Runs the block manager's tests with its C++ and Cython under AddressSanitizer and UndefinedBehaviorSanitizer.
#
# SPDX-License-Identifier: Apache-2.0
#
#   PYTHON=.venv/bin/python tools/sanitize.sh [PYTEST'S ARGUMENTS]
#
# PYTHON has this checkout installed, Cython and what the tests need; g++ brings the sanitizers. A copy of the installed
# package gets the sanitized module, and the first wrong access or undefined operation ends the run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
work=$(mktemp -d "${TMPDIR:-/tmp}/pagedattn-sanitize.XXXXXX")
trap 'rm -rf "$work"' EXIT

mapfile -t facts < <("$python" - <<'PY'
import importlib.util
import sysconfig

print(sysconfig.get_path("include"), sysconfig.get_config_var("EXT_SUFFIX"), sep="\n")
print(*importlib.util.find_spec("pagedattn").submodule_search_locations, sep="\n")  # two where it is editable
PY
)
mkdir "$work/pagedattn"
for folder in "${facts[@]:2}"; do cp -r "$folder/." "$work/pagedattn"; done
# An editable install would still be found first.
cat >"$work/sitecustomize.py" <<'PY'
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
PY

"$python" -m cython -3 --cplus python/pagedattn/_block_manager.pyx -o "$work/module.cpp"
g++ -std=c++20 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all \
  -D_GLIBCXX_ASSERTIONS -fPIC -shared -fvisibility=hidden -Isrc -I"${facts[0]}" "$work/module.cpp" \
  -o "$work/pagedattn/_block_manager${facts[1]}"

LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 # Python itself leaks at its end, and asks for too much
PYTHONPATH=$work
export LD_PRELOAD ASAN_OPTIONS PYTHONPATH
[[ $("$python" -c 'import pagedattn._block_manager as module; print(module.__file__)') == "$work"/* ]]
# What a sanitizer says goes past pytest, which would die with it. How much memory the process has means nothing here.
[[ $# -gt 0 ]] || set -- tests/test_block_manager*.py tests/test_bugs_of_others.py tests/test_manager_alone.py
"$python" -m pytest -q --capture=sys -p no:cacheprovider -m "not gpu" -k "not takes_48_bytes" "$@"
