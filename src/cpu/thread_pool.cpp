// The thread pool.
//
// SPDX-License-Identifier: Apache-2.0
//
// One job at a time is open.  Its state is a single 64-bit word: the job's number, whether it is open, and how many
// workers are inside.  A worker joins by raising the count while the job is open, so one that wakes too late simply
// misses it, and the caller, which works too, waits only for workers that joined.  Idle workers watch the word for a
// while, because decode steps follow each other closely, and then sleep on a condition variable.
//
// Each thread has a share of the tasks, the same whenever a job is repeated, so that it finds in its core's caches what
// it left there.  Who is done with its own takes from the others'.
//
// A virtual machine's system takes its idle processors for busy ones.  It wakes a thread on its waker's CPU, and leaves
// both there for many milliseconds.  So a sleeping worker is kept from the CPU of a caller that wakes it, and a caller
// sleeps, to be woken by a worker, only where that is much longer at work.
//
// fork: a child has none of the threads, so it forgets the pool (without touching its locks, which a thread that the
// child lacks may hold) and builds its own at the first use.
#include "cpu/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/backend.h"
#include "status.h"

namespace pagedattn::cpu {
namespace {

// How long an idle thread watches for work, and then stays awake but gives way to others, before it sleeps.
constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr auto kYieldTime = std::chrono::milliseconds(2);

constexpr uint64_t kCount = 0x7fffffffu;
constexpr uint64_t kOpen = 0x80000000u;
constexpr int kNumberShift = 32;

thread_local bool inside_task = false;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Watches until `done()` holds or the time is up; returns what done() last said.
template <class Done>
bool spin_until(Done done) {
  const auto limit = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 64; ++i) {
      if (done()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < limit);
  return done();
}
template <class Done>
bool yield_until(Done done) {
  const auto limit = std::chrono::steady_clock::now() + kYieldTime;
  do {
    if (done()) return true;
    sched_yield();
  } while (std::chrono::steady_clock::now() < limit);
  return done();
}

template <class Done>
bool awake_until(Done done) {
  return spin_until(done) || yield_until(done);
}

// Which CPUs a worker may use.
class Whereabouts {
 public:
  // Of the worker, before it first sleeps.
  void begin() { thread_ = static_cast<pid_t>(syscall(SYS_gettid)); }

  // Of who wakes it, while it sleeps.
  void keep_from(int cpu) {
    // Fails on a machine of more CPUs than fit, which is left to its system.
    if (!kept_ && sched_getaffinity(thread_, sizeof allowed_, &allowed_) != 0) return;
    if (cpu < 0 || cpu >= CPU_SETSIZE || !CPU_ISSET(cpu, &allowed_) || CPU_COUNT(&allowed_) == 1) return;
    cpu_set_t others = allowed_;
    CPU_CLR(cpu, &others);
    kept_ = sched_setaffinity(thread_, sizeof others, &others) == 0 || kept_;
  }

  // Of the worker, when it is awake: it stays where it is, until it has a reason to go.
  void release() {
    if (kept_) sched_setaffinity(0, sizeof allowed_, &allowed_);
    kept_ = false;
  }

 private:
  pid_t thread_ = 0;
  cpu_set_t allowed_;
  bool kept_ = false;
};

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads)
      : num_threads_(num_threads), shares_(std::make_unique<Share[]>(static_cast<size_t>(num_threads))) {
    workers_.reserve(static_cast<size_t>(num_threads - 1));
    try {
      for (int number = 1; number < num_threads; ++number) {
        workers_.push_back(std::make_unique<Worker>());
        Worker &worker = *workers_.back();
        worker.thread = std::thread([this, number, &worker] { work(number, worker); });
      }
    } catch (const std::exception &) {
      // The system gives no more threads, or no memory for them: the work gets done with those there are.
      if (!workers_.empty() && !workers_.back()->thread.joinable()) workers_.pop_back();
    }
  }
  ~ThreadPool() {
    stopping_.store(true);
    {
      const std::lock_guard lock(mutex_);
    }
    wake_workers_.notify_all();
    for (const auto &worker : workers_) worker->thread.join();
  }
  ThreadPool(const ThreadPool &) = delete;
  ThreadPool &operator=(const ThreadPool &) = delete;

