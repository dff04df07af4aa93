"""Arrays of other libraries come in through DLPack, without a copy and without importing their library.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import re
import subprocess
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pagedattn
import pytest
from accuracy import assert_close, assert_lse_close, assert_same_bytes
from backends import BFLOAT16, DTYPES, CupyBackend, NumpyBackend
from batches import Batch, make_batch, poison
from dlpack_producer import CUDA, DLPackArray, OldDLPackArray
from failing_calls import Arguments, attention_call, reshape_call


def disguise(batch: Batch, kind: type[DLPackArray] = DLPackArray, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return a batch's arguments as arrays that offer DLPack alone."""
    args, keywords = batch.on(NumpyBackend())
    disguised = {n: kind(a, **options) if isinstance(a, np.ndarray) else a for n, a in keywords.items()}
    return [kind(a, **options) for a in args], disguised


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        ("float32", "float32"),
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float8_e4m3"),
        ("float16", "float8_e5m2"),
    ],
)
@pytest.mark.parametrize("versioned", [False, True])
def test_attention_reads_and_writes_dlpack_arrays(
    rng: np.random.Generator, dtype: str, kv_dtype: str, versioned: bool
) -> None:
    batch = make_batch(
        rng,
        [40, 9, 0],
        [5, 9, 0],
        dtype=DTYPES[dtype],
        kv_dtype=DTYPES[kv_dtype],
        layout="interleaved HND",
        packed_q=True,
        sinks=np.ones(4, np.float32),
    )
    expected, expected_lse = batch.reference()
    args, keywords = disguise(batch, versioned=versioned)
    out, lse = poison(batch.q.shape, batch.q.dtype), poison(batch.q.shape[:2], np.float32)
    outputs = {"out": DLPackArray(out, versioned=versioned), "lse": DLPackArray(lse, versioned=versioned)}
    result = pagedattn.paged_attention(*args, **outputs, **keywords, return_lse=True)
    assert result[0] is outputs["out"]
    assert_close(out, expected, batch.q.dtype)
    assert_lse_close(lse, expected_lse)
    assert all(array.exports == 1 for array in (*args, *outputs.values()))


def test_dlpack_arrays_may_be_mixed_with_numpy_arrays(rng: np.random.Generator) -> None:
    batch = make_batch(rng, [40, 9])
    q, *rest = batch.on(NumpyBackend())[0]
    out = pagedattn.paged_attention(DLPackArray(q), *rest)
    assert isinstance(out, np.ndarray)
    assert_close(out, batch.reference()[0], np.float32)


def test_old_producers_without_strides_or_with_an_offset_are_read(rng: np.random.Generator) -> None:
    batch = make_batch(rng, [40, 9])
    args, _ = disguise(batch, OldDLPackArray, strides=False)
    assert_close(pagedattn.paged_attention(*args), batch.reference()[0], np.float32)
    args, _ = disguise(batch, byte_offset=64)
    assert_close(pagedattn.paged_attention(*args), batch.reference()[0], np.float32)


def test_a_read_only_dlpack_array_is_refused_as_output_and_taken_as_input(rng: np.random.Generator) -> None:
    batch = make_batch(rng, [40, 9])
    args, _ = disguise(batch, versioned=True, read_only=True)
    out = poison(batch.q.shape, np.float32)
    with pytest.raises(pagedattn.InvalidArgumentError, match="`out` must be writable; got a read-only array"):
        pagedattn.paged_attention(*args, out=DLPackArray(out, versioned=True, read_only=True))
    assert_same_bytes(out, poison(out.shape, np.float32))
    pagedattn.paged_attention(*args, out=out)
    assert_close(out, batch.reference()[0], np.float32)


def test_caches_are_written_through_dlpack() -> None:
    plain, call = reshape_call(), reshape_call()
    pagedattn.reshape_and_cache(**plain)
    pagedattn.reshape_and_cache(**{name: DLPackArray(array) for name, array in call.items()})
    assert_same_bytes(call["k_cache"], plain["k_cache"])
    assert_same_bytes(call["v_cache"], plain["v_cache"])


def test_arrays_of_a_list_live_until_the_call_ends_whatever_becomes_of_the_list() -> None:
    call = reshape_call()
    layers = {name: [array, array.copy()] for name, array in call.items() if name != "slot_mapping"}
    lives: list[bool] = []

    class Thief(DLPackArray):
        """Takes its neighbour out of the list, as another thread might while the call computes."""

        def __dlpack__(self, **keywords: Any) -> Any:
            layers["key"][0] = None
            lives.append(neighbour() is not None)
            return super().__dlpack__(**keywords)

    class Watched(np.ndarray):
        """An array that weak references may point to."""

    layers["key"] = [call.pop("key").copy().view(Watched), Thief(layers["key"][1])]
    neighbour = weakref.ref(layers["key"][0])
    pagedattn.reshape_and_cache(**layers, slot_mapping=call["slot_mapping"])
    assert lives == [True]
    assert neighbour() is None
    assert_same_bytes(layers["k_cache"][0], layers["k_cache"][1])


