#include "conductor_weights.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.hpp"
#include "threads.hpp"

namespace maestro_fast {
namespace {

// The first word of Philox4x32-10 (Salmon et al., SC 2011), as a multiple of 2^-24 in [0, 1).
MAESTRO_INLINE float uniform(std::uint64_t seed, std::uint32_t step, std::uint64_t index) {
  std::uint32_t c0 = static_cast<std::uint32_t>(index), c1 = static_cast<std::uint32_t>(index >> 32), c2 = step, c3 = 0;
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * c0, b = std::uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<std::uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(b);
    c2 = static_cast<std::uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return static_cast<float>(c0 >> 8) * 0x1p-24f;
}

constexpr std::int64_t kProductsPerThread = 1 << 21;
constexpr std::int64_t kLanes = 8;  // lanes of a Float8
constexpr std::int64_t kWide = 4;   // actions whose logits are formed together
constexpr std::int64_t kSlice = 512, kBlock = 16;  // channels of a slice, rows of a block

std::int64_t rounded_up(std::int64_t count, std::int64_t to) { return (count + to - 1) / to * to; }

// weight * rstd as [slices, K rounded up, kSlice], with zeros in the padding. Numbers that are read together are stored
// together; a power of two apart they would compete for the same lines of the cache. The mean is not folded into the
// bias, because float32 would cancel where a channel's mean is far larger than its spread, as in the massive channels
// of language models.
std::vector<float> folded(const ConductorHead& head) {
  const std::int64_t width = rounded_up(head.actions, kWide);
  std::vector<float> weight(static_cast<std::size_t>(width * rounded_up(head.size, kSlice)), 0.0f);
  for (std::int64_t first = 0; first < head.size; first += kSlice) {
    const std::int64_t count = std::min(kSlice, head.size - first);
    for (std::int64_t k = 0; k < head.actions; ++k) {
      float* to = weight.data() + first * width + k * kSlice;
      const float* from = head.weight + k * head.size + first;
      for (std::int64_t i = 0; i < count; ++i) to[i] = head.rstd == nullptr ? from[i] : from[i] * head.rstd[first + i];
    }
  }
  return weight;
}

struct Problem {
  const void* h;
  bool bfloat16;
  const ConductorHead& head;
  const float* weight;  // as folded() makes it
};

// Loads eight channels of h from element `at` on, widened. A bfloat16 is the upper half of a float32.
template <bool kHalf>
MAESTRO_INLINE Float8 widened8(const void* h, std::int64_t at) {
  if (!kHalf) return load8(static_cast<const float*>(h) + at);
  Half8 half;
  std::memcpy(&half, static_cast<const std::uint16_t*>(h) + at, sizeof half);
  return (Float8)(__builtin_convertvector(half, Word8) << 16);
}

// Does the same where fewer than eight channels are left, and fills up with zeros.
template <bool kHalf>
MAESTRO_INLINE Float8 widened8(const void* h, std::int64_t at, std::int64_t count) {
  Float8 x{};
  for (std::int64_t i = 0; i < count; ++i) {
    if (kHalf) {
      const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(h)[at + i]} << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      x[i] = value;
    } else {
      x[i] = static_cast<const float*>(h)[at + i];
    }
  }
  return x;
}

// The channels first to first + count - 1 of the rows from `row` on. The next slice begins at element `ahead` of h.
struct Slice {
  std::int64_t row, first, count, ahead;
};

// Adds a slice of kRows rows to the products `total` [kRows, width] with four actions, whose rows of `weight` are
// kSlice apart. With kFirst it reads h, prefetches the next slice, and leaves the centred channels in `x` for further
// actions.
template <int kRows, bool kHalf, bool kFirst>
MAESTRO_INLINE void add_products(const Problem& p, const Slice& slice, float* x, const float* weight, float* total,
                                 std::int64_t width) {
  constexpr std::int64_t kBytes = kHalf ? 2 : 4;
  const float* mean = p.head.mean == nullptr ? nullptr : p.head.mean + slice.first;
  Float8 sums[kRows][kWide];
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kWide; ++k) sums[r][k] = load8(total + (r * width + k) * kLanes);
  }
  for (std::int64_t i = 0; i < slice.count; i += kLanes) {
    const bool whole = i + kLanes <= slice.count;
    Float8 value[kRows], centre{};
    if (kFirst && mean != nullptr) {
      centre = whole ? load8(mean + i) : widened8<false>(mean, i, slice.count - i);
    }
    for (int r = 0; r < kRows; ++r) {
      if (kFirst) {
        const std::int64_t at = (slice.row + r) * p.head.size + slice.first + i;
        __builtin_prefetch(static_cast<const char*>(p.h) + (slice.ahead + r * p.head.size + i) * kBytes);
        value[r] = whole ? widened8<kHalf>(p.h, at) : widened8<kHalf>(p.h, at, slice.count - i);
        if (mean != nullptr) value[r] -= centre;
        store8(x + r * kSlice + i, value[r]);
      } else {
        value[r] = load8(x + r * kSlice + i);
      }
    }
    for (int k = 0; k < kWide; ++k) {
      const Float8 w = load8(weight + k * kSlice + i);
      for (int r = 0; r < kRows; ++r) sums[r][k] += value[r] * w;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kWide; ++k) store8(total + (r * width + k) * kLanes, sums[r][k]);
  }
}

