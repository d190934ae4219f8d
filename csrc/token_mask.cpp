#include "token_mask.hpp"

#include <algorithm>
#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.hpp"
#include "threads.hpp"

namespace maestro_fast {
namespace {

constexpr std::int64_t kElementsPerThread = 1 << 18;  // with fewer, another thread costs more than it saves

// What one pass over a row finds: the number of ones, the sum of their places, and a bit that is set by any other value
// than 0 and 1. The places of n ones sum to n (n - 1) / 2 only if these are the first n places.
struct Found {
  std::int64_t ones = 0, places = 0, other = 0;
};

template <class T>
MAESTRO_INLINE Found look_at(const T* row, std::int64_t width) {
  Found found;
  for (std::int64_t t = 0; t < width; ++t) {
    const std::int64_t one = row[t] == T(1);
    found.ones += one;
    found.places += t & -one;
    found.other |= (row[t] != T(0)) ^ one;
  }
  return found;
}

MAESTRO_CLONES Found look(const std::int64_t* row, std::int64_t width) { return look_at(row, width); }
MAESTRO_CLONES Found look(const std::int32_t* row, std::int64_t width) { return look_at(row, width); }
MAESTRO_CLONES Found look(const std::uint8_t* row, std::int64_t width) { return look_at(row, width); }
MAESTRO_CLONES Found look(const float* row, std::int64_t width) { return look_at(row, width); }

template <class T>
bool examine(const T* mask, std::int64_t rows, std::int64_t width, std::int64_t* count, bool* prefix, int threads) {
  std::atomic<bool> plain{true};
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t r = 0; r < rows; ++r) {
    const Found found = look(mask + r * width, width);
    count[r] = found.ones;
    prefix[r] = found.places == found.ones * (found.ones - 1) / 2;
    if (found.other) plain = false;
  }
  return plain;
}

template <class T>
MAESTRO_INLINE void spread_row(const T* row, float value, std::int64_t width, float* out) {
  for (std::int64_t t = 0; t < width; ++t) out[t] = row[t] == T(1) ? value : 0.0f;
}

template <class T>
void spread(const float* values, const T* mask, std::int64_t rows, std::int64_t width, const std::int64_t* count,
            const bool* prefix, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t r = 0; r < rows; ++r) {
    float* to = out + r * width;
    if (prefix[r]) {
      std::fill_n(to, count[r], values[r]);
      std::fill_n(to + count[r], width - count[r], 0.0f);
    } else {
      spread_row(mask + r * width, values[r], width, to);
    }
  }
}

// Asks the system for large pages behind memory that is about to be written for the first time. One fault for each
// 4 KiB takes longer than everything else here.
void ask_for_large_pages([[maybe_unused]] float* begin, [[maybe_unused]] std::int64_t count) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 21;
  const auto first = (reinterpret_cast<std::uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const auto last = reinterpret_cast<std::uintptr_t>(begin + count) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // It may be refused.
#endif
}

MAESTRO_CLONES double sum_row(const float* row, std::int64_t width) {
  Double4 sums[4] = {};
  std::int64_t t = 0;
  for (; t + 16 <= width; t += 16) {
    for (int j = 0; j < 4; ++j) sums[j] += load4(row + t + 4 * j);
  }
  double rest = 0.0;
  for (; t < width; ++t) rest += row[t];
  const Double4 all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  return ((all[0] + all[1]) + (all[2] + all[3])) + rest;
}

// Calls f with the mask as a pointer to its elements.
template <class F>
auto typed(const void* mask, MaskType type, const F& f) {
  switch (type) {
    case MaskType::int64: return f(static_cast<const std::int64_t*>(mask));
    case MaskType::int32: return f(static_cast<const std::int32_t*>(mask));
    case MaskType::float32: return f(static_cast<const float*>(mask));
    default: return f(static_cast<const std::uint8_t*>(mask));
  }
}

}  // namespace

bool examine_mask(const void* mask, MaskType type, std::int64_t rows, std::int64_t width, std::int64_t* count,
                  bool* prefix, int threads) {
  const int useful = useful_threads(threads, rows * width, kElementsPerThread);
  return typed(mask, type, [&](const auto* m) { return examine(m, rows, width, count, prefix, useful); });
}

void spread_over_tokens(const float* values, const void* mask, MaskType type, std::int64_t rows, std::int64_t width,
                        const std::int64_t* count, const bool* prefix, float* out, int threads) {
  ask_for_large_pages(out, rows * width);
  const int useful = useful_threads(threads, rows * width, kElementsPerThread);
  typed(mask, type, [&](const auto* m) { spread(values, m, rows, width, count, prefix, out, useful); });
}

void sum_over_tokens(const float* values, std::int64_t rows, std::int64_t width, float* out, int threads) {
  const int useful = useful_threads(threads, rows * width, kElementsPerThread);
#pragma omp parallel for schedule(static) num_threads(useful) if (useful > 1)
  for (std::int64_t r = 0; r < rows; ++r) out[r] = static_cast<float>(sum_row(values + r * width, width));
}

}  // namespace maestro_fast
