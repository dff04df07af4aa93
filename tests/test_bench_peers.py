# SPDX-License-Identifier: Apache-2.0
"""The peers of ``pagedattn bench --against``: named when missing, right when there, and honest about what they lack."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pagedattn._device import Backend, Device
from pagedattn.bench import accuracy
from pagedattn.bench.cases import Case, CaseError, decode, prefill
from pagedattn.bench.inputs import Inputs
from pagedattn.bench.peers import PEERS, Peer, Prepared, UnsupportedError, fa3, find_peers, torch_arrays, vllm_cpu
from pagedattn.bench.peers.base import window_left

PACKAGES = ("torch", "vllm", "flashinfer", "flash_attn_3", "llama_cpp")
NAMES = ["contiguous", "plain", "gathered", "fa3", "flashinfer", "flashinfer-tc", "vllm-cpu", "llama.cpp"]
DTYPES = ("float32", "float16", "bfloat16")


def error_of(peer: Peer, case: Case) -> float:
    """The relative error of a peer on a case; raises if it is above the tolerance."""
    inputs = Inputs(case, Device("cpu"))
    prepared = peer.prepare(inputs)
    assert isinstance(prepared.out, np.ndarray)
    return accuracy.check(inputs, prepared.call, prepared.out, accuracy.reference_rows(inputs))


def small_decode(**fields: int | str) -> Case:
    return decode("decode", "3x77", heads=8, kv_heads=2, head_dim=64, **fields)


def small_prefill(q_lengths: str = "2x77", lengths: str = "2x77", **fields: int | str) -> Case:
    return prefill("prefill", q_lengths, lengths, heads=8, kv_heads=2, head_dim=64, **fields)


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Peer:
    """The peer of that name, where it can run on the CPU."""
    found = PEERS[request.param]
    if reason := found.missing("cpu"):
        pytest.skip(reason)
    return found


class Fake(Peer):
    """Our own kernel as if it were someone else's, with its result scaled."""

    name = "fake"
    title = "Fake"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def missing(self, backend: Backend) -> str:
        return "" if backend == "cpu" else "runs on the CPU only"

    def version(self) -> str:
        return "fake 1.0"

    def prepare(self, inputs: Inputs) -> Prepared:
        attend = inputs.attend()

        def call() -> None:
            attend()
            inputs.out[...] *= self.scale

        return Prepared(call, inputs.out)


def test_every_peer_is_known_by_its_name_in_the_order_of_the_tables() -> None:
    assert list(PEERS) == NAMES
    assert [peer.name for peer in find_peers(["all"])] == NAMES
    assert [peer.name for peer in find_peers(["fa3", "contiguous", "fa3"])] == ["fa3", "contiguous"]


def test_an_unknown_peer_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(CaseError, match=r"--against must be all or one of contiguous, .*llama\.cpp; got xformers"):
        find_peers(["contiguous", "xformers"])


def test_asking_what_is_missing_imports_no_peer() -> None:
    program = (
        "import sys\n"
        "from pagedattn.bench.peers import PEERS\n"
        "for peer in PEERS.values():\n"
        "    peer.missing('cpu'), peer.missing('cuda')\n"
        f"print(sorted(set({PACKAGES}) & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_without_its_packages_every_peer_is_missing_with_a_reason(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    reasons = {name: peer.missing(backend) for name, peer in PEERS.items()}
    assert all(reasons.values())
    assert reasons["contiguous"] == "torch is not installed: pip install torch"
    assert reasons["llama.cpp" if backend == "cuda" else "fa3"].endswith("only")
    if backend == "cpu":
        assert reasons["llama.cpp"] == "llama-cpp-python is not installed: pip install llama-cpp-python"


def test_a_peer_is_checked_like_our_own_kernel() -> None:
    assert error_of(Fake(), small_decode(dtype="float32", kv_dtype="float32")) < 1e-5
    with pytest.raises(accuracy.WrongResultError, match=r"relative error 0\.01"):
        error_of(Fake(scale=1.01), small_decode(dtype="float32", kv_dtype="float32"))


def test_fa3_names_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fa3, "torch_missing", lambda backend: "")
    monkeypatch.setenv("FA3_SO", str(tmp_path / "fa3.so"))
    assert PEERS["fa3"].missing("cuda") == f"FA3_SO names no file: {tmp_path / 'fa3.so'}"
    assert PEERS["fa3"].missing("cpu") == "runs on CUDA only"


def test_arguments_follow_the_schema_that_a_library_registers() -> None:
    names = ["q", "k_new", "num_splits", "later_addition"]
    defaults = [None, None, 1, 7]
    arguments = [SimpleNamespace(name=n, default_value=d) for n, d in zip(names, defaults, strict=True)]
    operation = SimpleNamespace(_schema=SimpleNamespace(arguments=arguments))
    given = {"q": "tensor", "num_splits": 0, "no_longer_there": 16}
    assert torch_arrays.positional(operation, given) == ["tensor", None, 0, 7]


