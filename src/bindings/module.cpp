// pagedattn._core: the C ABI for Python.  Argument for argument the C structs; the public functions with their defaults
// and docstrings are in python/pagedattn/_ops.py.
//
// SPDX-License-Identifier: Apache-2.0
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstdint>
#include <string>

#include "bindings/arguments.h"
#include "bindings/arrays.h"
#include "bindings/block_reader.h"
#include "bindings/errors.h"
#include "bindings/functions.h"
#include "bindings/libraries.h"
#include "pagedattn/pagedattn.h"

namespace py = pybind11;

namespace pagedattn::bindings {
namespace {

using Object = py::handle;

void *as_stream(const Call &call) { return reinterpret_cast<void *>(call.stream); }

// A call whose stream is that of its leading array.
Call call_on(const char *operation, Object stream, Object array) {
  return {operation, stream_of(operation, stream, array)};
}

// The array that leads a list of arrays, None where there is none; or the one array that stands for a list.
Object front(Object arrays) {
  if (!PyList_Check(arrays.ptr()) && !PyTuple_Check(arrays.ptr())) return arrays;
  return PySequence_Fast_GET_SIZE(arrays.ptr()) > 0 ? PySequence_Fast_GET_ITEM(arrays.ptr(), 0) : Py_None;
}

// Takes the GIL back.  Until Python 3.13 a daemon thread that asks for it while the interpreter ends is unwound
// instead, which C++ would turn into a crash; from 3.14 on it sleeps until the process is gone, as here.
void take_gil(PyThreadState *thread) {
  try {
    PyEval_RestoreThread(thread);
  } catch (...) {
    for (;;) pause();
  }
}

// Runs a C call without the GIL: other Python threads go on while the CPU kernels compute.
template <class Args>
void run(pa_status (*call)(const Args *, pa_error *), const Args &args) {
  pa_error error;
  PyThreadState *const thread = PyEval_SaveThread();
  const pa_status status = call(&args, &error);
  take_gil(thread);
  raise_on_error(status, error);
}

// Those of a cache.
template <class Args>
void give_scales(const ScaleArgument &k_scale, const ScaleArgument &v_scale, Args *args) {
  args->k_scale = k_scale.array();
  args->v_scale = v_scale.array();
  args->k_scale_value = k_scale.value();
  args->v_scale_value = v_scale.value();
}

// What attention reads, and the size of its workspace depends on.
struct AttentionInputs {
  AttentionInputs(const Call &call, Object q, Object k_cache, Object v_cache, Object block_tables, Object seq_lens,
                  Object query_start_loc)
      : q(call, "q", q),
        k_cache(call, "k_cache", k_cache),
        v_cache(call, "v_cache", v_cache),
        block_tables(call, "block_tables", block_tables),
        seq_lens(call, "seq_lens", seq_lens),
        query_start_loc(call, "query_start_loc", query_start_loc) {}

  void give(pa_attention_args *args) const {
    args->q = q.get();
    args->k_cache = k_cache.get();
    args->v_cache = v_cache.get();
    args->block_tables = block_tables.get();
    args->seq_lens = seq_lens.get();
    args->query_start_loc = query_start_loc.get();
  }

