# SPDX-License-Identifier: Apache-2.0
"""What was built, what this machine has, what runs on it, and where the C++ package lies."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, TextIO

from pagedattn import _core
from pagedattn._errors import PagedAttnError


def _devices() -> tuple[list[dict[str, Any]], str]:
    """The CUDA devices, and why there are none."""
    try:
        return [_core.device_info(i) for i in range(_core.device_count())], ""
    except PagedAttnError as error:
        return [], str(error).removeprefix("device_count: ")


def config() -> dict[str, Any]:
    """Facts of the build and of this machine, as plain data.

    Returns
    -------
    dict
        ``version``, ``python``, ``platform``, ``compiler``; ``backends``; ``cpu`` with the instruction sets compiled
        in, the one chosen and the number of threads; ``cuda`` with whether it was built, for which architectures, and
        the devices found or the reason why there are none; ``kernels``, a list of (operation, case, kernel).

    Examples
    --------
    >>> import pagedattn
    >>> "cpu" in pagedattn.config()["backends"]
    True
    """
    build = _core.build_info()
    devices, reason = _devices()
    version = build["cuda_version"]
    return {
        "version": build["version"],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiler": build["compiler"],
        "backends": ["cpu", "cuda"] if build["cuda_built"] else ["cpu"],
        "cpu": {
            "isas": build["cpu_isas"].split(";"),
            "isa": build["cpu_isa"],
            "threads": _core.get_num_threads(),
            "cpus": os.cpu_count(),
        },
        "cuda": {
            "built": build["cuda_built"],
            "compiler": f"{version // 1000}.{version % 1000 // 10}" if build["cuda_built"] else None,
            "architectures": [arch for arch in build["cuda_archs"].split(";") if arch],
            "devices": devices,
            "no_device_because": reason or None,
        },
        "kernels": [tuple(line.split("\t")) for line in build["kernel_table"].splitlines() if line],
    }


def show_config(file: TextIO | None = None, *, as_json: bool = False) -> None:
    """Print :func:`config` for a reader.

    Parameters
    ----------
    file : file object, optional
        Where to; standard output by default.
    as_json : bool
        Print it as JSON.
    """
    as_json = _core.flag("show_config", "as_json", as_json)
    out = sys.stdout if file is None else file
    facts = config()
    if as_json:
        print(json.dumps(facts, indent=2), file=out)
        return
    cpu, cuda = facts["cpu"], facts["cuda"]
    print(f"pagedattn {facts['version']}, Python {facts['python']}, {facts['platform']}", file=out)
    print(f"  compiler   {facts['compiler']}", file=out)
    print(f"  backends   {', '.join(facts['backends'])}", file=out)
    print(f"  cpu        {cpu['isa']} (of {', '.join(cpu['isas'])}), {cpu['threads']} threads", file=out)
    if cuda["built"]:
        print(f"  cuda       {cuda['compiler']}, for {', '.join(cuda['architectures'])}", file=out)
    for i, device in enumerate(cuda["devices"]):
        capability = device["compute_capability"]
        print(
            f"  device {i}   {device['name']}, compute capability {capability // 10}.{capability % 10}, "
            f"{device['num_multiprocessors']} multiprocessors, {device['total_memory'] / 2**30:.0f} GiB, "
            f"driver {device['driver_version'] // 1000}.{device['driver_version'] % 1000 // 10}",
            file=out,
        )
    if not cuda["devices"]:
        print(f"  device     none: {cuda['no_device_because']}", file=out)
    print("  kernels", file=out)
    for operation, case, kernel in facts["kernels"]:
        print(f"    {operation:<18} {case:<46} {kernel}", file=out)


def last_kernel() -> str:
    """Name of the kernel that the calling thread's last successful operation ran; "" before the first.

    Examples
    --------
    >>> import numpy as np, pagedattn
    >>> pagedattn.copy_blocks(np.zeros((4, 16, 2, 8), np.float32), np.array([[0, 1]]))
    >>> pagedattn.last_kernel()
    'cpu_copy_blocks'
    """
    return _core.last_kernel()


def get_num_threads() -> int:
    """Threads of the CPU backend.

    Until :func:`set_num_threads` is called: the environment variable ``PAGEDATTN_NUM_THREADS``, else
    ``OMP_NUM_THREADS``, else the CPUs that the process may run on.

    Raises
    ------
    InvalidArgumentError
        ``PAGEDATTN_NUM_THREADS`` is no number of threads.
    """
    return _core.get_num_threads()


def set_num_threads(num_threads: int) -> None:
    """Set the threads of the CPU backend, for the whole process, from the next call on.

    Parameters
    ----------
    num_threads : int
        1 to 4096, the calling thread included.

    Raises
    ------
    InvalidArgumentError
        The number is none of these.

    Examples
    --------
    >>> import pagedattn
    >>> before = pagedattn.get_num_threads()
    >>> pagedattn.set_num_threads(2)
    >>> pagedattn.get_num_threads()
    2
    >>> pagedattn.set_num_threads(before)
    """
    _core.set_num_threads(num_threads)


def _package_dir() -> Path:
    # Beside the compiled modules: in an editable install they lie elsewhere than this file.
    return Path(_core.__file__).parent


def get_include() -> str:
    """Directory of the C and C++ headers, for ``-I``."""
    return str(_package_dir() / "include")


def get_library_dir() -> str:
    """Directory of ``libpagedattn.so``, for ``-L``."""
    return str(_package_dir() / "lib")


def get_cmake_dir() -> str:
    """Directory to give to CMake as ``pagedattn_DIR`` for ``find_package(pagedattn)``."""
    return str(_package_dir() / "lib" / "cmake" / "pagedattn")
