// Every call of the block manager with memory that runs out at each of its allocations in turn: it throws and has
// changed nothing, and succeeds once there is memory.
//
// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <numeric>
#include <string>
#include <vector>

#include "blocks/snapshot.h"
#include "failing_new.h"

namespace {

using namespace pagedattn::blocks;

std::string bytes_of(const Manager &m) {
  const Snapshot snapshot = SnapshotWriter::write(m);
  std::string all;
  for (const FieldView &field : view_fields(snapshot)) {
    all.append(field.name).append(std::to_string(field.num_bytes));
    all.append(static_cast<const char *>(field.data), field.num_bytes);
  }
  return all;
}

[[noreturn]] void fail(const char *call, const std::string &what) {
  std::printf("%s: %s\n", call, what.c_str());
  std::exit(1);
}

// Lets the call's allocations fail one after the other, until it gets by without the next.
template <class Call>
void survive(const Manager &m, const char *name, Call call) {
  for (int64_t failing = 0;; ++failing) {
    const std::string before = bytes_of(m);
    bool failed = false;
    allocations_left = failing;
    try {
      call();
    } catch (const std::bad_alloc &) {
      failed = true;
    }
    allocations_left = -1;
    try {
      Check::run(m);
    } catch (const CorruptState &error) {
      fail(name, "without allocation " + std::to_string(failing) + ": " + error.what());
    }
    if (!failed) return;
    if (bytes_of(m) != before) fail(name, "without allocation " + std::to_string(failing) + " it failed half way");
  }
}

// A batch of one token a sequence, or of as many as are given.
class Batch {
 public:
  void step(Manager &m, const std::vector<int64_t> &ids, int64_t count) {
    const std::vector<int64_t> counts(ids.size(), count);
    StepRequest request;
    request.ids = ids.data();
    request.counts = counts.data();
    request.num_seqs = static_cast<int64_t>(ids.size());
    survive(m, "step", [&] { m.step(request, arrays_); });
  }

 private:
  static constexpr int64_t kSeqs = 256, kBlocks = 64, kTokens = 4096;
  std::vector<int32_t> tables_ = std::vector<int32_t>(kSeqs * kBlocks), lens_ = std::vector<int32_t>(kSeqs),
                       starts_ = std::vector<int32_t>(kSeqs + 1);
  std::vector<int64_t> slots_ = std::vector<int64_t>(kTokens), positions_ = slots_,
                       copies_ = std::vector<int64_t>(2 * kSeqs);
  StepArrays arrays_ = [this] {
    StepArrays arrays;
    arrays.block_tables = tables_.data();
    arrays.seq_lens = lens_.data();
    arrays.query_start_loc = starts_.data();
    arrays.slot_mapping = slots_.data();
    arrays.positions = positions_.data();
    arrays.copies = copies_.data();
    arrays.max_seqs = arrays.max_copies = kSeqs;
    arrays.max_blocks = kBlocks;
    arrays.max_tokens = kTokens;
    return arrays;
  }();
};

std::vector<int32_t> prompt(int32_t first, size_t size) {
  std::vector<int32_t> tokens(size);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

class Scenario {
 public:
  Scenario() : m_(config()) {}

  void play() {
    // Keys are too long to lie in a string itself, and are let go of and taken again.
    for (int32_t round = 0; round < 3; ++round) {
      std::vector<int64_t> ids;
      for (int32_t i = 0; i < 5; ++i) ids.push_back(add(prompt(7 * i, 21), round + i % 2));
      batch_.step(m_, ids, 3);
      batch_.step(m_, ids, 2);
      std::vector<int64_t> copies;
      survive(m_, "fork", [&] { copies = m_.fork(ids[0], 20); });
      append(ids);
      append(copies);
      batch_.step(m_, copies, 1);
      survive(m_, "reorder", [&] {
        const std::vector<int64_t> parents = {ids[1], ids[1], ids[3], ids[2]};
        m_.reorder(ids.data(), 4, parents.data());
      });
      survive(m_, "truncate", [&] { m_.truncate(ids[1], 2); });
      survive(m_, "preempt", [&] { m_.preempt(&ids[4], 1); });
      survive(m_, "take_prefix", [&] { m_.take_prefix(ids[4]); });
      survive(m_, "swap_out", [&] { m_.swap_out(ids.data(), 3); });
      survive(m_, "swap_in", [&] { m_.swap_in(ids.data(), 3); });
      int64_t pin = 0;
      survive(m_, "pin", [&] { pin = m_.pin(prompt(0, 8).data(), 8, key(round)); });
      survive(m_, "free", [&] { m_.free(copies.data(), static_cast<int64_t>(copies.size())); });
      survive(m_, "unpin", [&] { m_.unpin(&pin, 1); });
      survive(m_, "free", [&] { m_.free(ids.data(), static_cast<int64_t>(ids.size())); });
      if (round == 1) survive(m_, "reset_prefix_cache", [&] { m_.reset_prefix_cache(); });
    }
    for (int32_t i = 0; i < 40; ++i) add(prompt(i, 5), 100 + i);
    const std::vector<int64_t> all = m_.ids();
    survive(m_, "free", [&] { m_.free(all.data(), static_cast<int64_t>(all.size())); });
  }

 private:
  static Config config() {
    Config config;
    config.num_blocks = 160;
    config.block_size = 4;
    config.num_host_blocks = 64;
    config.key = key_from_seed(1);
    return config;
  }
  static std::string key(int32_t number) { return "a namespace with a long name " + std::to_string(number); }

  int64_t add(const std::vector<int32_t> &tokens, int32_t space) {
    const std::string extra_key = key(space);
    int64_t id = 0;
    survive(m_, "add", [&] { id = m_.add(tokens.data(), static_cast<int64_t>(tokens.size()), extra_key, 0); });
    return id;
  }
  void append(const std::vector<int64_t> &ids) {
    std::vector<int64_t> starts(ids.size() + 1);
    std::iota(starts.begin(), starts.end(), int64_t{0});
    const std::vector<int32_t> tokens = prompt(3, ids.size());
    survive(m_, "append",
            [&] { m_.append(ids.data(), static_cast<int64_t>(ids.size()), starts.data(), tokens.data()); });
  }

  Manager m_;
  Batch batch_;
};

}  // namespace

int main() {
  Scenario().play();
  std::puts("all hold");
  return 0;
}
