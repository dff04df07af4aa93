// A timetable for a warp that is to use a shared resource as fast as that goes, without filling the queues before it.
//
// SPDX-License-Identifier: Apache-2.0
//
// Nothing says how fast the resource is, or that a queue is filling; but once it is full, the warp is made to wait.  So
// steps keep an interval.  A warp that falls behind makes it longer by an eighth, which lets the queue run empty, and
// waits some steps for that to show; each step that it keeps to makes it shorter by a little.
#pragma once

#include <cstdint>

namespace pagedattn::cuda {

// All lanes of a warp take part in each call.
class Timetable {
 public:
  __device__ explicit Timetable(uint32_t first_interval) : interval_(first_interval), due_(now()) {}

  // Until the next step may begin.  With a `least` interval, being late now and then is no sign of a full queue.
  __device__ void wait(uint32_t least) {
    const uint32_t interval = max(interval_, least);
    uint32_t time = now();
    const auto late = static_cast<int32_t>(time - due_);  // right where clocks wrap around, too
    while (static_cast<int32_t>(time - due_) < 0) time = now();
    if (settling_ > 0) --settling_;
    if (late > static_cast<int32_t>(interval / 2)) {
      due_ = time;
      if (patience_ > 0) --patience_;
      if (settling_ == 0 && (least == 0 || patience_ == 0)) {
        interval_ = interval + interval / 8;
        settling_ = kStepsToSettle;
      }
    } else {
      patience_ = kPatience;
      if (interval_ > least) interval_ -= interval_ / 512;
    }
    due_ += max(interval_, least);
  }

  // The next step is due now, and nobody was late.
  __device__ void begin_again() { due_ = now(); }

 private:
  static constexpr int kStepsToSettle = 8;
  static constexpr int kPatience = 16;  // steps

  // Cycles of the multiprocessor.
  __device__ static uint32_t now() { return __shfl_sync(0xffffffffu, static_cast<uint32_t>(clock()), 0); }

  uint32_t interval_;
  uint32_t due_;
  int settling_ = 0;
  int patience_ = kPatience;
};

}  // namespace pagedattn::cuda
