// pagedattn._core: the C ABI for Python.  Argument for argument the C structs; the public functions with their defaults
// and docstrings are in python/pagedattn/_ops.py.
//
// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <cstdint>

#include "bindings/arrays.h"
#include "pagedattn/pagedattn.h"

namespace py = pybind11;

namespace pagedattn::bindings {
namespace {

void *as_stream(std::intptr_t stream) { return reinterpret_cast<void *>(stream); }

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

// The arguments of one attention call, with the arrays that they view.
class AttentionCall {
 public:
  AttentionCall(py::handle q, py::handle k_cache, py::handle v_cache, py::handle block_tables, py::handle seq_lens,
                py::handle query_start_loc, py::handle alibi_slopes, py::handle sinks, py::handle k_scale,
                py::handle v_scale, py::handle out, py::handle lse, py::handle workspace, double scale, int64_t window,
                double softcap, bool causal, int kv_dtype, bool deterministic, int check, std::intptr_t stream)
      : call_{"paged_attention", stream},
        q_(call_, "q", q),
        k_cache_(call_, "k_cache", k_cache),
        v_cache_(call_, "v_cache", v_cache),
        block_tables_(call_, "block_tables", block_tables),
        seq_lens_(call_, "seq_lens", seq_lens),
        query_start_loc_(call_, "query_start_loc", query_start_loc),
        alibi_slopes_(call_, "alibi_slopes", alibi_slopes),
        sinks_(call_, "sinks", sinks),
        k_scale_(call_, "k_scale", k_scale),
        v_scale_(call_, "v_scale", v_scale),
        out_(call_, "out", out),
        lse_(call_, "lse", lse),
        workspace_(call_, "workspace", workspace) {
    pa_attention_args_init(&args_);
    args_.q = q_.get();
    args_.k_cache = k_cache_.get();
    args_.v_cache = v_cache_.get();
    args_.block_tables = block_tables_.get();
    args_.seq_lens = seq_lens_.get();
    args_.query_start_loc = query_start_loc_.get();
    args_.alibi_slopes = alibi_slopes_.get();
    args_.sinks = sinks_.get();
    args_.k_scale = k_scale_.array();
    args_.v_scale = v_scale_.array();
    args_.k_scale_value = k_scale_.value();
    args_.v_scale_value = v_scale_.value();
    args_.out = out_.get();
    args_.lse = lse_.get();
    args_.workspace = workspace_.get();
    args_.scale = scale;
    args_.softcap = softcap;
    args_.window = window;
    args_.causal = causal ? 1 : 0;
    args_.kv_dtype = kv_dtype;
    args_.deterministic = deterministic ? 1 : 0;
    args_.check = check;
    args_.stream = as_stream(stream);
  }
  const pa_attention_args &args() const { return args_; }

