// Work over the threads of XLA's CPU pool.

#ifndef RESILIENT_MOE_MODEL_NATIVE_THREADS_H_
#define RESILIENT_MOE_MODEL_NATIVE_THREADS_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace rmoe {

// Multiply-adds that are worth another thread, some 20 us of one. Less is done
// by the caller alone, as the pool's threads may all have work of their own
// (virtual devices, checkpoints) and waiting for one costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 20;

// Runs work(0), ..., work(n - 1), in all `cost` multiply-adds, on the caller and
// on who is free in the pool.
// Helpers that come late find nothing left and touch nothing but `State`: a
// pool whose threads all wait here, each for its own work, can't lock up.
template <typename Work>
void Parallel(xla::ffi::ThreadPool& pool, int64_t cost, int64_t n,
              const Work& work) {
  struct State {
    const Work* work;  // alive while a piece is not done
    const int64_t n;
    std::atomic<int64_t> next{0}, done{0};
    State(const Work* work, int64_t n) : work(work), n(n) {}
    void Run() {
      for (int64_t i; (i = next.fetch_add(1)) < n; done.fetch_add(1))
        (*work)(i);
    }
  };
  auto state = std::make_shared<State>(&work, n);
  const int64_t threads = std::min(n, cost / kWorthAThread);
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), threads) - 1;
  for (int64_t i = 0; i < helpers; ++i)
    pool.Schedule([state] { state->Run(); });
  state->Run();
  while (state->done.load() < n) std::this_thread::yield();
}

}  // namespace rmoe

#endif  // RESILIENT_MOE_MODEL_NATIVE_THREADS_H_
