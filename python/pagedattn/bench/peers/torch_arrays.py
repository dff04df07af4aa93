# SPDX-License-Identifier: Apache-2.0
"""Our arrays as torch tensors, for the peers that are torch operations.

torch is imported inside the functions: nothing here needs it until a peer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np

import pagedattn
from pagedattn._device import ELEMENT, FP8_DTYPES, STORAGE, Backend

from ..cases import Case
from ..inputs import Inputs
from .base import Prepared, UnsupportedError

_TORCH_NAMES = {"float8_e4m3": "float8_e4m3fn"}


def torch_missing(backend: Backend) -> str:
    """Why torch cannot run on this backend; "" if it can.  Does not import it."""
    if find_spec("torch") is None:
        return "torch is not installed: pip install torch"
    if backend == "cuda" and torch_version().endswith("+cpu"):
        return f"{torch_version()} has no CUDA: pip install torch"
    return ""


def torch_version() -> str:
    """The installed torch, as "torch 2.13.0"."""
    return f"torch {metadata.version('torch')}"


def torch_dtype(dtype: str) -> Any:
    """The torch type of one of our type names."""
    import torch

    return getattr(torch, _TORCH_NAMES.get(dtype, dtype))


def as_tensor(array: Any, dtype: str) -> Any:
    """A tensor of `dtype` on the memory of an array; the bits travel as integers, which every DLPack knows."""
    import torch

    bits = array.view(np.dtype(f"i{array.dtype.itemsize}"))
    return torch.from_dlpack(bits).view(torch_dtype(dtype))


def empty_out(inputs: Inputs) -> tuple[Any, Any]:
    """A result [T, Hq, D] as an array of the backend's module, and the same memory as a tensor."""
    case = inputs.case
    array = inputs.device.xp.empty(inputs.q.shape, STORAGE[case.out_dtype]).view(ELEMENT[case.out_dtype])
    return array, as_tensor(array, case.out_dtype)


def valid_block_tables(inputs: Inputs) -> Any:
    """The block tables [B, max_blocks] int32 as a tensor, block 0 where ours say -1: peers index before they mask."""
    return as_tensor(inputs.device.put(np.maximum(inputs.host_block_tables, 0)), "int32")


def use_our_threads() -> None:
    """Let torch's operations take as many threads as ours."""
    import torch

    torch.set_num_threads(pagedattn.get_num_threads())


def require_unquantised(case: Case) -> None:
    """Raise UnsupportedError for an 8-bit cache."""
    if case.kv_dtype in FP8_DTYPES:
        raise UnsupportedError(f"no {case.kv_dtype} cache")


def positional(operation: Any, given: dict[str, Any]) -> list[Any]:
    """The arguments of a compiled operation in the order of its schema: those given, else its default or None.

    Builds of a library differ in arguments that came and went, and name them; by position they cost less in a call.
    """
    return [given.get(argument.name, argument.default_value) for argument in operation._schema.arguments]


def prepare_torch(inputs: Inputs, run: Callable[[], Any], out: Any) -> Prepared:
    """A call of torch operations, run once so that what it cannot do is said here and what it caches is there."""
    call = run if inputs.device.backend == "cpu" else _on_current_stream(inputs.device.xp, run)
    with refusals():
        call()
        _synchronize(inputs)
    return Prepared(call, out, uses_torch=True)


@contextmanager
def refusals() -> Iterator[None]:
    """Raise UnsupportedError for what torch or a library on it refuses: no kernel for a shape, no memory."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UnsupportedError((str(error) or type(error).__name__).splitlines()[0]) from error


def _synchronize(inputs: Inputs) -> None:
    if inputs.device.backend == "cuda":
        import torch

        torch.cuda.synchronize()  # all streams: tensors were prepared on torch's, calls come on CuPy's


def _on_current_stream(cupy: Any, run: Callable[[], Any]) -> Callable[[], None]:
    import torch

    def call() -> None:
        pointer = cupy.cuda.get_current_stream().ptr
        if torch.cuda.current_stream().cuda_stream == pointer:
            run()
        else:
            with torch.cuda.stream(torch.cuda.ExternalStream(pointer)):
                run()

    return call
