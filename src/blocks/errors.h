// What the block manager throws.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pagedattn::blocks {

struct InvalidArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct NotEnoughBlocks : std::runtime_error {
  NotEnoughBlocks(const std::string &message, int64_t needed_blocks, int64_t free_blocks)
      : std::runtime_error(message), needed(needed_blocks), free(free_blocks) {}
  int64_t needed;
  int64_t free;
};

// A broken invariant: a bug of the block manager, or memory overwritten by something else.
struct CorruptState : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// "BlockManager.step: `seqs` must "
inline std::string must(const char *call, const char *argument) {
  return std::string("BlockManager.") + call + ": `" + argument + "` must ";
}

}  // namespace pagedattn::blocks
