// A serving loop in small: allocates a paged cache, appends tokens to three sequences, attends, and checks every
// result against plain loops over contiguous keys and values.
//
// SPDX-License-Identifier: Apache-2.0
//
// Run it as `paged_cache cpu` or `paged_cache cuda`.  The first step appends the prompts (three lengths in one ragged
// batch), each further step one token a sequence; a sequence takes a block from the pool when its last one is full.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <numeric>
#include <pagedattn/pagedattn.hpp>
#include <random>
#include <string>
#include <vector>

#include "memory.hpp"

namespace {

constexpr std::int64_t kNumBlocks = 32, kBlockSize = 16, kNumQueryHeads = 8, kNumKvHeads = 2, kHeadDim = 64;
constexpr std::int64_t kMaxBlocksPerSeq = 8;
constexpr std::int64_t kQueryRow = kNumQueryHeads * kHeadDim, kKvRow = kNumKvHeads * kHeadDim;

// What the pool and the checker know of one sequence.
struct Sequence {
  std::vector<std::int32_t> blocks;
  std::vector<float> keys, values;  // [length, kNumKvHeads, kHeadDim], contiguous: for the check alone
  std::int64_t length() const { return static_cast<std::int64_t>(keys.size()) / kKvRow; }
};

// One step's batch in host memory, as the kernels take it.
struct Batch {
  std::vector<float> q, key, value;
  std::vector<std::int64_t> slot_mapping;
  std::vector<std::int32_t> block_tables, seq_lens, query_start_loc{0};
};

void append_random(std::vector<float> &to, std::int64_t count, std::mt19937 &rng) {
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < count; ++i) to.push_back(normal(rng));
}

// Gives `count` new tokens of `sequence` their keys, values, queries and slots.
void append_tokens(Sequence &sequence, std::int64_t count, std::vector<std::int32_t> &free_blocks, Batch &batch,
                   std::mt19937 &rng) {
  for (std::int64_t position = sequence.length(), end = position + count; position < end; ++position) {
    if (position % kBlockSize == 0) {
      sequence.blocks.push_back(free_blocks.back());
      free_blocks.pop_back();
    }
    batch.slot_mapping.push_back(sequence.blocks.back() * kBlockSize + position % kBlockSize);
    append_random(sequence.keys, kKvRow, rng);
    append_random(sequence.values, kKvRow, rng);
  }
  batch.key.insert(batch.key.end(), sequence.keys.end() - count * kKvRow, sequence.keys.end());
  batch.value.insert(batch.value.end(), sequence.values.end() - count * kKvRow, sequence.values.end());
  append_random(batch.q, count * kQueryRow, rng);

  std::vector<std::int32_t> table = sequence.blocks;
  table.resize(kMaxBlocksPerSeq, -1);  // never read past the sequence's blocks
  batch.block_tables.insert(batch.block_tables.end(), table.begin(), table.end());
  batch.seq_lens.push_back(static_cast<std::int32_t>(sequence.length()));
  batch.query_start_loc.push_back(batch.query_start_loc.back() + static_cast<std::int32_t>(count));
}

// Writes the batch's keys and values into the cache and attends; both run on `device`.
std::vector<float> run_step(const Batch &batch, const pagedattn::PagedCache<float> &cache, pagedattn::Device device) {
  const Memory<float> q(batch.q, device), key(batch.key, device), value(batch.value, device);
  const Memory<std::int64_t> slot_mapping(batch.slot_mapping, device);
  const Memory<std::int32_t> block_tables(batch.block_tables, device), seq_lens(batch.seq_lens, device),
      query_start_loc(batch.query_start_loc, device);
  Memory<float> out(std::vector<float>(batch.q.size()), device);

  const auto num_tokens = static_cast<std::int64_t>(batch.slot_mapping.size());
  const auto num_seqs = static_cast<std::int64_t>(batch.seq_lens.size());
  using pagedattn::tensor;
  pagedattn::reshape_and_cache(tensor(key.data(), {num_tokens, kNumKvHeads, kHeadDim}, device),
                               tensor(value.data(), {num_tokens, kNumKvHeads, kHeadDim}, device), cache,
                               tensor(slot_mapping.data(), {num_tokens}, device));

  pagedattn::AttentionOptions options;
  options.query_start_loc = tensor(query_start_loc.data(), {num_seqs + 1}, device);
  pagedattn::paged_attention(tensor(q.data(), {num_tokens, kNumQueryHeads, kHeadDim}, device), cache,
                             tensor(block_tables.data(), {num_seqs, kMaxBlocksPerSeq}, device),
                             tensor(seq_lens.data(), {num_seqs}, device),
                             tensor(out.data(), {num_tokens, kNumQueryHeads, kHeadDim}, device), options);
  return out.to_host();
}

