#include "token_mask.hpp"

#include <algorithm>
#include <atomic>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "simd.hpp"
#include "threads.hpp"

namespace maestro_fast {
namespace {

constexpr std::int64_t kElementsPerThread = 1 << 18;  // with fewer, another thread costs more than it saves

// Asks for the memory 16 KiB behind `begin`. Processors fetch ahead by themselves, but only up to the end of a page, and
// a row of a mask fills one or two pages.
MAESTRO_INLINE void fetch_ahead(const void* begin, std::size_t bytes) {
  const std::uintptr_t from = reinterpret_cast<std::uintptr_t>(begin) + (1 << 14);
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(from + i), 0, 2);
}

// What one pass over a row finds: the number of ones, the sum of their places, and a bit that is set by any other value
// than 0 and 1. The places of n ones sum to n (n - 1) / 2 only if these are the first n places.
struct Found {
  std::int64_t ones = 0, places = 0, other = 0;
};

template <class T>
MAESTRO_INLINE void look_at(const T* row, std::int64_t begin, std::int64_t end, Found& found) {
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t one = row[t] == T(1);
    found.ones += one;
    found.places += t & -one;
    found.other |= (row[t] != T(0)) ^ one;
  }
}

template <class T>
MAESTRO_INLINE Found look_at(const T* row, std::int64_t width) {
  constexpr std::int64_t kBlock = 64;
  Found found;
  std::int64_t t = 0;
  for (; t + kBlock <= width; t += kBlock) {
    fetch_ahead(row + t, kBlock * sizeof(T));
    look_at(row, t, t + kBlock, found);
  }
  look_at(row, t, width, found);
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

// Writes a value `count` times, and zeros up to `width`.
void write_row(float* to, float value, std::int64_t count, std::int64_t width) {
  std::fill_n(to, count, value);
  std::fill_n(to + count, width - count, 0.0f);
}

// The same by streaming stores, which pass the caches by, so that memory is written without being read first. `to` and
// `width` are multiples of four floats. No other store may touch the row: a line that is written both ways costs more
// than is saved.
#if defined(__SSE2__)
void stream_row(float* to, float value, std::int64_t count, std::int64_t width) {
  const __m128i places = _mm_set_epi32(3, 2, 1, 0);
  const __m128 values = _mm_set1_ps(value);
  const std::int64_t whole = count / 4 * 4;
  std::int64_t t = 0;
  for (; t < whole; t += 4) _mm_stream_ps(to + t, values);
  if (t < width) {
    const __m128i left = _mm_set1_epi32(static_cast<int>(count - whole));
    _mm_stream_ps(to + t, _mm_and_ps(values, _mm_castsi128_ps(_mm_cmplt_epi32(places, left))));
  }
  for (t += 4; t < width; t += 4) _mm_stream_ps(to + t, _mm_setzero_ps());
}
#else
void stream_row(float* to, float value, std::int64_t count, std::int64_t width) { write_row(to, value, count, width); }
#endif

template <class T>
void spread(const float* values, const T* mask, std::int64_t rows, std::int64_t width, const std::int64_t* count,
            const bool* prefix, float* out, bool streaming, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (std::int64_t r = 0; r < rows; ++r) {
      float* to = out + r * width;
      if (!prefix[r]) {
        spread_row(mask + r * width, values[r], width, to);
      } else if (streaming) {
        stream_row(to, values[r], count[r], width);
      } else {
        write_row(to, values[r], count[r], width);
      }
    }
#if defined(__SSE2__)
    _mm_sfence();  // Streaming stores may otherwise be seen after what follows.
#endif
  }
}

// Whether the allocator handed out memory that has been used before. If it was not, the system clears each page when it
// is first written, which leaves the page in the caches, and one interruption for each 4 KiB takes longer than
// everything else here; so the system is asked for large pages.
bool used_before([[maybe_unused]] float* begin, [[maybe_unused]] std::int64_t count) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{1} << 12, kLargePage = std::uintptr_t{1} << 21;
  const auto start = reinterpret_cast<std::uintptr_t>(begin), stop = reinterpret_cast<std::uintptr_t>(begin + count);
  unsigned char there = 0;
  const std::uintptr_t middle = (start + (stop - start) / 2) / kPage * kPage;
  if (mincore(reinterpret_cast<void*>(middle), 1, &there) == 0 && (there & 1)) return true;
  const std::uintptr_t first = (start + kLargePage - 1) / kLargePage * kLargePage, last = stop / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // It may be refused.
#endif
  return false;
}

MAESTRO_CLONES double sum_row(const float* row, std::int64_t width) {
  Double4 sums[4] = {};
  std::int64_t t = 0;
  for (; t + 16 <= width; t += 16) {
    fetch_ahead(row + t, 64);
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
  constexpr std::int64_t kLarge = 1 << 20;  // elements; what is smaller should stay in the caches
  const bool whole = width % 4 == 0 && reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
  const bool streaming = rows * width >= kLarge && used_before(out, rows * width) && whole;
  const int useful = useful_threads(threads, rows * width, kElementsPerThread);
  typed(mask, type, [&](const auto* m) { spread(values, m, rows, width, count, prefix, out, streaming, useful); });
}

void sum_over_tokens(const float* values, std::int64_t rows, std::int64_t width, float* out, int threads) {
  const int useful = useful_threads(threads, rows * width, kElementsPerThread);
#pragma omp parallel for schedule(static) num_threads(useful) if (useful > 1)
  for (std::int64_t r = 0; r < rows; ++r) out[r] = static_cast<float>(sum_row(values + r * width, width));
}

}  // namespace maestro_fast