template <int kRows, bool kHalf>
MAESTRO_INLINE void add_slice(const Problem& p, const Slice& slice, float* x, float* total, std::int64_t width) {
  const float* weight = p.weight + slice.first * width;
  add_products<kRows, kHalf, true>(p, slice, x, weight, total, width);
  for (std::int64_t k = kWide; k < width; k += kWide) {
    add_products<kRows, kHalf, false>(p, slice, x, weight + k * kSlice, total + k * kLanes, width);
  }
}

// The memory of one thread.
struct Workspace {
  explicit Workspace(std::int64_t width)
      : totals(static_cast<std::size_t>(kBlock * width * kLanes)),
        probs(static_cast<std::size_t>(kBlock * width)),
        logs(static_cast<std::size_t>(kBlock * width)) {}
  std::vector<float> totals;  // [kBlock, width, kLanes], each lane's share of a logit
  std::vector<double> probs, logs;  // [kBlock, width]; probs holds the logits at first
};

// Computes the logits of a block, slice by slice, so that the weights of a slice stay in the first-level cache for all
// its rows. Every logit has the same order of additions, whatever other rows are in the block.
template <bool kHalf>
MAESTRO_INLINE void logits_of_block(const Problem& p, std::int64_t row, std::int64_t rows, std::int64_t width,
                                    Workspace& work) {
  alignas(32) float x[2 * kSlice];
  std::fill(work.totals.begin(), work.totals.end(), 0.0f);
  for (std::int64_t first = 0; first < p.head.size; first += kSlice) {
    const std::int64_t count = std::min(kSlice, p.head.size - first);
    for (std::int64_t r = 0; r < rows; r += 2) {
      const bool last = r + 2 >= rows;
      const std::int64_t ahead = last ? row * p.head.size + first + kSlice : (row + r + 2) * p.head.size + first;
      const Slice slice{row + r, first, count, ahead};
      float* total = work.totals.data() + r * width * kLanes;
      if (r + 1 < rows) {
        add_slice<2, kHalf>(p, slice, x, total, width);
      } else {
        add_slice<1, kHalf>(p, slice, x, total, width);
      }
    }
  }
  for (std::int64_t i = 0; i < rows * width; ++i) {
    work.probs[static_cast<std::size_t>(i)] = sum(load8(work.totals.data() + i * kLanes));
  }
}