def test_gather_and_merge_take_dlpack_arrays(rng: np.random.Generator) -> None:
    batch = make_batch(rng, [40, 9], dtype=np.float16)
    args, _ = batch.on(NumpyBackend())
    disguised, _ = disguise(batch)
    for one, other in zip(pagedattn.gather_kv(*args[1:]), pagedattn.gather_kv(*disguised[1:]), strict=True):
        assert_same_bytes(other, one)
    outs, lses = np.ones((2, 3, 4, 8), np.float32), np.zeros((2, 3, 4), np.float32)
    merged, _ = pagedattn.merge_states([DLPackArray(o) for o in outs], [DLPackArray(n) for n in lses])
    assert_same_bytes(np.asarray(merged), outs[0])


def test_importing_and_calling_pagedattn_imports_no_array_library_but_numpy() -> None:
    script = (
        "import sys, numpy as np, pagedattn\n"
        "c = np.zeros((2, 4, 1, 8), np.float32)\n"
        "pagedattn.paged_attention(c[:1, 0], c, c, np.zeros((1, 1), np.int32), np.ones(1, np.int32))\n"
        "assert not {'torch', 'cupy', 'jax', 'jaxlib'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# ---- the stream on which CUDA arrays must be ready ------------------------------------------------------------------


def made_up_cuda_array(array: np.ndarray) -> DLPackArray:
    """Return an array that claims to lie on CUDA device 0, at an address that must never be touched."""
    return DLPackArray(array, device=(CUDA, 0), address=0x7F00_0000_0000)


def refused_call(**options: Any) -> Arguments:
    """Arrays on CUDA of which one is of a wrong type, so that all are read and nothing is launched."""
    call = {name: made_up_cuda_array(array) for name, array in attention_call().items()}
    return {**call, "lse": made_up_cuda_array(np.zeros((4, 4), np.int64)), **options}


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (7, 7),
        (np.int64(9), 9),
        (0, 1),  # DLPack's name of the default stream
        (SimpleNamespace(ptr=2**62 + 11), 2**62 + 11),
        (SimpleNamespace(cuda_stream=13), 13),
    ],
)
def test_producers_are_told_the_stream_that_is_given(stream: Any, handle: int) -> None:
    call = refused_call(stream=stream)
    with pytest.raises(pagedattn.PagedAttnError):
        pagedattn.paged_attention(**call)
    arrays = [array for array in call.values() if isinstance(array, DLPackArray)]
    assert [array.streams for array in arrays] == [[handle]] * len(arrays)


@pytest.mark.parametrize("stream", ["main", 1.5, 2**64, object, SimpleNamespace(ptr="5")], ids=repr)
def test_what_is_no_stream_is_refused(stream: Any) -> None:
    expected = "paged_attention: `stream` must be a CuPy or torch stream or a cudaStream_t as int; got "
    with pytest.raises(pagedattn.InvalidArgumentError, match=re.escape(expected + repr(stream))):
        pagedattn.paged_attention(**refused_call(stream=stream))


@pytest.mark.gpu
def test_producers_are_told_cupys_current_stream(cuda: CupyBackend) -> None:
    streams = cuda.cupy.cuda
    for current in (streams.Stream(non_blocking=True), streams.Stream.ptds, streams.Stream.null):
        call = refused_call()
        with current, pytest.raises(pagedattn.InvalidArgumentError):
            pagedattn.paged_attention(**call)
        assert call["q"].streams == [current.ptr or 1]


# ---- CUDA arrays where there is no CUDA ----------------------------------------------------------------------------


def cuda_is_usable() -> bool:
    return bool(pagedattn.config()["cuda"]["devices"])


