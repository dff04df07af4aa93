// Every function of pagedattn.hpp, called once with a result that is known.
//
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <pagedattn/pagedattn.hpp>
#include <string>
#include <type_traits>
#include <vector>

namespace pa = pagedattn;
using pa::tensor;

namespace {

void require(bool holds, const char *what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::exit(1);
}
#define REQUIRE(condition) require((condition), #condition)

template <class Call>
std::string message_of(Call call) {
  try {
    call();
  } catch (const pa::Error &error) {
    REQUIRE(error.status() == PA_ERROR_INVALID_ARGUMENT);
    return error.what();
  }
  return "";
}

bool close(float a, double b) { return std::abs(static_cast<double>(a) - b) < 1e-5; }

// Two blocks of two slots, one head of eight numbers; slot s of K holds s everywhere, and of V 10 + s.
struct Cache {
  pa::HostBuffer<float> k{2 * 2 * 8}, v{2 * 2 * 8};
  pa::PagedCache<float> view{tensor(k.data(), {2, 2, 1, 8}), tensor(v.data(), {2, 2, 1, 8})};

  Cache() {
    pa::HostBuffer<float> key(4 * 8), value(4 * 8);
    for (std::size_t i = 0; i < key.size(); ++i) {
      key[i] = static_cast<float>(i / 8);
      value[i] = 10.0f + key[i];
    }
    const std::int64_t slots[] = {0, 1, 2, 3};
    pa::reshape_and_cache(tensor(key.data(), {4, 1, 8}), tensor(value.data(), {4, 1, 8}), view, tensor(slots, {4}));
  }
};

void a_buffer_too_large_for_any_memory_is_refused() {
  bool refused = false;
  try {
    pa::HostBuffer<float> buffer(SIZE_MAX / 4 + 2);  // 4 bytes, were they counted by 64 bits
  } catch (const std::bad_alloc &) {
    refused = true;
  }
  REQUIRE(refused);
}

void reshape_and_cache_fills_the_slots() {
  Cache cache;
  REQUIRE(pa::PagedCache<float>::size(2, 2, 1, 8) == cache.k.size());
  for (std::size_t i = 0; i < cache.k.size(); ++i) {
    REQUIRE(cache.k[i] == static_cast<float>(i / 8));
    REQUIRE(cache.v[i] == 10.0f + static_cast<float>(i / 8));
  }
}

void paged_attention_takes_its_options() {
  Cache cache;
  pa::HostBuffer<float> q(8), out(8), lse(1);
  q[0] = 1.0f;
  const std::int32_t table[] = {1, 0}, length[] = {3};  // slots 2, 3, 0
  const auto queries = tensor(q.data(), {1, 1, 8});
  const auto attend = [&](const pa::AttentionOptions &options) {
    pa::paged_attention(queries, cache.view, tensor(table, {1, 2}), tensor(length, {1}), tensor(out.data(), {1, 1, 8}),
                        options);
  };
  pa::AttentionOptions options;
  options.scale = 1.0;
  options.lse = tensor(lse.data(), {1, 1});
  attend(options);
  const double sum = std::exp(2.0) + std::exp(3.0) + std::exp(0.0);
  for (const float x : {out[0], out[7]}) {
    REQUIRE(close(x, (12 * std::exp(2.0) + 13 * std::exp(3.0) + 10 * std::exp(0.0)) / sum));
  }
  REQUIRE(close(lse[0], std::log(sum)));

  options.window = 1;  // the last key alone: slot 0
  attend(options);
  REQUIRE(close(out[3], 10.0));

  const float sink[] = {0.0f};
  options.sinks = tensor(sink, {1});  // one more exp(0) in the denominator
  attend(options);
  REQUIRE(close(out[3], 5.0));
  REQUIRE(close(lse[0], std::log(2.0)));

  REQUIRE(pa::paged_attention_workspace_size(queries, cache.view, tensor(table, {1, 2}), tensor(length, {1}),
                                             tensor(out.data(), {1, 1, 8})) == 0);
}

void float8_queries_are_scaled() {
  const pa::float8_e4m3 one{0x38}, two{0x40}, three{0x44};
  std::vector<pa::float8_e4m3> q(8, one), k(8, one), v(8, two);
  k.resize(16, two);
  v.resize(16, three);
  const pa::PagedCache<pa::float8_e4m3> cache{tensor(k.data(), {1, 2, 1, 8}), tensor(v.data(), {1, 2, 1, 8})};
  pa::HostBuffer<pa::float16> out(8);
  pa::HostBuffer<float> lse(1);
  const std::int32_t table[] = {0}, length[] = {2};
  pa::AttentionOptions options;
  options.scale = 0.125;
  options.q_scale = 3.0;
  options.lse = tensor(lse.data(), {1, 1});
  pa::paged_attention(tensor(q.data(), {1, 1, 8}), cache, tensor(table, {1, 1}), tensor(length, {1}),
                      tensor(out.data(), {1, 1, 8}), options);
  REQUIRE(close(lse[0], std::log(std::exp(3.0) + std::exp(6.0))));
}

void merge_states_weighs_by_the_log_sum_exp() {
  const float a[] = {1, 1}, b[] = {3, 3}, lse_a[] = {0}, lse_b[] = {0};
  pa::HostBuffer<float> out(2), lse(1);
  pa::merge_states<const float>({tensor(a, {1, 1, 2}), tensor(b, {1, 1, 2})},
                                {tensor(lse_a, {1, 1}), tensor(lse_b, {1, 1})}, tensor(out.data(), {1, 1, 2}),
                                tensor(lse.data(), {1, 1}));
  REQUIRE(close(out[0], 2.0) && close(out[1], 2.0) && close(lse[0], std::log(2.0)));

  const std::string message =
      message_of([&] { pa::merge_states<const float>({tensor(a, {1, 1, 2})}, {}, tensor(out.data(), {1, 1, 2})); });
  REQUIRE(message == "merge_states: `outs` and `lses` must have the same number of tensors; got 1 and 0");
}

void blocks_are_copied_swapped_and_gathered() {
  Cache cache;
  const std::int64_t copy[] = {0, 1};
  pa::copy_blocks<float>({cache.view.k, cache.view.v}, tensor(copy, {1, 2}));
  REQUIRE(cache.k[2 * 8] == 0.0f && cache.k[3 * 8] == 1.0f && cache.v[2 * 8] == 10.0f);

  Cache other;
  const std::int64_t swap[] = {1, 0};
  pa::swap_blocks<float>({other.view.k}, {cache.view.k}, tensor(swap, {1, 2}));
  REQUIRE(cache.k[0] == 2.0f && cache.k[8] == 3.0f);
  REQUIRE(message_of([&] { pa::swap_blocks<float>({other.view.k}, {}, tensor(swap, {1, 2})); }) != "");

  pa::HostBuffer<float> k(2 * 8), v(2 * 8);
  const std::int32_t table[] = {1, 0}, length[] = {3}, start[] = {1};  // slots 3 and 0
  pa::GatherOptions options;
  options.seq_starts = tensor(start, {1});
  pa::gather_kv(other.view, tensor(table, {1, 2}), tensor(length, {1}), tensor(k.data(), {2, 1, 8}),
                tensor(v.data(), {2, 1, 8}), options);
  REQUIRE(k[0] == 3.0f && k[8] == 0.0f && v[0] == 13.0f && v[15] == 10.0f);
}

void the_layers_of_a_model_are_written_in_one_call() {
  Cache first, second;
  const float key[8] = {5}, value[8] = {6};
  const std::int64_t slots[] = {2};
  const auto k = tensor(key, {1, 1, 8}), v = tensor(value, {1, 1, 8});
  const std::vector<pa::PagedCache<float>> caches{first.view, second.view};
  pa::reshape_and_cache<const float, float>({k, k}, {v, v}, caches, tensor(slots, {1}));
  REQUIRE(first.k[2 * 8] == 5.0f && first.v[2 * 8] == 6.0f && second.k[2 * 8] == 5.0f && second.v[2 * 8] == 6.0f);
  REQUIRE(message_of([&] {
            pa::reshape_and_cache<const float, float>({k}, {v, v}, caches, tensor(slots, {1}));
          }).find("got 1 and 2") != std::string::npos);
}

void keys_and_queries_are_rotated() {
  Cache cache;
  const float key[8] = {1, 2, 0, 0, 5}, value[8] = {7}, query[8] = {3, 4};
  const float quarter_turn[] = {0, 1};
  pa::HostBuffer<float> rotated(8);
  const std::int64_t slots[] = {3};
  const std::int32_t positions[] = {0};
  pa::RopeOptions<float> options;
  options.query = tensor(query, {1, 1, 8});
  options.query_out = tensor(rotated.data(), {1, 1, 8});
  options.interleaved = true;
  pa::rope_and_cache(tensor(key, {1, 1, 8}), tensor(value, {1, 1, 8}), cache.view, tensor(slots, {1}),
                     tensor(positions, {1}), tensor(quarter_turn, {1, 2}), options);
  REQUIRE(cache.k[3 * 8] == -2.0f && cache.k[3 * 8 + 1] == 1.0f && cache.k[3 * 8 + 4] == 5.0f);
  REQUIRE(cache.v[3 * 8] == 7.0f && rotated[0] == -4.0f && rotated[1] == 3.0f);
}

void page_locked_memory_is_had_where_there_is_a_device() {
  try {
    pa::PinnedBuffer<float> memory(16);
    REQUIRE(memory.size() == 16 && memory.data() != nullptr);
    memory.data()[15] = 1.0f;
  } catch (const pa::Error &error) {
    REQUIRE(error.status() == PA_ERROR_UNSUPPORTED || error.status() == PA_ERROR_NO_DEVICE);
  }
  pa_error error;
  REQUIRE(pa_host_free(nullptr, &error) == PA_OK);
  int nobodys = 0;
  REQUIRE(pa_host_free(&nobodys, &error) == PA_ERROR_INVALID_ARGUMENT);
  void *data = &nobodys;
  REQUIRE(pa_host_alloc(0, 0, &data, &error) == PA_ERROR_INVALID_ARGUMENT && data == nullptr);
}

void a_failed_call_throws_the_library_s_message() {
  Cache cache;
  pa::HostBuffer<float> q(8), out(8);
  const std::int32_t table[] = {7}, length[] = {1};
  const std::string message = message_of([&] {
    pa::paged_attention(tensor(q.data(), {1, 1, 8}), cache.view, tensor(table, {1, 1}), tensor(length, {1}),
                        tensor(out.data(), {1, 1, 8}));
  });
  REQUIRE(message.find("paged_attention: `block_tables`") == 0);
}

void tensors_know_their_type_shape_and_strides() {
  pa::HostBuffer<pa::bfloat16> memory(24);
  const auto t = tensor(memory.data(), {2, 3, 4}, pa::Device::pinned_host());
  REQUIRE(t.stride(0) == 12 && t.stride(1) == 4 && t.stride(2) == 1 && t.shape(1) == 3);
  REQUIRE(t.c()->dtype == PA_BFLOAT16 && t.device().type == PA_CUDA_HOST && t.c()->flags == 0);
  const pa::Tensor<const pa::bfloat16, 3> read_only = t;
  REQUIRE(read_only.data() == t.data() && read_only.c()->flags == PA_TENSOR_READONLY);
  static_assert(!std::is_convertible_v<pa::Tensor<const float, 1>, pa::Tensor<float, 1>>);
  static_assert(!std::is_convertible_v<pa::Tensor<float, 1>, pa::Tensor<const float, 2>>);
  static_assert(!std::is_convertible_v<pa::Tensor<float, 1>, pa::Tensor<const pa::float16, 1>>);
  REQUIRE(reinterpret_cast<std::uintptr_t>(memory.data()) % 64 == 0);
}

}  // namespace

int main() {
  a_buffer_too_large_for_any_memory_is_refused();
  reshape_and_cache_fills_the_slots();
  paged_attention_takes_its_options();
  float8_queries_are_scaled();
  merge_states_weighs_by_the_log_sum_exp();
  blocks_are_copied_swapped_and_gathered();
  the_layers_of_a_model_are_written_in_one_call();
  keys_and_queries_are_rotated();
  page_locked_memory_is_had_where_there_is_a_device();
  a_failed_call_throws_the_library_s_message();
  tensors_know_their_type_shape_and_strides();
  std::puts("all hold");
  return 0;
}