  int num_threads() const { return num_threads_; }

  // The caller must be the only one.
  void run(int64_t num_tasks, const TaskFunction &fn) {
    fn_ = &fn;
    num_tasks_ = num_tasks;
    deal_tasks();
    error_ = nullptr;
    const uint64_t number = (state_.load(std::memory_order_relaxed) >> kNumberShift) + 1;
    state_.store((number << kNumberShift) | kOpen);
    if (const int asleep = num_asleep_.load(); asleep > 0) {
      // Taking the lock orders this after the check of a worker that is about to sleep.
      {
        const std::lock_guard lock(mutex_);
        const int cpu = sched_getcpu();
        for (const auto &worker : workers_) {
          if (worker->asleep) worker->whereabouts.keep_from(cpu);
        }
      }
      if (num_tasks > asleep) {
        wake_workers_.notify_all();
      } else {
        for (int64_t i = 1; i < num_tasks; ++i) wake_workers_.notify_one();
      }
    }
    run_tasks(0);
    state_.fetch_and(~kOpen);
    const auto all_left = [this] { return (state_.load() & kCount) == 0; };
    if (!awake_until(all_left)) {
      std::unique_lock lock(mutex_);
      wake_caller_.wait(lock, all_left);
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  struct Worker {
    std::thread thread;
    bool asleep = false;  // under the lock
    Whereabouts whereabouts;
  };

  // A thread's part of the tasks, in order; others take from it too when they have nothing left.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void deal_tasks() {
    const int64_t each = num_tasks_ / num_threads_, more = num_tasks_ % num_threads_;
    int64_t begin = 0;
    for (int64_t i = 0; i < num_threads_; ++i) {
      shares_[i].next.store(begin, std::memory_order_relaxed);
      begin += each + (i < more ? 1 : 0);
      shares_[i].end = begin;
    }
  }

  void run_tasks(int worker) {
    inside_task = true;
    for (int i = 0; i < num_threads_; ++i) {
      run_share(shares_[(worker + i) % num_threads_], worker);
    }
    inside_task = false;
  }

  void run_share(Share &share, int worker) {
    while (share.next.load(std::memory_order_relaxed) < share.end) {
      const int64_t task = share.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= share.end) return;
      try {
        (*fn_)(task, worker);
      } catch (...) {
        for (int i = 0; i < num_threads_; ++i) shares_[i].next.store(shares_[i].end, std::memory_order_relaxed);
        const std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
  }

  void work(int number, Worker &worker) {
    worker.whereabouts.begin();
    uint64_t last_number = 0;
    const auto something_new = [&] {
      const uint64_t state = state_.load();
      return stopping_.load() || ((state & kOpen) != 0 && (state >> kNumberShift) != last_number);
    };
    for (;;) {
      worker.whereabouts.release();
      if (!awake_until(something_new)) {
        std::unique_lock lock(mutex_);
        num_asleep_.fetch_add(1);
        worker.asleep = true;
        wake_workers_.wait(lock, [&] {
          if (something_new()) return true;
          worker.whereabouts.release();  // woken too late: it sleeps on
          return false;
        });
        worker.asleep = false;
        num_asleep_.fetch_sub(1);
      }
      if (stopping_.load()) return;
      uint64_t state = state_.load();
      while ((state & kOpen) != 0 && !state_.compare_exchange_weak(state, state + 1)) {
      }
      if ((state & kOpen) == 0) continue;
      last_number = state >> kNumberShift;
      run_tasks(number);
      const uint64_t before = state_.fetch_sub(1);
      if ((before & kOpen) == 0 && (before & kCount) == 1) {
        // The last one out; the caller may sleep.
        {
          const std::lock_guard lock(mutex_);
        }
        wake_caller_.notify_one();
      }
    }
  }

  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int> num_asleep_{0};
  std::atomic<bool> stopping_{false};
  const int num_threads_;  // as asked for
  const TaskFunction *fn_ = nullptr;
  int64_t num_tasks_ = 0;
  std::unique_ptr<Share[]> shares_;
  std::exception_ptr error_;
  std::mutex mutex_;
  std::condition_variable wake_workers_;
  std::condition_variable wake_caller_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

// The pool and the lock of whoever runs a job on it or replaces it.  On the heap, so that a forked child can leave them
// behind as they are.
struct Shared {
  std::mutex mutex;
  std::unique_ptr<ThreadPool> pool;
  Shared *left_behind = nullptr;  // what was left before this
};

std::atomic<Shared *> shared_state{nullptr};
Shared *left_behind = nullptr;           // reachable still, so that leak checkers see no leak
std::atomic<int> configured_threads{0};  // 0: not decided yet

void forget_pool_after_fork() {
  if (Shared *const last = shared_state.exchange(nullptr)) {
    last->left_behind = left_behind;
    left_behind = last;
  }
  inside_task = false;
}

Shared &shared() {
  Shared *current = shared_state.load();
  if (current != nullptr) return *current;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_after_fork);
  (void)registered;  // it fails for want of memory alone
  auto fresh = std::make_unique<Shared>();
  if (shared_state.compare_exchange_strong(current, fresh.get())) return *fresh.release();
  return *current;
}

// Ends the threads when the library is unloaded or the process exits.
struct Cleanup {
  ~Cleanup() {
    Shared *const last = shared_state.load();
    if (last == nullptr) return;
    // Another thread may still compute (a daemon thread at exit): then everything is left as it is.
    const std::unique_lock lock(last->mutex, std::try_to_lock);
    if (lock.owns_lock()) last->pool.reset();
  }
} cleanup;

int affinity_count() {
  // A set for more processors than cpu_set_t holds, on machines that large.
  for (int capacity = CPU_SETSIZE; capacity <= (1 << 20); capacity *= 4) {
    cpu_set_t *set = CPU_ALLOC(static_cast<size_t>(capacity));
    if (set == nullptr) break;
    const size_t size = CPU_ALLOC_SIZE(static_cast<size_t>(capacity));
    const int result = sched_getaffinity(0, size, set);
    const int error = errno;
    const int count = result == 0 ? CPU_COUNT_S(size, set) : 0;
    CPU_FREE(set);
    if (result == 0) return std::max(count, 1);
    if (error != EINVAL) break;
  }
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

constexpr long kMaxThreads = 4096;

// The value of a variable as a count, or 0.  OMP_NUM_THREADS may list one count a nesting level: the first counts.
int count_from_environment(const char *name, bool list_allowed) {
  const char *text = std::getenv(name);
  if (text == nullptr) return 0;
  char *end = nullptr;
  const long value = std::strtol(text, &end, 10);
  const bool ends_well = *end == '\0' || (list_allowed && *end == ',');
  return end != text && ends_well && value >= 1 && value <= kMaxThreads ? static_cast<int>(value) : 0;
}

void check_environment() {
  const char *text = std::getenv("PAGEDATTN_NUM_THREADS");
  if (text == nullptr || *text == '\0' || count_from_environment("PAGEDATTN_NUM_THREADS", false) != 0) return;
  throw_invalid("`PAGEDATTN_NUM_THREADS` must be a number of threads, 1 to " + std::to_string(kMaxThreads) + "; got `" +
                std::string(text) + "`");
}

int default_threads() {
  check_environment();
  if (const int count = count_from_environment("PAGEDATTN_NUM_THREADS", false)) return count;
  if (const int count = count_from_environment("OMP_NUM_THREADS", true)) return count;
  return affinity_count();
}

}  // namespace

int num_threads() {
  int count = configured_threads.load();
  if (count == 0) {
    const int initial = default_threads();
    count = configured_threads.compare_exchange_strong(count, initial) ? initial : count;
  }
  return count;
}

void set_num_threads(int n) {
  // The pool changes its size when it is next used.
  configured_threads.store(static_cast<int>(std::min<long>(n, kMaxThreads)));
}

void parallel_for(int64_t num_tasks, TaskFunction fn) {
  if (num_tasks <= 0) return;
  const int wanted = num_threads();
  if (inside_task || wanted == 1 || num_tasks == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) fn(task, 0);
    return;
  }
  Shared &state = shared();
  const std::lock_guard lock(state.mutex);
  if (state.pool == nullptr || state.pool->num_threads() != wanted) {
    state.pool.reset();
    state.pool = std::make_unique<ThreadPool>(wanted);
  }
  state.pool->run(num_tasks, fn);
}

}  // namespace pagedattn::cpu