// Computes p = (1 - K m) softmax(z / tau) + m in place and its logarithm, with 0 and -inf in the padding. Each step
// goes over the whole block, because row by row each logarithm would wait for an exponential.
MAESTRO_INLINE void probabilities(const ConductorHead& head, const ConductorChoice& choice, std::int64_t rows,
                                  std::int64_t width, Workspace& work) {
  const std::int64_t K = head.actions;
  for (std::int64_t r = 0; r < rows; ++r) {
    double* z = work.probs.data() + r * width;
    double top = -std::numeric_limits<double>::infinity();
    for (std::int64_t k = 0; k < K; ++k) {
      z[k] = (z[k] + head.bias[k]) / choice.tau;
      top = std::max(top, z[k]);
    }
    for (std::int64_t k = 0; k < K; ++k) z[k] -= top;
    for (std::int64_t k = K; k < width; ++k) z[k] = -std::numeric_limits<double>::infinity();
  }
  double *p = work.probs.data(), *logs = work.logs.data();
  for (std::int64_t i = 0; i < rows * width; i += 4) store4(p + i, exp4(load4(p + i)));
  for (std::int64_t r = 0; r < rows; ++r) {
    double* row = p + r * width;
    Double4 total = splat(0.0);
    for (std::int64_t k = 0; k < width; k += 4) total += load4(row + k);
    const double scale = (1.0 - static_cast<double>(K) * choice.min_prob) / sum(total);
    for (std::int64_t k = 0; k < K; ++k) row[k] = row[k] * scale + choice.min_prob;
  }
  for (std::int64_t i = 0; i < rows * width; i += 4) store4(logs + i, log4(load4(p + i)));
}

// Adds up in float32 in the order of the actions, as every backend does. So an action follows from the probabilities
// that are returned.
MAESTRO_INLINE std::int64_t drawn(const float* probs, std::int64_t K, float u) {
  float total = 0;
  std::int64_t action = 0;
  for (std::int64_t k = 0; k + 1 < K; ++k) {
    total += probs[k];
    action += u >= total ? 1 : 0;
  }
  return action;
}

MAESTRO_INLINE void choose(const double* p, const double* logs, const ConductorHead& head,
                           const ConductorChoice& choice, const ConductorOutputs& out, std::int64_t row) {
  const std::int64_t K = head.actions;
  float *probs = out.probs + row * K, *weights = out.weights + row * K;
  for (std::int64_t k = 0; k < K; ++k) probs[k] = static_cast<float>(p[k]);
  std::int64_t action;
  if (choice.soft) {
    action = std::max_element(probs, probs + K) - probs;
    std::copy_n(probs, K, weights);
  } else {
    action = drawn(probs, K, uniform(choice.seed, choice.step, choice.offset + static_cast<std::uint64_t>(row)));
    const double equal = (1.0 - choice.alpha) / static_cast<double>(K);
    std::fill_n(weights, K, static_cast<float>(equal));
    weights[action] = static_cast<float>(equal + choice.alpha);
  }
  Double4 information = splat(0.0);
  for (std::int64_t k = 0; k < K; k += 4) {
    const Double4 value = load4(p + k);
    information += value != 0.0 ? value * load4(logs + k) : splat(0.0);  // NaN stays
  }
  out.actions[row] = action;
  out.log_probs[row] = static_cast<float>(p[action] == p[action] ? logs[action] : p[action]);  // NaN stays
  out.entropy[row] = static_cast<float>(-sum(information));
}

MAESTRO_CLONES
void conduct_rows(const Problem& p, const ConductorChoice& choice, const ConductorOutputs& out, std::int64_t first,
                  std::int64_t last) {
  const std::int64_t width = rounded_up(p.head.actions, kWide);
  Workspace work(width);
  for (std::int64_t row = first; row < last; row += kBlock) {
    const std::int64_t rows = std::min(kBlock, last - row);
    if (p.bfloat16) {
      logits_of_block<true>(p, row, rows, width, work);
    } else {
      logits_of_block<false>(p, row, rows, width, work);
    }
    probabilities(p.head, choice, rows, width, work);
    for (std::int64_t r = 0; r < rows; ++r) {
      choose(work.probs.data() + r * width, work.logs.data() + r * width, p.head, choice, out, row + r);
    }
  }
}

}  // namespace

void conductor_weights(const void* h, bool bfloat16, std::int64_t batch, const ConductorHead& head,
                       const ConductorChoice& choice, const ConductorOutputs& out, int threads) {
  const std::vector<float> weight = folded(head);
  const Problem problem{h, bfloat16, head, weight.data()};
  const int useful = useful_threads(threads, batch * head.size * head.actions, kProductsPerThread);
#pragma omp parallel for num_threads(useful) if (useful > 1) schedule(static)
  for (int part = 0; part < useful; ++part) {
    conduct_rows(problem, choice, out, batch * part / useful, batch * (part + 1) / useful);
  }
}

}  // namespace maestro_fast
