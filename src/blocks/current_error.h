// The C++ exception in flight, taken apart so that Cython can raise its Python counterpart.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "blocks/manager.h"

namespace pagedattn::blocks {

enum class ErrorKind { kOther, kInvalidArgument, kNotEnoughBlocks, kCorruptState, kOutOfMemory };

struct CurrentError {
  ErrorKind kind = ErrorKind::kOther;
  std::string message;
  int64_t needed = 0;
  int64_t free = 0;
};

inline CurrentError current_error() {
  try {
    throw;
  } catch (const NotEnoughBlocks &e) {
    return {ErrorKind::kNotEnoughBlocks, e.what(), e.needed, e.free};
  } catch (const InvalidArgument &e) {
    return {ErrorKind::kInvalidArgument, e.what()};
  } catch (const CorruptState &e) {
    return {ErrorKind::kCorruptState, e.what()};
  } catch (const std::bad_alloc &) {
    return {ErrorKind::kOutOfMemory, "BlockManager: the book-keeping does not fit into memory"};
  } catch (const std::exception &e) {
    return {ErrorKind::kOther, std::string("BlockManager: ") + e.what()};
  }
}

}  // namespace pagedattn::blocks