// Causal attention of one query row over contiguous keys and values, in double.
std::vector<double> attend_plainly(const float *q, const Sequence &sequence, std::int64_t head,
                                   std::int64_t num_visible) {
  const std::int64_t kv_head = head / (kNumQueryHeads / kNumKvHeads);
  std::vector<double> weights(static_cast<std::size_t>(num_visible)), out(static_cast<std::size_t>(kHeadDim), 0.0);
  for (std::int64_t j = 0; j < num_visible; ++j) {
    const float *k = &sequence.keys[static_cast<std::size_t>(j * kKvRow + kv_head * kHeadDim)];
    weights[static_cast<std::size_t>(j)] =
        std::inner_product(q, q + kHeadDim, k, 0.0, std::plus<>(), [](double a, double b) { return a * b; }) /
        std::sqrt(static_cast<double>(kHeadDim));
  }
  const double largest = *std::max_element(weights.begin(), weights.end());
  double sum = 0.0;
  for (double &w : weights) sum += w = std::exp(w - largest);
  for (std::int64_t j = 0; j < num_visible; ++j) {
    const float *v = &sequence.values[static_cast<std::size_t>(j * kKvRow + kv_head * kHeadDim)];
    for (std::int64_t d = 0; d < kHeadDim; ++d) {
      out[static_cast<std::size_t>(d)] += weights[static_cast<std::size_t>(j)] / sum * static_cast<double>(v[d]);
    }
  }
  return out;
}

// The largest error of any element of the step.
double largest_error(const Batch &batch, const std::vector<float> &out, const std::vector<Sequence> &sequences) {
  double largest = 0.0;
  for (std::size_t s = 0; s < sequences.size(); ++s) {
    const std::int64_t begin = batch.query_start_loc[s], end = batch.query_start_loc[s + 1];
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t num_visible = sequences[s].length() - (end - begin) + (row - begin) + 1;
      for (std::int64_t head = 0; head < kNumQueryHeads; ++head) {
        const auto at = static_cast<std::size_t>(row * kQueryRow + head * kHeadDim);
        const auto expected = attend_plainly(&batch.q[at], sequences[s], head, num_visible);
        for (std::size_t d = 0; d < expected.size(); ++d) {
          const double error = std::abs(static_cast<double>(out[at + d]) - expected[d]);
          if (std::isnan(error)) return error;
          largest = std::max(largest, error);
        }
      }
    }
  }
  return largest;
}

int run(pagedattn::Device device) {
  std::mt19937 rng(2024);
  // NaN everywhere: slots that no token has been written to must not reach a result.
  const std::vector<float> poison(pagedattn::PagedCache<float>::size(kNumBlocks, kBlockSize, kNumKvHeads, kHeadDim),
                                  std::nanf(""));
  Memory<float> k_memory(poison, device), v_memory(poison, device);
  const pagedattn::PagedCache<float> cache{
      pagedattn::tensor(k_memory.data(), {kNumBlocks, kBlockSize, kNumKvHeads, kHeadDim}, device),
      pagedattn::tensor(v_memory.data(), {kNumBlocks, kBlockSize, kNumKvHeads, kHeadDim}, device)};
  std::vector<std::int32_t> free_blocks(static_cast<std::size_t>(kNumBlocks));
  std::iota(free_blocks.begin(), free_blocks.end(), 0);
  std::shuffle(free_blocks.begin(), free_blocks.end(), rng);

  std::vector<Sequence> sequences(3);
  const std::int64_t prompt_lengths[] = {5, 32, 77};
  for (int step = 0; step < 20; ++step) {
    Batch batch;
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      append_tokens(sequences[s], step == 0 ? prompt_lengths[s] : 1, free_blocks, batch, rng);
    }
    const std::vector<float> out = run_step(batch, cache, device);
    const double error = largest_error(batch, out, sequences);
    if (!(error < 1e-4)) {
      std::fprintf(stderr, "step %d: the largest error is %g\n", step, error);
      return 1;
    }
  }
  std::printf("%s: 20 steps, 3 sequences, %zu of %lld blocks in use, kernel %s: all correct\n",
              device.type == PA_CUDA ? "cuda" : "cpu", static_cast<std::size_t>(kNumBlocks) - free_blocks.size(),
              static_cast<long long>(kNumBlocks), pa_last_kernel());
  return 0;
}

}  // namespace

int main(int argc, char **argv) {
  const std::string choice = argc > 1 ? argv[1] : "cpu";
  if (choice != "cpu" && choice != "cuda") {
    std::fprintf(stderr, "usage: paged_cache [cpu|cuda]\n");
    return 2;
  }
  try {
    return run(choice == "cuda" ? pagedattn::Device::cuda(0) : pagedattn::Device::cpu());
  } catch (const pagedattn::Error &error) {
    std::fprintf(stderr, "%s: %s\n", pa_status_name(error.status()), error.what());
  } catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return 1;
}