class CudaArrayInterfaceOnly:
    """An array that offers only __cuda_array_interface__."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "shape": (4, 4, 8), "typestr": "<f4", "data": (0x7F00_0000_0000, False), "version": 3,
    }  # fmt: skip


@pytest.mark.skipif(cuda_is_usable(), reason="this machine serves CUDA arrays")
@pytest.mark.parametrize("operation", ["paged_attention", "reshape_and_cache"])
def test_cuda_arrays_without_cuda_raise_with_the_mend(operation: str) -> None:
    call = attention_call() if operation == "paged_attention" else reshape_call()
    built = pagedattn.config()["cuda"]["built"]
    moved = {name: made_up_cuda_array(array) for name, array in call.items()}
    error = pagedattn.DeviceError if built else pagedattn.UnsupportedError
    with pytest.raises(error) as raised:
        getattr(pagedattn, operation)(**moved)
    message = str(raised.value)
    if built:
        assert "CUDA" in message
    else:
        assert message.startswith(f"{operation}: `{'q' if operation == 'paged_attention' else 'key'}` is on cuda:0")
        assert "PAGEDATTN_CUDA=ON" in message


@pytest.mark.skipif(cuda_is_usable(), reason="this machine serves CUDA arrays")
def test_cuda_arrays_without_cuda_raise_where_results_would_be_allocated() -> None:
    moved = {n: made_up_cuda_array(a) for n, a in attention_call().items() if n not in ("out", "lse")}
    with pytest.raises((pagedattn.DeviceError, pagedattn.UnsupportedError)) as raised:
        pagedattn.paged_attention(**moved)
    assert "CUDA" in str(raised.value)


@pytest.mark.parametrize("argument", sorted(set(attention_call()) - {"q"}))
def test_an_array_on_another_device_than_q_is_refused_by_name(argument: str) -> None:
    call = attention_call()
    before = call["out"].tobytes()
    spoilt = {**call, argument: made_up_cuda_array(call[argument])}
    with pytest.raises(pagedattn.InvalidArgumentError) as raised:
        pagedattn.paged_attention(**spoilt)
    assert f"paged_attention: `{argument}` must be on cpu like the other arguments; got cuda:0" in str(raised.value)
    assert call["out"].tobytes() == before


@pytest.mark.parametrize("argument", ["k_cache", "v_cache", "value", "slot_mapping"])
def test_an_array_on_another_device_than_key_is_refused_by_name(argument: str) -> None:
    call = reshape_call()
    spoilt = {**call, argument: made_up_cuda_array(call[argument])}
    with pytest.raises(pagedattn.InvalidArgumentError, match=f"reshape_and_cache: `{argument}`.*got cuda:0"):
        pagedattn.reshape_and_cache(**spoilt)
    assert_same_bytes(call["v_cache"], reshape_call()["v_cache"])


def test_a_device_that_is_neither_host_nor_cuda_is_refused_by_its_number() -> None:
    call = attention_call()
    call["k_cache"] = DLPackArray(call["k_cache"], device=(10, 0))
    with pytest.raises(pagedattn.InvalidArgumentError, match=r"`k_cache`.*DLPack type 10"):
        pagedattn.paged_attention(**call)


@pytest.mark.parametrize("argument", ["q", "k_cache", "out"])
def test_an_array_with_cuda_array_interface_alone_is_refused_by_name(argument: str) -> None:
    call = attention_call()
    call[argument] = CudaArrayInterfaceOnly()
    with pytest.raises(pagedattn.InvalidArgumentError, match=f"paged_attention: `{argument}`.*CudaArrayInterfaceOnly"):
        pagedattn.paged_attention(**call)


@pytest.mark.gpu
def test_a_numpy_array_beside_cupy_arrays_is_refused_by_name(cuda: NumpyBackend) -> None:
    for argument in ("q", "k_cache", "block_tables", "seq_lens", "query_start_loc", "out", "lse"):
        call = attention_call()
        moved = {name: array if name == argument else cuda.array(array) for name, array in call.items()}
        # q decides where the call runs, so with q on the host the others are the strangers.
        stranger = "k_cache" if argument == "q" else argument
        with pytest.raises(pagedattn.InvalidArgumentError, match=f"paged_attention: `{stranger}` must be on "):
            pagedattn.paged_attention(**moved)


# ---- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_tensors_are_read_and_written_in_place(rng: np.random.Generator, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    batch = make_batch(rng, [40, 9, 0], [5, 9, 0], dtype=DTYPES[dtype], layout="HND")
    expected, expected_lse = batch.reference()

    def tensor(array: np.ndarray) -> Any:
        if array.dtype != BFLOAT16:
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(np.uint16).view(np.int16)).view(torch.bfloat16)

    def host(result: Any) -> np.ndarray:
        plain = result.view(torch.int16).numpy() if dtype == "bfloat16" else result.numpy()
        return np.asarray(plain.view(DTYPES[dtype]))

    args = [tensor(a) for a in batch.on(NumpyBackend())[0]]
    starts = tensor(batch.query_start_loc if batch.query_start_loc is not None else np.empty(0))
    out, lse = pagedattn.paged_attention(*args, query_start_loc=starts, return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == args[0].dtype
    assert_close(host(out), expected, DTYPES[dtype])
    assert_lse_close(lse.numpy(), expected_lse)
    given = torch.full_like(args[0], float("nan"))
    assert pagedattn.paged_attention(*args, query_start_loc=starts, out=given) is given
    assert_same_bytes(host(given), host(out))

    key = torch.ones(3, 2, 64, dtype=args[0].dtype)
    pagedattn.reshape_and_cache(key, key, args[1], args[2], torch.tensor([0, -1, 1]))
    assert (args[1][0, :2] == 1).all()


def test_torch_float8_caches_are_read_in_place(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    batch = make_batch(rng, [40, 9], dtype=np.float16, kv_dtype=DTYPES["float8_e4m3"])
    q, k, v, tables, lens = batch.on(NumpyBackend())[0]
    k, v = (torch.from_numpy(cache.view(np.uint8)).view(torch.float8_e4m3fn) for cache in (k, v))
    q, tables, lens = map(torch.from_numpy, (q, tables, lens))
    storage = pagedattn.paged_attention(
        q, k.view(torch.uint8), v.view(torch.uint8), tables, lens, kv_dtype="float8_e4m3"
    )
    assert_close(storage.numpy(), batch.reference()[0], np.float16)
    typed = pagedattn.paged_attention(q, k, v, tables, lens)
    assert_same_bytes(typed.numpy(), storage.numpy())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_arrays_are_read_in_place(rng: np.random.Generator, dtype: str) -> None:
    jax = pytest.importorskip("jax")
    batch = make_batch(rng, [40, 9, 0], [5, 9, 0], dtype=DTYPES[dtype])
    with jax.default_device(jax.devices("cpu")[0]):
        args = [jax.numpy.asarray(a) for a in batch.on(NumpyBackend())[0]]
        starts = jax.numpy.asarray(batch.query_start_loc)
    out = pagedattn.paged_attention(*args, query_start_loc=starts)
    assert_close(np.asarray(out), batch.reference()[0], DTYPES[dtype])


def test_jax_arrays_are_never_written(rng: np.random.Generator) -> None:
    jax = pytest.importorskip("jax")
    batch = make_batch(rng, [40, 9])
    with jax.default_device(jax.devices("cpu")[0]):
        args = [jax.numpy.asarray(a) for a in batch.on(NumpyBackend())[0]]
        out = jax.numpy.zeros(args[0].shape, args[0].dtype)
    with pytest.raises(pagedattn.InvalidArgumentError, match="`out` must be writable"):
        pagedattn.paged_attention(*args, out=out)
    assert not np.asarray(out).any()


def test_a_torch_tensor_that_requires_grad_is_refused_or_read_but_never_written(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    batch = make_batch(rng, [40, 9])
    args = [torch.from_numpy(a) for a in batch.on(NumpyBackend())[0]]
    out = torch.zeros_like(args[0], requires_grad=True)
    with pytest.raises((BufferError, pagedattn.InvalidArgumentError)):
        pagedattn.paged_attention(*args, out=out)


def test_torch_views_and_subclasses_are_read_with_their_strides(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    batch = make_batch(rng, [40, 9], num_q_heads=4, num_kv_heads=2)
    q, k, v, tables, lens = (torch.from_numpy(a) for a in batch.on(NumpyBackend())[0])
    expected = pagedattn.paged_attention(q, k, v, tables, lens)
    apart = torch.full((2, 8, *q.shape[2:]), float("nan"))[:, 1::2]
    apart.copy_(q)
    parameter = torch.nn.Parameter(torch.stack([k, v], 1)[:, 0], requires_grad=False)
    given = torch.zeros(2, 8, *q.shape[2:])
    pagedattn.paged_attention(apart, parameter, v, tables, lens, out=given[:, ::2])
    assert_same_bytes(given[:, ::2].numpy(), expected.numpy())
    assert not given[:, 1::2].any()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("given", [False, True], ids=["current stream", "another stream"])
def test_torch_tensors_are_ready_on_the_stream_of_the_call(rng: np.random.Generator, given: bool) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch serves no CUDA device")
    batch = make_batch(rng, [40, 9], num_q_heads=4, num_kv_heads=2, dtype=np.float16)
    args = [torch.from_numpy(a).cuda() for a in batch.on(NumpyBackend())[0]]
    q, out = torch.zeros_like(args[0]), torch.zeros_like(args[0])
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        q.copy_(args[0])
        pagedattn.paged_attention(q, *args[1:], out=out, stream=other if given else None)
        # What is enqueued behind the call, on its stream, finds its result.
        with torch.cuda.stream(other if given else torch.cuda.current_stream()):
            result = out.clone()
    torch.cuda.synchronize()
    assert_close(result.cpu().numpy(), batch.reference()[0], np.float16)
