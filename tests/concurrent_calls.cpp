// Several threads call the CPU backend at once, while another one changes the number of its threads.
//
// SPDX-License-Identifier: Apache-2.0
//
// Made for sanitizers (tools/sanitize.sh), and right without them: each thread has arrays of its own and compares each
// round bit by bit with what the first thread alone computed from the same numbers.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <pagedattn/pagedattn.hpp>
#include <random>
#include <thread>
#include <vector>

namespace pa = pagedattn;
using pa::tensor;

namespace {

constexpr int kRounds = 12;
constexpr std::int64_t kBlocks = 160, kBlockSize = 16, kHeads = 2, kQueryHeads = 10, kDim = 64;
// Two decodes, a chunk and a prompt.  Keys of the longest are cut into ranges, whose results are joined.
const std::vector<std::int32_t> kLengths = {1500, 7, 300, 200}, kQueryStarts = {0, 1, 2, 42, 242};
constexpr std::int64_t kTokens = 242, kSlots = 1500 + 7 + 300 + 200;

float number(std::mt19937 &random, float) { return static_cast<float>(random() % 2001) / 1000.0f - 1.0f; }
pa::bfloat16 number(std::mt19937 &random, pa::bfloat16) {  // of size 1/2 to 1
  return static_cast<pa::bfloat16>((random() & 0x807f) | 0x3f00);
}

template <class T>
void fill(pa::HostBuffer<T> &buffer, std::mt19937 &random) {
  for (std::size_t i = 0; i < buffer.size(); ++i) buffer[i] = number(random, T{});
}

template <class T>
void append(std::vector<unsigned char> &bytes, const pa::HostBuffer<T> &buffer) {
  const auto *first = reinterpret_cast<const unsigned char *>(buffer.data());
  bytes.insert(bytes.end(), first, first + buffer.size() * sizeof(T));
}

// Every operation once, on numbers that follow from the seed; all bytes that it wrote.
template <class T>
std::vector<unsigned char> every_operation(unsigned seed) {
  std::mt19937 random(seed);
  const std::size_t cache_size = pa::PagedCache<T>::size(kBlocks, kBlockSize, kHeads, kDim);
  pa::HostBuffer<T> k(cache_size), v(cache_size), key(kSlots * kHeads * kDim), value(kSlots * kHeads * kDim);
  pa::HostBuffer<T> q(kTokens * kQueryHeads * kDim), out(q.size()), merged(q.size());
  pa::HostBuffer<float> lse(kTokens * kQueryHeads);
  fill(key, random);
  fill(value, random);
  fill(q, random);
  pa::PagedCache<T> cache{tensor(k.data(), {kBlocks, kBlockSize, kHeads, kDim}),
                          tensor(v.data(), {kBlocks, kBlockSize, kHeads, kDim})};

  std::vector<std::int64_t> slots;
  const std::int64_t columns = (1500 + kBlockSize - 1) / kBlockSize;
  std::vector<std::int32_t> table(kLengths.size() * static_cast<std::size_t>(columns), -1);
  std::int32_t block = 0;
  for (std::size_t seq = 0; seq < kLengths.size(); ++seq) {
    for (std::int32_t token = 0; token < kLengths[seq]; ++token) {
      const std::int32_t column = token / static_cast<std::int32_t>(kBlockSize);
      if (token % kBlockSize == 0) {
        table[seq * static_cast<std::size_t>(columns) + static_cast<std::size_t>(column)] = block++;
      }
      slots.push_back((block - 1) * kBlockSize + token % kBlockSize);
    }
  }
  const auto tables = tensor(table.data(), {static_cast<std::int64_t>(kLengths.size()), columns});
  const auto lengths = tensor(kLengths.data(), {static_cast<std::int64_t>(kLengths.size())});
  pa::reshape_and_cache(tensor(key.data(), {kSlots, kHeads, kDim}), tensor(value.data(), {kSlots, kHeads, kDim}), cache,
                        tensor(slots.data(), {kSlots}));

  pa::AttentionOptions options;
  options.query_start_loc = tensor(kQueryStarts.data(), {static_cast<std::int64_t>(kQueryStarts.size())});
  options.lse = tensor(lse.data(), {kTokens, kQueryHeads});
  options.deterministic = true;
  const auto results = tensor(out.data(), {kTokens, kQueryHeads, kDim});
  pa::paged_attention(tensor(q.data(), {kTokens, kQueryHeads, kDim}), cache, tables, lengths, results, options);
  const pa::Tensor<const T, 3> part(results);
  const pa::Tensor<const float, 2> part_lse(tensor(lse.data(), {kTokens, kQueryHeads}));
  pa::merge_states<const T>({part, part}, {part_lse, part_lse}, tensor(merged.data(), {kTokens, kQueryHeads, kDim}));

  std::vector<std::int64_t> pairs;
  for (std::int64_t copied = block; copied < kBlocks; ++copied) {
    pairs.push_back(copied - block);
    pairs.push_back(copied);
  }
  pa::copy_blocks<T>({cache.k, cache.v}, tensor(pairs.data(), {static_cast<std::int64_t>(pairs.size() / 2), 2}));
  pa::HostBuffer<T> keys(key.size()), values(value.size());
  pa::gather_kv(cache, tables, lengths, tensor(keys.data(), {kSlots, kHeads, kDim}),
                tensor(values.data(), {kSlots, kHeads, kDim}));

  std::vector<unsigned char> bytes;
  append(bytes, out);
  append(bytes, lse);
  append(bytes, merged);
  append(bytes, k);
  append(bytes, v);
  append(bytes, keys);
  append(bytes, values);
  return bytes;
}

template <class T>
int wrong_rounds(unsigned seed, const std::vector<unsigned char> &expected) {
  int wrong = 0;
  for (int round = 0; round < kRounds; ++round) wrong += every_operation<T>(seed) != expected;
  return wrong;
}

}  // namespace

int main() {
  const auto in_float = every_operation<float>(1);
  const auto in_bfloat16 = every_operation<pa::bfloat16>(2);
  std::atomic<int> wrong{0};
  std::atomic<bool> done{false};
  std::vector<std::thread> callers;
  for (int i = 0; i < 2; ++i) {
    callers.emplace_back([&] { wrong += wrong_rounds<float>(1, in_float); });
    callers.emplace_back([&] { wrong += wrong_rounds<pa::bfloat16>(2, in_bfloat16); });
  }
  std::thread resizer([&] {
    for (int threads = 1; !done; threads = threads % 4 + 1) {
      if (pa_set_num_threads(threads, nullptr) != PA_OK) ++wrong;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (std::thread &caller : callers) caller.join();
  done = true;
  resizer.join();
  std::printf("%d of %d rounds wrong\n", wrong.load(), 4 * kRounds);
  return wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
