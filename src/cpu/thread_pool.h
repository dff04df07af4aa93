// A small pool of threads for loops over independent tasks.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace pagedattn::cpu {

// A borrowed callable `void(int64_t task, int worker)`.
class TaskFunction {
 public:
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, TaskFunction>)
  TaskFunction(F &&f)  // NOLINT(google-explicit-constructor): a reference in all but name
      : object_(const_cast<void *>(static_cast<const void *>(std::addressof(f)))),
        call_([](void *object, int64_t task, int worker) {
          (*static_cast<std::remove_reference_t<F> *>(object))(task, worker);
        }) {}
  void operator()(int64_t task, int worker) const { call_(object_, task, worker); }

 private:
  void *object_;
  void (*call_)(void *, int64_t, int);
};

// Calls fn(task, worker) once for each task in [0, num_tasks), on the calling thread (worker 0) and up to num_threads()
// - 1 others, and returns when all are done.  Each thread begins with a share of successive tasks, the same whenever as
// many tasks are run, and then takes those that others have not come to; tasks that run at the same time have different
// workers.  The first exception of a task is thrown here, after which no
// further task starts.  Calls from several threads take turns; a call from inside a task runs on its own thread alone.
void parallel_for(int64_t num_tasks, TaskFunction fn);

// Work (in bytes touched, or as much computing) below which waking threads costs more than it saves.
constexpr int64_t kMinParallelWork = 128 * 1024;

}  // namespace pagedattn::cpu
