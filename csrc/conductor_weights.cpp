#include "conductor_weights.hpp"

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.hpp"
#include "threads.hpp"

namespace maestro_fast {
namespace {

constexpr std::int64_t kProductsPerThread = 1 << 21;
constexpr std::int64_t kLanes = 8;  // of a Float8
constexpr std::int64_t kWide = 4;   // actions whose logits are formed together

std::int64_t rounded_up(std::int64_t count, std::int64_t to) { return (count + to - 1) / to * to; }

// weight * rstd as [K rounded up, d rounded up], zeros in the padding. The mean is not folded into the bias: where a
// channel's mean is far larger than its spread, as in the massive channels of language models, float32 would cancel.
std::vector<float> folded(const ConductorHead& head) {
  const std::int64_t stride = rounded_up(head.size, kLanes);
  std::vector<float> weight(static_cast<std::size_t>(rounded_up(head.actions, kWide) * stride), 0.0f);
  for (std::int64_t k = 0; k < head.actions; ++k) {
    float* to = weight.data() + k * stride;
    const float* from = head.weight + k * head.size;
    for (std::int64_t i = 0; i < head.size; ++i) to[i] = head.rstd == nullptr ? from[i] : from[i] * head.rstd[i];
  }
  return weight;
}

struct Problem {
  const void* h;
  bool bfloat16;
  const ConductorHead& head;
  const float* weight;  // folded
  std::int64_t stride;
};

MAESTRO_INLINE void centre_row(const Problem& p, std::int64_t row, float* to) {
  const std::int64_t d = p.head.size;
  if (p.bfloat16) {
    const auto* from = static_cast<const std::uint16_t*>(p.h) + row * d;
    for (std::int64_t i = 0; i < d; ++i) {
      const std::uint32_t bits = std::uint32_t{from[i]} << 16;
      std::memcpy(to + i, &bits, sizeof bits);
    }
  } else {
    std::memcpy(to, static_cast<const float*>(p.h) + row * d, static_cast<std::size_t>(d) * sizeof(float));
  }
  if (p.head.mean == nullptr) return;
  for (std::int64_t i = 0; i < d; ++i) to[i] -= p.head.mean[i];
}

// Logits of kRows rows for four actions. Every logit has the same order of additions, however many rows there are.
template <int kRows>
MAESTRO_INLINE void logits_of(const float* x, const float* weight, std::int64_t stride, double* logits,
                              std::int64_t width) {
  Float8 total[kRows][kWide] = {};
  for (std::int64_t i = 0; i < stride; i += kLanes) {
    Float8 value[kRows];
    for (int r = 0; r < kRows; ++r) value[r] = load8(x + r * stride + i);
    for (int k = 0; k < kWide; ++k) {
      const Float8 w = load8(weight + k * stride + i);
      for (int r = 0; r < kRows; ++r) total[r][k] += value[r] * w;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kWide; ++k) logits[r * width + k] = sum(total[r][k]);
  }
}

template <int kRows>
MAESTRO_INLINE void logits_of_rows(const Problem& p, std::int64_t row, float* x, double* logits) {
  const std::int64_t width = rounded_up(p.head.actions, kWide);
  for (int r = 0; r < kRows; ++r) centre_row(p, row + r, x + r * p.stride);
  for (std::int64_t k = 0; k < width; k += kWide) {
    logits_of<kRows>(x, p.weight + k * p.stride, p.stride, logits + k, width);
  }
}

// p = (1 - K m) softmax(z / tau) + m in place; the padding becomes 0.
MAESTRO_INLINE void probabilities(double* z, const ConductorHead& head, const ConductorChoice& choice) {
  const std::int64_t K = head.actions, width = rounded_up(K, kWide);
  double top = -std::numeric_limits<double>::infinity();
  for (std::int64_t k = 0; k < K; ++k) {
    z[k] = (z[k] + head.bias[k]) / choice.tau;
    top = std::max(top, z[k]);
  }
  for (std::int64_t k = K; k < width; ++k) z[k] = -std::numeric_limits<double>::infinity();
  Double4 total = splat(0.0);
  for (std::int64_t k = 0; k < width; k += 4) {
    const Double4 e = exp4(load4(z + k) - top);
    store4(z + k, e);
    total += e;
  }
  const double scale = (1.0 - static_cast<double>(K) * choice.min_prob) / sum(total);
  for (std::int64_t k = 0; k < K; ++k) z[k] = z[k] * scale + choice.min_prob;
}

// In float32, from the left, as every backend does it: an action is a function of the probabilities as they are returned.
MAESTRO_INLINE std::int64_t drawn(const float* probs, std::int64_t K, float u) {
  float total = 0;
  std::int64_t action = 0;
  for (std::int64_t k = 0; k + 1 < K; ++k) {
    total += probs[k];
    action += u >= total ? 1 : 0;
  }
  return action;
}

// Overwrites p by its logarithms.
MAESTRO_INLINE void choose(double* p, const ConductorHead& head, const ConductorChoice& choice,
                           const ConductorOutputs& out, std::int64_t row) {
  const std::int64_t K = head.actions, width = rounded_up(K, kWide);
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
  for (std::int64_t k = 0; k < width; k += 4) {
    const Double4 value = load4(p + k), log = log4(value);
    information += value > 0.0 ? value * log : splat(0.0);
    store4(p + k, log);
  }
  out.actions[row] = action;
  out.log_probs[row] = static_cast<float>(p[action]);
  out.entropy[row] = static_cast<float>(-sum(information));
}

MAESTRO_CLONES
void conduct_rows(const Problem& p, const ConductorChoice& choice, const ConductorOutputs& out, std::int64_t first,
                  std::int64_t last) {
  const std::int64_t width = rounded_up(p.head.actions, kWide);
  std::vector<float> x(static_cast<std::size_t>(2 * p.stride), 0.0f);
  std::vector<double> logits(static_cast<std::size_t>(2 * width));
  for (std::int64_t row = first; row < last; row += 2) {
    const bool pair = row + 1 < last;
    if (pair) {
      logits_of_rows<2>(p, row, x.data(), logits.data());
    } else {
      logits_of_rows<1>(p, row, x.data(), logits.data());
    }
    for (std::int64_t r = 0; r < (pair ? 2 : 1); ++r) {
      probabilities(logits.data() + r * width, p.head, choice);
      choose(logits.data() + r * width, p.head, choice, out, row + r);
    }
  }
}

}  // namespace

float uniform(std::uint64_t seed, std::uint32_t step, std::uint64_t index) {
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

void conductor_weights(const void* h, bool bfloat16, std::int64_t batch, const ConductorHead& head,
                       const ConductorChoice& choice, const ConductorOutputs& out, int threads) {
  const std::vector<float> weight = folded(head);
  const Problem problem{h, bfloat16, head, weight.data(), rounded_up(head.size, kLanes)};
  const int useful = useful_threads(threads, batch * head.size * head.actions, kProductsPerThread);
#pragma omp parallel for num_threads(useful) if (useful > 1) schedule(static)
  for (int part = 0; part < useful; ++part) {
    conduct_rows(problem, choice, out, batch * part / useful, batch * (part + 1) / useful);
  }
}

}  // namespace maestro_fast