 private:
  Call call_;
  Array q_, k_cache_, v_cache_, block_tables_, seq_lens_, query_start_loc_, alibi_slopes_, sinks_;
  ScaleArgument k_scale_, v_scale_;
  Array out_, lse_, workspace_;
  pa_attention_args args_;
};

void paged_attention(py::object q, py::object k_cache, py::object v_cache, py::object block_tables, py::object seq_lens,
                     py::object query_start_loc, py::object alibi_slopes, py::object sinks, py::object k_scale,
                     py::object v_scale, py::object out, py::object lse, py::object workspace, double scale,
                     int64_t window, double softcap, bool causal, int kv_dtype, bool deterministic, int check,
                     std::intptr_t stream) {
  const AttentionCall call(q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, alibi_slopes, sinks, k_scale,
                           v_scale, out, lse, workspace, scale, window, softcap, causal, kv_dtype, deterministic, check,
                           stream);
  run(pa_paged_attention, call.args());
}

std::size_t paged_attention_workspace_size(py::object q, py::object k_cache, py::object v_cache,
                                           py::object block_tables, py::object seq_lens, py::object query_start_loc,
                                           int kv_dtype, bool deterministic, std::intptr_t stream) {
  const py::none none;
  const AttentionCall call(q, k_cache, v_cache, block_tables, seq_lens, query_start_loc, none, none, none, none, none,
                           none, none, 1.0, 0, 0.0, true, kv_dtype, deterministic, -1, stream);
  std::size_t bytes = 0;
  pa_error error;
  raise_on_error(pa_paged_attention_workspace_size(&call.args(), &bytes, &error), error);
  return bytes;
}

void merge_states(py::object outs, py::object lses, py::object out, py::object lse, std::intptr_t stream) {
  const Call call{"merge_states", stream};
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
  args.stream = as_stream(stream);
  run(pa_merge_states, args);
}

void reshape_and_cache(py::object key, py::object value, py::object k_cache, py::object v_cache,
                       py::object slot_mapping, py::object k_scale, py::object v_scale, int kv_dtype, int check,
                       std::intptr_t stream) {
  const Call call{"reshape_and_cache", stream};
  const Array keys(call, "key", key), values(call, "value", value), k(call, "k_cache", k_cache),
      v(call, "v_cache", v_cache), slots(call, "slot_mapping", slot_mapping);
  const ScaleArgument ks(call, "k_scale", k_scale), vs(call, "v_scale", v_scale);
  pa_reshape_and_cache_args args;
  pa_reshape_and_cache_args_init(&args);
  args.key = keys.get();
  args.value = values.get();
  args.k_cache = k.get();
  args.v_cache = v.get();
  args.slot_mapping = slots.get();
  args.k_scale = ks.array();
  args.v_scale = vs.array();
  args.k_scale_value = ks.value();
  args.v_scale_value = vs.value();
  args.kv_dtype = kv_dtype;
  args.check = check;
  args.stream = as_stream(stream);
  run(pa_reshape_and_cache, args);
}

void copy_blocks(py::object caches, py::object block_mapping, int check, std::intptr_t stream) {
  const Call call{"copy_blocks", stream};
  const ArrayList arrays(call, "caches", caches);
  const Array mapping(call, "block_mapping", block_mapping);
  pa_copy_blocks_args args;
  pa_copy_blocks_args_init(&args);
  args.num_caches = arrays.size();
  args.caches = arrays.data();
  args.block_mapping = mapping.get();
  args.check = check;
  args.stream = as_stream(stream);
  run(pa_copy_blocks, args);
}

void swap_blocks(py::object src, py::object dst, py::object block_mapping, std::intptr_t stream) {
  const Call call{"swap_blocks", stream};
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
  args.stream = as_stream(stream);
  run(pa_swap_blocks, args);
}

void gather_kv(py::object k_cache, py::object v_cache, py::object block_tables, py::object seq_lens,
               py::object seq_starts, py::object out_start_loc, py::object k_scale, py::object v_scale,
               py::object k_out, py::object v_out, int kv_dtype, int check, std::intptr_t stream) {
  const Call call{"gather_kv", stream};
  const Array k(call, "k_cache", k_cache), v(call, "v_cache", v_cache), tables(call, "block_tables", block_tables),
      lens(call, "seq_lens", seq_lens), starts(call, "seq_starts", seq_starts),
      rows(call, "out_start_loc", out_start_loc), ko(call, "k_out", k_out), vo(call, "v_out", v_out);
  const ScaleArgument ks(call, "k_scale", k_scale), vs(call, "v_scale", v_scale);
  pa_gather_kv_args args;
  pa_gather_kv_args_init(&args);
  args.k_cache = k.get();
  args.v_cache = v.get();
  args.block_tables = tables.get();
  args.seq_lens = lens.get();
  args.seq_starts = starts.get();
  args.out_start_loc = rows.get();
  args.k_scale = ks.array();
  args.v_scale = vs.array();
  args.k_scale_value = ks.value();
  args.v_scale_value = vs.value();
  args.k_out = ko.get();
  args.v_out = vo.get();
  args.kv_dtype = kv_dtype;
  args.check = check;
  args.stream = as_stream(stream);
  run(pa_gather_kv, args);
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

void set_num_threads(int num_threads) {
  pa_error error;
  raise_on_error(pa_set_num_threads(num_threads, &error), error);
}

}  // namespace
}  // namespace pagedattn::bindings

PYBIND11_MODULE(_core, m) {
  using namespace pagedattn::bindings;
  prepare();
  m.doc() = "The C ABI of pagedattn.";
  m.def("paged_attention", &paged_attention);
  m.def("paged_attention_workspace_size", &paged_attention_workspace_size);
  m.def("merge_states", &merge_states);
  m.def("reshape_and_cache", &reshape_and_cache);
  m.def("copy_blocks", &copy_blocks);
  m.def("swap_blocks", &swap_blocks);
  m.def("gather_kv", &gather_kv);
  m.def("build_info", &build_info);
  m.def("device_count", &device_count);
  m.def("device_info", &device_info, py::arg("device"));
  m.def("last_kernel", &pa_last_kernel);
  m.def("get_num_threads", &pa_get_num_threads);
  m.def("set_num_threads", &set_num_threads, py::arg("num_threads"));
}
