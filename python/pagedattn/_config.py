# SPDX-License-Identifier: Apache-2.0
"""What was built, what this machine has, and where the C++ package lies."""

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
