#include "threads.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace maestro_fast {
namespace {

std::atomic<bool> forked{false};

// The handler is registered when the module is loaded, before any thread of ours can exist.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int useful_threads(int wanted, std::int64_t work, std::int64_t grain) {
  if (wanted <= 1 || forked) return 1;
  return static_cast<int>(std::clamp<std::int64_t>(work / grain, 1, wanted));
}

}  // namespace maestro_fast