@pytest.mark.parametrize(
    ("flags", "library"),
    [
        ({"avx2", "fma", "f16c"}, "_C_AVX2.abi3.so"),
        ({"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}, "_C_AVX512.abi3.so"),
        ({"sse2"}, None),
    ],
)
def test_vllm_loads_no_library_that_the_processor_cannot_run(
    flags: set[str], library: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("_C.abi3.so", "_C_AVX512.abi3.so", "_C_AVX2.abi3.so"):
        (tmp_path / name).touch()
    spec = ModuleSpec("vllm", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(vllm_cpu, "find_spec", lambda name: spec)
    monkeypatch.setattr(vllm_cpu, "_processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(vllm_cpu.platform, "machine", lambda: "x86_64")
    found = vllm_cpu._library()
    assert (found.name if found else None) == library


@pytest.mark.parametrize("peer", ["contiguous", "plain", "gathered", "vllm-cpu", "llama.cpp"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [small_decode, small_prefill])
def test_a_peer_on_the_cpu_gives_the_right_result(peer: Peer, dtype: str, case: type[Case]) -> None:
    if peer.name == "llama.cpp" and dtype == "float16" and case is small_decode:
        pytest.skip("it adds up values in float16, which may be further off than what we accept")
    assert error_of(peer, case(dtype=dtype, kv_dtype=dtype)) <= accuracy.TOLERANCE[dtype]


@pytest.mark.parametrize("peer", ["contiguous", "plain", "gathered", "vllm-cpu", "llama.cpp"], indirect=True)
def test_a_peer_on_the_cpu_sees_all_keys_where_nothing_is_causal(peer: Peer) -> None:
    case = small_prefill("2x5", "2x77", dtype="float32", kv_dtype="float32", causal=False)
    assert error_of(peer, case) <= 1e-5


@pytest.mark.parametrize("peer", ["contiguous", "plain", "gathered", "vllm-cpu", "llama.cpp"], indirect=True)
def test_a_peer_on_the_cpu_takes_blocks_laid_out_head_by_head(peer: Peer) -> None:
    assert error_of(peer, small_decode(dtype="float32", kv_dtype="float32", layout="HND")) <= 1e-5


@pytest.mark.parametrize("name", ["contiguous", "gathered", "vllm-cpu", "llama.cpp"])
def test_a_peer_says_that_it_has_no_window(name: str) -> None:
    with pytest.raises(UnsupportedError, match="no window"):
        PEERS[name].prepare(Inputs(decode("window", "2x30", window=7), Device("cpu")))


@pytest.mark.parametrize(("window", "causal", "tokens_before"), [(None, True, -1), (None, False, -1), (7, True, 6)])
def test_a_window_in_the_terms_of_others_leaves_out_the_query_token(
    window: int | None, causal: bool, tokens_before: int
) -> None:
    assert window_left(Case("window", (30,), (1,), window=window, causal=causal)) == tokens_before


def test_a_window_without_the_causal_mask_is_ours_alone() -> None:
    with pytest.raises(UnsupportedError, match="around each query token"):
        window_left(Case("window", (30,), (4,), window=7, causal=False))


@pytest.mark.parametrize("peer", ["vllm-cpu", "llama.cpp"], indirect=True)
def test_a_peer_on_the_cpu_takes_new_tokens_on_older_ones(peer: Peer) -> None:
    assert error_of(peer, small_prefill("2x70", "2x177", dtype="float32", kv_dtype="float32")) <= 1e-5


@pytest.mark.parametrize("peer", ["vllm-cpu"], indirect=True)
@pytest.mark.parametrize("block_size", [16, 32, 40, 64])
def test_vllm_takes_ragged_batches_of_any_block_size(peer: Peer, block_size: int) -> None:
    fields = {"dtype": "float32", "kv_dtype": "float32", "block_size": block_size}
    assert error_of(peer, small_prefill("30+1+5", "30+200+64", **fields)) <= 1e-5


@pytest.mark.parametrize("name", ["contiguous", "gathered"])
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (decode("ragged", "30+40"), "lengths differ"),
        (prefill("mixed", "30+1", "2x30"), "query lengths differ"),
        (prefill("chunk", "2x5", "2x30"), "as many query tokens as keys"),
        (decode("fp8", "2x30", kv_dtype="float8_e4m3"), "no float8_e4m3 cache"),
    ],
)
def test_sdpa_says_why_it_cannot_do_a_case(name: str, case: Case, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        PEERS[name].prepare(Inputs(case, Device("cpu")))


@pytest.mark.parametrize("name", ["vllm-cpu", "llama.cpp"])
def test_a_peer_of_the_cpu_says_that_it_has_no_8_bit_cache(name: str) -> None:
    with pytest.raises(UnsupportedError, match="no float8_e5m2 cache"):
        PEERS[name].prepare(Inputs(decode("fp8", "2x30", kv_dtype="float8_e5m2"), Device("cpu")))


@pytest.mark.parametrize("peer", ["contiguous", "plain", "gathered", "vllm-cpu", "llama.cpp"], indirect=True)
def test_the_version_says_what_runs(peer: Peer) -> None:
    assert any(character.isdigit() for character in peer.version())
