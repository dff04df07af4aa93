// A mutex that a fork finds unlocked: the fork waits until nobody holds any of these.
//
// A child has the forking thread only. A mutex that another thread held would stay locked there for ever, and what it
// guards would be half changed. So a fork takes all of them first, and parent and child give them back. That cannot
// hang, as nobody who holds one waits for anything, Python's lock included; and locking costs what it did.
//
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pthread.h>

#include <mutex>

namespace pagedattn::blocks {

class ForkMutex {
 public:
  ForkMutex() {
    const std::lock_guard lock(list_mutex_);
    next_ = first_;
    if (next_ != nullptr) next_->before_ = this;
    first_ = this;
  }
  ~ForkMutex() {
    const std::lock_guard lock(list_mutex_);
    (before_ == nullptr ? first_ : before_->next_) = next_;
    if (next_ != nullptr) next_->before_ = before_;
  }
  ForkMutex(const ForkMutex &) = delete;
  ForkMutex &operator=(const ForkMutex &) = delete;

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static void lock_all() {
    list_mutex_.lock();
    for (ForkMutex *each = first_; each != nullptr; each = each->next_) each->lock();
  }
  static void unlock_all() {
    for (ForkMutex *each = first_; each != nullptr; each = each->next_) each->unlock();
    list_mutex_.unlock();
  }

  // All that there are. Neither has a destructor that does anything: a mutex may outlive static storage.
  static inline std::mutex list_mutex_;
  static inline ForkMutex *first_ = nullptr;
  // When the library is loaded: a fork in the middle of a first use would find it half done.
  static inline const int registered_ = pthread_atfork(lock_all, unlock_all, unlock_all);

  std::mutex mutex_;
  ForkMutex *before_ = nullptr;
  ForkMutex *next_ = nullptr;
};

}  // namespace pagedattn::blocks
