#!/usr/bin/env bash
# Runs tests with the C++ code under sanitizers; the first wrong access, undefined operation or race ends the run.
#
# SPDX-License-Identifier: Apache-2.0
#
#   PYTHON=.venv/bin/python tools/sanitize.sh [manager|cpu [PYTEST'S ARGUMENTS] | threads]
#
# manager  the block manager's C++ and Cython under AddressSanitizer and UndefinedBehaviorSanitizer, by its tests
# cpu      the library with the CPU backend under the same, by the tests of its operations; instruction sets that this
#          processor lacks are emulated, and attention is tested on the wider two of them too
# threads  the library under ThreadSanitizer, by a program whose threads call it at once (tests/concurrent_calls.cpp)
#
# Without an argument all three. PYTHON has this checkout installed, Cython, CMake, Ninja and what the tests need; g++
# brings the sanitizers. A copy of the installed package gets the sanitized module or library.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ $# -eq 0 ]]; then
  for part in manager cpu threads; do "tools/sanitize.sh" "$part"; done
  exit
fi
part=$1
shift
python=${PYTHON:-python3}
work=$(mktemp -d "${TMPDIR:-/tmp}/pagedattn-sanitize.XXXXXX")
trap 'rm -rf "$work"' EXIT
readonly memory=address,undefined

emulated=OFF
grep -qw amx_bf16 /proc/cpuinfo || ! grep -qw avx2 /proc/cpuinfo || emulated=ON

# build_library SANITIZERS: without CUDA, into $work/build. Emulated vectors of AVX-512 are tested as part of AMX alone.
build_library() {
  local flags="-O1 -g -fno-omit-frame-pointer -fsanitize=$1 -fno-sanitize-recover=all" isas=()
  if [[ $emulated == ON ]]; then
    isas=(-DPAGEDATTN_COMPILER_HAS_avx512=OFF)
    if [[ $part == cpu ]]; then
      isas+=(-DPAGEDATTN_EMULATE_ISAS=ON)
    else
      isas+=(-DPAGEDATTN_COMPILER_HAS_avx512_bf16=OFF -DPAGEDATTN_COMPILER_HAS_amx=OFF)
    fi
  fi
  PATH=$(dirname "$(command -v "$python")"):$PATH
  cmake -S . -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DPAGEDATTN_CUDA=OFF "-DCMAKE_CXX_FLAGS=$flags" \
    "${isas[@]}" >/dev/null
  cmake --build "$work/build" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-2}" >/dev/null
}

if [[ $part == threads ]]; then
  build_library thread
  g++ -std=c++17 -O1 -g -fsanitize=thread -Iinclude tests/concurrent_calls.cpp -o "$work/concurrent_calls" \
    -L"$work/build" -Wl,-rpath,"$work/build" -lpagedattn
  TSAN_OPTIONS=halt_on_error=1 "$work/concurrent_calls"
  exit
fi

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

case $part in
  manager)
    "$python" -m cython -3 --cplus python/pagedattn/_block_manager.pyx -o "$work/module.cpp"
    g++ -std=c++20 -O1 -g -fno-omit-frame-pointer -fsanitize=$memory -fno-sanitize-recover=all \
      -D_GLIBCXX_ASSERTIONS -fPIC -shared -fvisibility=hidden -Isrc -I"${facts[0]}" "$work/module.cpp" \
      -o "$work/pagedattn/_block_manager${facts[1]}"
    tests=(tests/test_block_manager*.py tests/test_bugs_of_others.py tests/test_manager_alone.py)
    ;;
  cpu)
    build_library $memory
    cp "$work/build/libpagedattn.so" "$work/pagedattn/lib/"
    tests=(tests/test_paged_attention.py tests/test_{determinism,threads,copy_blocks,swap_blocks,gather_kv}.py
      tests/test_{merge_states,reshape_and_cache,rope_and_cache,errors_attention,errors_cache_operations}.py)
    ;;
  *)
    echo "tools/sanitize.sh: manager, cpu or threads; got $part" >&2
    exit 2
    ;;
esac

LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 # Python itself leaks at its end, and asks for too much
PYTHONPATH=$work
export LD_PRELOAD ASAN_OPTIONS PYTHONPATH
# What is tested is the sanitized copy.
[[ $("$python" -c 'import pagedattn._block_manager as module; print(module.__file__)') == "$work"/* ]]
[[ $part != cpu ]] || nm -D "$("$python" -c 'import pagedattn; print(pagedattn.get_library_dir())')/libpagedattn.so" |
  grep -c __asan_report >/dev/null # all of it: a pipe that closes early would be an error of nm's
# What a sanitizer says goes past pytest, which would die with it. How much memory the process has means nothing here, and
# a fork beside threads that compute or allocate copies whatever locks AddressSanitizer's allocator holds just then: its
# child waits for ever in the first operator new.
readonly left_out="takes_48_bytes or (forked_child and another) or child_forked_in_the_middle"
run_tests() { "$python" -m pytest -q --capture=sys -p no:cacheprovider -m "not gpu" -k "not ($left_out)" "$@"; }
if [[ $part == cpu && $emulated == ON ]]; then
  PAGEDATTN_CPU_ISA=avx2 run_tests "${@:-${tests[@]}}"
  [[ $# -gt 0 ]] || tests=(tests/test_{paged_attention,determinism,gather_kv,merge_states,reshape_and_cache}.py)
  PAGEDATTN_CPU_ISA=avx512_bf16 run_tests "${@:-${tests[@]}}"
  PAGEDATTN_CPU_ISA=amx run_tests "${@:-${tests[@]}}"
else
  run_tests "${@:-${tests[@]}}"
fi
