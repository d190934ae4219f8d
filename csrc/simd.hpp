// Four doubles at a time, in GCC's vector extension: one source that every instruction set is compiled from. All clones
// of a function give the same bits, because every operation is rounded by itself (no fused multiply-add, see
// CMakeLists.txt) and every sum has one order.
#pragma once

#include <cstdint>
#include <cstring>

// A function that is compiled for several instruction sets, and picked when the module is loaded. What it calls must be
// MAESTRO_INLINE, or it would be compiled for the lowest of them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MAESTRO_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MAESTRO_CLONES
#endif
#define MAESTRO_INLINE __attribute__((always_inline)) inline

namespace maestro_fast {

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));
typedef std::int64_t Mask4 __attribute__((vector_size(32)));

MAESTRO_INLINE Double4 splat(double x) { return Double4{x, x, x, x}; }

MAESTRO_INLINE Double4 load4(const float* from) {
  return Double4{from[0], from[1], from[2], from[3]};  // one instruction; __builtin_convertvector takes four
}

// The first `count` of four, 0 behind them.
MAESTRO_INLINE Double4 load4(const float* from, std::int64_t count) {
  if (count >= 4) return load4(from);
  return Double4{from[0], count > 1 ? from[1] : 0.0, count > 2 ? from[2] : 0.0, 0.0};
}

MAESTRO_INLINE Double4 load4(const double* from) {
  Double4 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

MAESTRO_INLINE void store4(double* to, Double4 x) { std::memcpy(to, &x, sizeof x); }

MAESTRO_INLINE void store4(float* to, Double4 x) {
  const Float4 narrow = __builtin_convertvector(x, Float4);
  std::memcpy(to, &narrow, sizeof narrow);
}

MAESTRO_INLINE void store4(float* to, Double4 x, std::int64_t count) {
  if (count >= 4) return store4(to, x);
  for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(x[i]);
}

MAESTRO_INLINE Double4 sqrt4(Double4 x) {
  for (int i = 0; i < 4; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
}

MAESTRO_INLINE Double4 max4(Double4 a, Double4 b) { return a > b ? a : b; }

MAESTRO_INLINE bool any(Mask4 x) { return (x[0] | x[1] | x[2] | x[3]) != 0; }

MAESTRO_INLINE double sum(Double4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

// The sums of four vectors, each in the order of sum() above.
MAESTRO_INLINE Double4 sums(Double4 a, Double4 b, Double4 c, Double4 d) {
  const Double4 ab = __builtin_shuffle(a, b, Mask4{0, 4, 2, 6}) + __builtin_shuffle(a, b, Mask4{1, 5, 3, 7});
  const Double4 cd = __builtin_shuffle(c, d, Mask4{0, 4, 2, 6}) + __builtin_shuffle(c, d, Mask4{1, 5, 3, 7});
  return __builtin_shuffle(ab, cd, Mask4{0, 1, 4, 5}) + __builtin_shuffle(ab, cd, Mask4{2, 3, 6, 7});
}

}  // namespace maestro_fast
