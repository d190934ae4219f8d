// Four doubles or 16 floats at a time, in GCC's vector extension, so that one source is compiled for every instruction set. All
// clones of a function give the same bits, because every operation is rounded by itself (there is no fused
// multiply-add, see CMakeLists.txt) and every sum has one order.
#pragma once

#include <cstdint>
#include <cstring>

// Marks a function that is compiled for several instruction sets. The best one for the machine is chosen when the
// module is loaded. Functions that it calls must be MAESTRO_INLINE, or they would be compiled for the lowest
// instruction set.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MAESTRO_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define MAESTRO_CLONES
#endif
#define MAESTRO_INLINE __attribute__((always_inline)) inline

namespace maestro_fast {

typedef float Float4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));
typedef float Float8 __attribute__((vector_size(32)));
typedef std::uint16_t Half8 __attribute__((vector_size(16)));
typedef std::uint32_t Word8 __attribute__((vector_size(32)));
typedef std::int64_t Mask4 __attribute__((vector_size(32)));
typedef float Float16 __attribute__((vector_size(64)));  // 16 numbers of 32 bits
typedef std::int32_t Mask16 __attribute__((vector_size(64)));

MAESTRO_INLINE Double4 splat(double x) { return Double4{x, x, x, x}; }

MAESTRO_INLINE Double4 load4(const float* from) {
  return Double4{from[0], from[1], from[2], from[3]};  // one instruction; __builtin_convertvector takes four
}

// Loads the first `count` of four numbers, followed by zeros.
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

// x, or 0 where it is below 0. A NaN stays one.
MAESTRO_INLINE Double4 not_below_0(Double4 x) { return x < 0.0 ? splat(0.0) : x; }

MAESTRO_INLINE bool any(Mask4 x) { return (x[0] | x[1] | x[2] | x[3]) != 0; }

MAESTRO_INLINE double sum(Double4 x) { return (x[0] + x[1]) + (x[2] + x[3]); }

// The sums of four vectors, each in the order of sum() above.
MAESTRO_INLINE Double4 sums(Double4 a, Double4 b, Double4 c, Double4 d) {
  const Double4 ab = __builtin_shuffle(a, b, Mask4{0, 4, 2, 6}) + __builtin_shuffle(a, b, Mask4{1, 5, 3, 7});
  const Double4 cd = __builtin_shuffle(c, d, Mask4{0, 4, 2, 6}) + __builtin_shuffle(c, d, Mask4{1, 5, 3, 7});
  return __builtin_shuffle(ab, cd, Mask4{0, 1, 4, 5}) + __builtin_shuffle(ab, cd, Mask4{2, 3, 6, 7});
}

MAESTRO_INLINE Float8 load8(const float* from) {
  Float8 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

MAESTRO_INLINE void store8(float* to, Float8 x) { std::memcpy(to, &x, sizeof x); }

MAESTRO_INLINE double sum(Float8 x) {
  return sum(Double4{x[0], x[1], x[2], x[3]}) + sum(Double4{x[4], x[5], x[6], x[7]});
}

// e^x for x <= 0 with a relative error of 1e-12, and 0 below -700. The C library's result differs between machines.
MAESTRO_INLINE Double4 exp4(Double4 x) {
  const Double4 whole = splat(6755399441055744.0);  // 1.5 * 2^52: adding it rounds to an integer, in the low bits
  const Mask4 gone = x < -700.0;
  x = gone ? splat(0.0) : x;
  const Double4 shifted = x * 1.4426950408889634 + whole;
  const Double4 n = shifted - whole;
  const Double4 r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;  // ln 2 in two parts
  Double4 p = splat(1.0 / 3628800);
  for (const double c : {1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0}) {
    p = p * r + c;
  }
  const Mask4 scaled = (Mask4)p + ((Mask4)shifted << 52);
  return gone ? splat(0.0) : (Double4)scaled;
}

MAESTRO_INLINE Float16 load16(const float* from) {
  Float16 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

MAESTRO_INLINE void store16(float* to, Float16 x) { std::memcpy(to, &x, sizeof x); }

MAESTRO_INLINE Float16 splat16(float x) { return Float16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

MAESTRO_INLINE Float16 max16(Float16 a, Float16 b) { return a > b ? a : b; }

MAESTRO_INLINE double sum(Float16 x) {
  return sum(Float8{x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]}) +
         sum(Float8{x[8], x[9], x[10], x[11], x[12], x[13], x[14], x[15]});
}

// e^x for x <= 0 with a relative error of 1e-7, and 0 below -87. A NaN stays one.
MAESTRO_INLINE Float16 exp16(Float16 x) {
  const float whole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  const Mask16 gone = x < -87.0f;
  const Float16 held = gone ? splat16(0.0f) : x;
  const Float16 shifted = held * 1.44269504f + whole;
  const Float16 n = shifted - whole;
  const Float16 r = (held - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; n times the first is exact
  Float16 p = splat16(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  const Mask16 scaled = (Mask16)p + ((Mask16)shifted << 23);
  return gone ? splat16(0.0f) : (x == x ? (Float16)scaled : x);
}

// tanh x with a relative error of 2e-7; the polynomial near 0 is that of kernels/head_rows.py.
MAESTRO_INLINE Float16 tanh16(Float16 x) {
  const Float16 square = x * x, size = x < 0.0f ? -x : x;
  Float16 slope = -0.00623556f * square + 0.02103968f;
  slope = slope * square - 0.05384271f;
  slope = slope * square + 0.13332461f;
  slope = slope * square - 0.33333311f;
  const Float16 small = exp16(-2.0f * size), far = 1.0f - 2.0f * small / (1.0f + small);
  return size < 0.55f ? x * (slope * square + 1.0f) : (x < 0.0f ? -far : far);
}

// ln x for normal positive x with an error of 1e-12, and -inf for 0.
MAESTRO_INLINE Double4 log4(Double4 x) {
  const Mask4 bits = (Mask4)x;
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)). Adding the difference of the bits of 1 and sqrt(1/2) carries into the
  // exponent where the mantissa belongs to the next power of two.
  const Mask4 e = ((bits + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD)) >> 52) - 1023;
  const Double4 exponent = (Double4)(e + 0x4338000000000000) - 6755399441055744.0;  // as in exp4, the other way round
  const Double4 m = (Double4)(bits - (e << 52)), s = (m - 1.0) / (m + 1.0), q = s * s;
  Double4 p = splat(2.0 / 17);
  for (const double c : {2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3, 2.0}) p = p * q + c;
  const Double4 result = p * s + exponent * 0.69314718055994530942;
  return x > 0.0 ? result : splat(-__builtin_inf());
}

}  // namespace maestro_fast