  Array q, k_cache, v_cache, block_tables, seq_lens, query_start_loc;
};

void paged_attention(Object q, Object k_cache, Object v_cache, Object block_tables, Object seq_lens,
                     Object query_start_loc, Object alibi_slopes, Object sinks, Object q_scale, Object k_scale,
                     Object v_scale, Object out, Object lse, Object workspace, Object max_query_len, Object scale,
                     Object window, Object softcap, Object causal, Object kv_dtype, Object deterministic, Object check,
                     Object stream) {
  constexpr const char *operation = "paged_attention";
  pa_attention_args args;
  pa_attention_args_init(&args);
  if (!scale.is_none()) args.scale = number(operation, "scale", scale);
  if (!max_query_len.is_none()) args.max_query_len = whole_number(operation, "max_query_len", max_query_len, 1);
  if (!window.is_none()) args.window = whole_number(operation, "window", window, 1);
  args.softcap = number(operation, "softcap", softcap);
  args.causal = flag(operation, "causal", causal);
  args.kv_dtype = static_cast<int32_t>(integer(kv_dtype));
  args.deterministic = flag(operation, "deterministic", deterministic);
  args.check = check_mode(operation, check);

  const Call call = call_on(operation, stream, q);
  args.stream = as_stream(call);
  const AttentionInputs inputs(call, q, k_cache, v_cache, block_tables, seq_lens, query_start_loc);
  inputs.give(&args);
  const Array slopes(call, "alibi_slopes", alibi_slopes), sink(call, "sinks", sinks);
  args.alibi_slopes = slopes.get();
  args.sinks = sink.get();
  const ScaleArgument qs(call, "q_scale", q_scale), ks(call, "k_scale", k_scale), vs(call, "v_scale", v_scale);
  args.q_scale = qs.array();
  args.q_scale_value = qs.value();
  give_scales(ks, vs, &args);
  const Array result(call, "out", out), result_lse(call, "lse", lse), scratch(call, "workspace", workspace);
  args.out = result.get();
  args.lse = result_lse.get();
  args.workspace = scratch.get();
  run(pa_paged_attention, args);
}

std::size_t paged_attention_workspace_size(Object q, Object k_cache, Object v_cache, Object block_tables,
                                           Object seq_lens, Object query_start_loc, Object max_query_len,
                                           Object kv_dtype, Object deterministic) {
  constexpr const char *operation = "paged_attention";
  pa_attention_args args;
  pa_attention_args_init(&args);
  if (!max_query_len.is_none()) args.max_query_len = whole_number(operation, "max_query_len", max_query_len, 1);
  args.kv_dtype = static_cast<int32_t>(integer(kv_dtype));
  args.deterministic = flag(operation, "deterministic", deterministic);
  const Call call = call_on(operation, py::none(), q);
  const AttentionInputs inputs(call, q, k_cache, v_cache, block_tables, seq_lens, query_start_loc);
  inputs.give(&args);
  std::size_t bytes = 0;
  pa_error error;
  raise_on_error(pa_paged_attention_workspace_size(&args, &bytes, &error), error);
  return bytes;
}

void merge_states(Object outs, Object lses, Object out, Object lse, Object stream) {
  const Call call = call_on("merge_states", stream, front(outs));
  const ArrayList out_parts(call, "outs", outs), lse_parts(call, "lses", lses);
  if (out_parts.size() != lse_parts.size()) {
    raise_invalid("merge_states: `lses` must have as many parts as `outs`, " + std::to_string(out_parts.size()) +
                  "; got " + std::to_string(lse_parts.size()));
  }
  const Array merged(call, "out", out), merged_lse(call, "lse", lse);
  pa_merge_states_args args;
  pa_merge_states_args_init(&args);
  args.num_parts = out_parts.size();
  args.outs = out_parts.data();
  args.lses = lse_parts.data();
  args.out = merged.get();
  args.lse = merged_lse.get();
  args.stream = as_stream(call);
  run(pa_merge_states, args);
}

void reshape_and_cache(Object key, Object value, Object k_cache, Object v_cache, Object slot_mapping, Object k_scale,
                       Object v_scale, Object kv_dtype, Object check, Object stream) {
  constexpr const char *operation = "reshape_and_cache";
  pa_reshape_and_cache_args args;
  pa_reshape_and_cache_args_init(&args);
  args.kv_dtype = static_cast<int32_t>(integer(kv_dtype));
  args.check = check_mode(operation, check);
  const Call call = call_on(operation, stream, front(key));
  const ArrayOrList keys(call, "key", key), values(call, "value", value), k(call, "k_cache", k_cache),
      v(call, "v_cache", v_cache);
  const auto same_layers = [&](const char *name, const ArrayOrList &list) {
    if (list.size() == keys.size()) return;
    raise_invalid(std::string(operation) + ": `" + name + "` must have as many layers as `key`, " +
                  std::to_string(keys.size()) + "; got " + std::to_string(list.size()));
  };
  same_layers("value", values);
  same_layers("k_cache", k);
  same_layers("v_cache", v);
  const Array slots(call, "slot_mapping", slot_mapping);
  const ScaleArgument ks(call, "k_scale", k_scale), vs(call, "v_scale", v_scale);
  args.num_layers = keys.size();
  args.key = keys.data();
  args.value = values.data();
  args.k_cache = k.data();
  args.v_cache = v.data();
  args.slot_mapping = slots.get();
  give_scales(ks, vs, &args);
  args.stream = as_stream(call);
  run(pa_reshape_and_cache, args);
}

void rope_and_cache(Object key, Object value, Object k_cache, Object v_cache, Object slot_mapping, Object positions,
                    Object cos_sin, Object query, Object query_out, Object interleaved, Object k_scale, Object v_scale,
                    Object kv_dtype, Object check, Object stream) {
  constexpr const char *operation = "rope_and_cache";
  pa_rope_and_cache_args args;
  pa_rope_and_cache_args_init(&args);
  args.interleaved = flag(operation, "interleaved", interleaved);
  args.kv_dtype = static_cast<int32_t>(integer(kv_dtype));
  args.check = check_mode(operation, check);
  const Call call = call_on(operation, stream, key);
  const Array keys(call, "key", key), values(call, "value", value), k(call, "k_cache", k_cache),
      v(call, "v_cache", v_cache), slots(call, "slot_mapping", slot_mapping), places(call, "positions", positions),
      table(call, "cos_sin", cos_sin), q(call, "query", query), q_out(call, "query_out", query_out);
  const ScaleArgument ks(call, "k_scale", k_scale), vs(call, "v_scale", v_scale);
  args.key = keys.get();
  args.value = values.get();
  args.k_cache = k.get();
  args.v_cache = v.get();
  args.slot_mapping = slots.get();
  args.positions = places.get();
  args.cos_sin = table.get();
  args.query = q.get();
  args.query_out = q_out.get();
  give_scales(ks, vs, &args);
  args.stream = as_stream(call);
  run(pa_rope_and_cache, args);
}

void copy_blocks(Object caches, Object block_mapping, Object check, Object stream) {
  constexpr const char *operation = "copy_blocks";
  pa_copy_blocks_args args;
  pa_copy_blocks_args_init(&args);
  args.check = check_mode(operation, check);
  const Call call = call_on(operation, stream, front(caches));
  const ArrayList arrays(call, "caches", caches);
  const Array mapping(call, "block_mapping", block_mapping);
  args.num_caches = arrays.size();
  args.caches = arrays.data();
  args.block_mapping = mapping.get();
  args.stream = as_stream(call);
  run(pa_copy_blocks, args);
}

void swap_blocks(Object src, Object dst, Object block_mapping, Object event, Object stream) {
  const Call call = call_on("swap_blocks", stream, cuda_device(front(src)) ? front(src) : front(dst));
  const ArrayList sources(call, "src", src), destinations(call, "dst", dst);
  if (sources.size() != destinations.size()) {
    raise_invalid("swap_blocks: `dst` must have as many caches as `src`, " + std::to_string(sources.size()) + "; got " +
                  std::to_string(destinations.size()));
  }
  const Array mapping(call, "block_mapping", block_mapping);
  pa_swap_blocks_args args;
  pa_swap_blocks_args_init(&args);
  args.num_caches = sources.size();
  args.src = sources.data();
  args.dst = destinations.data();
  args.block_mapping = mapping.get();
  args.stream = as_stream(call);
  if (!event.is_none()) {
    args.event = given_handle("swap_blocks", "event", event);
    if (args.event == nullptr) {
      raise_invalid(
          "swap_blocks: `event` must be a CUDA event that exists, as a torch event does from its first "
          "`record()` on; got " +
          py::repr(event).cast<std::string>());
    }
  }
  run(pa_swap_blocks, args);
}

void gather_kv(Object k_cache, Object v_cache, Object block_tables, Object seq_lens, Object seq_starts,
               Object out_start_loc, Object k_scale, Object v_scale, Object k_out, Object v_out, Object kv_dtype,
               Object check, Object stream) {
  constexpr const char *operation = "gather_kv";
  pa_gather_kv_args args;
  pa_gather_kv_args_init(&args);
  args.kv_dtype = static_cast<int32_t>(integer(kv_dtype));
  args.check = check_mode(operation, check);
  const Call call = call_on(operation, stream, k_cache);
  const Array k(call, "k_cache", k_cache), v(call, "v_cache", v_cache), tables(call, "block_tables", block_tables),
      lens(call, "seq_lens", seq_lens), starts(call, "seq_starts", seq_starts),
      rows(call, "out_start_loc", out_start_loc), ko(call, "k_out", k_out), vo(call, "v_out", v_out);
  const ScaleArgument ks(call, "k_scale", k_scale), vs(call, "v_scale", v_scale);
  args.k_cache = k.get();
  args.v_cache = v.get();
  args.block_tables = tables.get();
  args.seq_lens = lens.get();
  args.seq_starts = starts.get();
  args.out_start_loc = rows.get();
  give_scales(ks, vs, &args);
  args.k_out = ko.get();
  args.v_out = vo.get();
  args.stream = as_stream(call);
  run(pa_gather_kv, args);
}

// Page-locked memory as bytes.  It is freed with the last array that looks into it, which waits for the swaps in it,
// and other threads' Python goes on meanwhile.
py::array host_memory(py::ssize_t bytes, int device) {
  pa_error error;
  void *data = nullptr;
  PyThreadState *const thread = PyEval_SaveThread();
  const pa_status status = pa_host_alloc(static_cast<size_t>(bytes), device, &data, &error);
  take_gil(thread);
  raise_on_error(status, error);
  const py::capsule owner(data, [](void *memory) {
    PyThreadState *const thread = PyEval_SaveThread();
    pa_host_free(memory, nullptr);
    take_gil(thread);
  });
  return py::array(py::dtype::of<uint8_t>(), {bytes}, {py::ssize_t{1}}, data, owner);
}

py::dict build_info() {
  pa_build_info info;
  info.struct_size = sizeof info;
  pa_error error;
  raise_on_error(pa_get_build_info(&info, &error), error);
  py::dict facts;
  facts["version"] = info.version;
  facts["compiler"] = info.compiler;
  facts["cuda_built"] = info.cuda_built != 0;
  facts["cuda_version"] = info.cuda_version;
  facts["cuda_archs"] = info.cuda_archs;
  facts["cpu_isas"] = info.cpu_isas;
  facts["cpu_isa"] = info.cpu_isa;
  facts["kernel_table"] = info.kernel_table;
  return facts;
}

int device_count() {
  int32_t count = 0;
  pa_error error;
  raise_on_error(pa_cuda_device_count(&count, &error), error);
  return count;
}

py::dict device_info(int device) {
  pa_device_info info;
  info.struct_size = sizeof info;
  pa_error error;
  raise_on_error(pa_cuda_device_info(device, &info, &error), error);
  py::dict facts;
  facts["name"] = info.name;
  facts["compute_capability"] = info.compute_capability;
  facts["num_multiprocessors"] = info.num_multiprocessors;
  facts["driver_version"] = info.driver_version;
  facts["runtime_version"] = info.runtime_version;
  facts["total_memory"] = info.total_memory;
  facts["l2_cache_size"] = info.l2_cache_size;
  return facts;
}

void set_num_threads(const py::object &num_threads) {
  const int64_t wanted = whole_number("set_num_threads", "num_threads", num_threads, 1, 4096);
  pa_error error;
  raise_on_error(pa_set_num_threads(static_cast<int32_t>(wanted), &error), error);
}

int get_num_threads() {
  int32_t num_threads = 0;
  pa_error error;
  raise_on_error(pa_get_num_threads(&num_threads, &error), error);
  return num_threads;
}

int64_t whole_number_of_at_least(const char *operation, const char *argument, Object value, int64_t least) {
  return whole_number(operation, argument, value, least);
}

// With the signatures that the stub generator reads.
PyMethodDef operations[] = {
    positional<&paged_attention>(
        "paged_attention",
        "paged_attention(q: object, k_cache: object, v_cache: object, block_tables: object, seq_lens: object, "
        "query_start_loc: object, alibi_slopes: object, sinks: object, q_scale: object, k_scale: object, v_scale: "
        "object, out: object, lse: object, workspace: object, max_query_len: object, scale: object, window: object, "
        "softcap: object, causal: object, kv_dtype: int, deterministic: object, check: object, stream: object) -> "
        "None"),
    positional<&paged_attention_workspace_size>(
        "paged_attention_workspace_size",
        "paged_attention_workspace_size(q: object, k_cache: object, v_cache: object, block_tables: object, seq_lens: "
        "object, query_start_loc: object, max_query_len: object, kv_dtype: int, deterministic: object) -> int"),
    positional<&merge_states>(
        "merge_states", "merge_states(outs: object, lses: object, out: object, lse: object, stream: object) -> None"),
    positional<&reshape_and_cache>(
        "reshape_and_cache",
        "reshape_and_cache(key: object, value: object, k_cache: object, v_cache: object, slot_mapping: object, "
        "k_scale: object, v_scale: object, kv_dtype: int, check: object, stream: object) -> None"),
    positional<&rope_and_cache>(
        "rope_and_cache",
        "rope_and_cache(key: object, value: object, k_cache: object, v_cache: object, slot_mapping: object, positions: "
        "object, cos_sin: object, query: object, query_out: object, interleaved: object, k_scale: object, v_scale: "
        "object, kv_dtype: int, check: object, stream: object) -> None"),
    positional<&copy_blocks>(
        "copy_blocks", "copy_blocks(caches: object, block_mapping: object, check: object, stream: object) -> None"),
    positional<&swap_blocks>(
        "swap_blocks",
        "swap_blocks(src: object, dst: object, block_mapping: object, event: object, stream: object) -> None"),
    positional<&gather_kv>("gather_kv",
                           "gather_kv(k_cache: object, v_cache: object, block_tables: object, seq_lens: object, "
                           "seq_starts: object, out_start_loc: object, k_scale: object, v_scale: object, k_out: "
                           "object, v_out: object, kv_dtype: int, check: object, stream: object) -> None"),
    {nullptr, nullptr, 0, nullptr}};

}  // namespace
}  // namespace pagedattn::bindings

PYBIND11_MODULE(_core, m) {
  using namespace pagedattn::bindings;
  prepare();
  m.doc() = "The C ABI of pagedattn.";
  if (PyModule_AddFunctions(m.ptr(), operations) != 0) throw py::error_already_set();
  m.def("cuda_device", &cuda_device, py::arg("array"));
  m.def("cupy_layout_is_known", &cupy_layout_is_known);
  m.def("host_memory", &host_memory, py::arg("num_bytes"), py::arg("device"));
  m.def("read_blocks", &read_blocks, py::arg("k_cache"), py::arg("v_cache"), py::arg("blocks"), py::arg("passes"));
  m.def("build_info", &build_info);
  m.def("device_count", &device_count);
  m.def("device_info", &device_info, py::arg("device"));
  m.def("last_kernel", &pa_last_kernel);
  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("num_threads"));
  m.def("whole_number", &whole_number_of_at_least, py::arg("operation"), py::arg("argument"), py::arg("value"),
        py::arg("least"));
  m.def("flag", &flag, py::arg("operation"), py::arg("argument"), py::arg("value"));
}
