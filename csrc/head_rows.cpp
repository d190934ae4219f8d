#include "head_rows.hpp"

#include <algorithm>
#include <limits>

#include "simd.hpp"
#include "threads.hpp"

namespace maestro_fast {
namespace {

constexpr std::int64_t kLanes = 16;   // lanes of a Float16
constexpr std::int64_t kBlock = 512;  // columns that are added up in float32; blocks are added up in double
constexpr std::int64_t kElementsPerThread = 1 << 15;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The columns from `at` on, `count` of them; lanes without a column become `rest`.
MAESTRO_INLINE Float16 load_some(const float* from, std::int64_t count, float rest) {
  if (count >= kLanes) return load16(from);
  Float16 x = splat16(rest);
  for (std::int64_t i = 0; i < count; ++i) x[i] = from[i];
  return x;
}

// u = scale x + bias of the columns from `at` on. With kPlain u, and y too, is x itself.
template <bool kPlain>
MAESTRO_INLINE Float16 uncapped(const HeadNumbers& head, Float16 x, std::int64_t at, std::int64_t count) {
  if (kPlain) return x;
  x *= head.scale;
  return head.bias == nullptr ? x : x + load_some(head.bias + at, count, 0.0f);
}

// y, and its derivative by u.
struct Capped {
  Float16 y, slope;
};

template <bool kPlain>
MAESTRO_INLINE Capped capped(const HeadNumbers& head, Float16 u) {
  if (kPlain || head.softcap == 0.0f) return {u, splat16(1.0f)};
  const Float16 bent = tanh16(u / head.softcap);
  return {bent * head.softcap, 1.0f - bent * bent};
}

template <bool kPlain>
MAESTRO_INLINE Capped capped(const HeadNumbers& head, Float16 x, std::int64_t at, std::int64_t count) {
  return capped<kPlain>(head, uncapped<kPlain>(head, x, at, count));
}

// One column, in all lanes.
template <bool kPlain>
MAESTRO_INLINE Capped capped_at(const HeadNumbers& head, float x, std::int64_t at) {
  if (kPlain) return {splat16(x), splat16(1.0f)};
  x *= head.scale;
  return capped<false>(head, splat16(head.bias == nullptr ? x : x + head.bias[at]));
}

// (y - peak) / T. The last bit of tanh16 may fall where u rises, so a y may be above that of the largest u by this bit.
template <bool kPlain>
MAESTRO_INLINE Float16 gaps(const HeadNumbers& head, Float16 y, float peak) {
  if (kPlain) return y - peak;
  const Float16 gap = (y - peak) / head.temperature;
  return gap > 0.0f ? splat16(0.0f) : gap;  // NaN stays
}

// The largest y, by the largest u; see gaps().
template <bool kPlain>
MAESTRO_INLINE float peak_of_row(const float* x, std::int64_t V, const HeadNumbers& head) {
  Float16 most[4];
  for (Float16& m : most) m = splat16(-kInfinity);
  std::int64_t v = 0;
  for (; v + 4 * kLanes <= V; v += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const std::int64_t at = v + kLanes * j;
      most[j] = max16(most[j], uncapped<kPlain>(head, load16(x + at), at, kLanes));
    }
  }
  for (; v < V; v += kLanes) {
    Float16 u = uncapped<kPlain>(head, load_some(x + v, V - v, 0.0f), v, V - v);
    for (std::int64_t i = V - v; i < kLanes; ++i) u[i] = -kInfinity;
    most[0] = max16(most[0], u);
  }
  const Float16 all = max16(max16(most[0], most[1]), max16(most[2], most[3]));
  float peak = all[0];
  for (int i = 1; i < kLanes; ++i) peak = std::max(peak, all[i]);
  return capped<kPlain>(head, splat16(peak)).y[0];
}

// The sum of exp(gap), and that of exp(gap) gap, in which a gap of -inf counts nothing.
struct Totals {
  double total = 0.0, moment = 0.0;
};

template <bool kEntropy>
MAESTRO_INLINE void add_gaps(Float16 gap, Float16& total, Float16& moment) {
  const Float16 p = exp16(gap);
  total += p;
  if (kEntropy) moment += p == 0.0f ? splat16(0.0f) : p * gap;  // NaN stays
}

template <bool kPlain, bool kEntropy>
MAESTRO_INLINE Totals totals_of_row(const float* x, std::int64_t V, const HeadNumbers& head, float peak) {
  Totals sums;
  for (std::int64_t first = 0; first < V; first += kBlock) {
    const std::int64_t end = std::min(first + kBlock, V);
    Float16 total[2] = {splat16(0.0f), splat16(0.0f)}, moment[2] = {splat16(0.0f), splat16(0.0f)};
    std::int64_t v = first;
    for (; v + 2 * kLanes <= end; v += 2 * kLanes) {
      for (int j = 0; j < 2; ++j) {
        const std::int64_t at = v + kLanes * j;
        const Float16 y = capped<kPlain>(head, load16(x + at), at, kLanes).y;
        add_gaps<kEntropy>(gaps<kPlain>(head, y, peak), total[j], moment[j]);
      }
    }
    for (; v < end; v += kLanes) {
      Float16 gap = gaps<kPlain>(head, capped<kPlain>(head, load_some(x + v, end - v, 0.0f), v, end - v).y, peak);
      for (std::int64_t i = end - v; i < kLanes; ++i) gap[i] = -kInfinity;
      add_gaps<kEntropy>(gap, total[0], moment[0]);
    }
    sums.total += sum(total[0] + total[1]);
    if (kEntropy) sums.moment += sum(moment[0] + moment[1]);
  }
  return sums;
}

// ln of a sum of exponentials; a NaN stays one.
MAESTRO_INLINE double log_of(double total) { return total == total ? log4(splat(total))[0] : total; }

template <bool kPlain, bool kEntropy>
MAESTRO_INLINE void statistics_of_rows(const LogitRows& logits, const HeadNumbers& head, const RowStatistics& out,
                                       std::int64_t first, std::int64_t last) {
  const std::int64_t V = logits.columns;
  for (std::int64_t row = first; row < last; ++row) {
    const std::int64_t target = logits.targets[row];
    if (target == head.ignore_index) {
      out.logprobs[row] = out.peaks[row] = 0.0f;
      out.totals[row] = 1.0f;
      if (kEntropy) out.entropies[row] = 0.0f;
      continue;
    }
    const float* x = logits.x + row * logits.stride;
    const float peak = peak_of_row<kPlain>(x, V, head);
    const Totals sums = totals_of_row<kPlain, kEntropy>(x, V, head, peak);
    const double log_total = log_of(sums.total);
    const bool known = target >= 0 && target < V;
    const double gap = known ? gaps<kPlain>(head, capped_at<kPlain>(head, x[target], target).y, peak)[0]
                             : std::numeric_limits<double>::quiet_NaN();
    out.logprobs[row] = static_cast<float>(gap - log_total);
    out.peaks[row] = peak;
    out.totals[row] = static_cast<float>(sums.total);
    if (kEntropy) out.entropies[row] = static_cast<float>(log_total - sums.moment / sums.total);
  }
}

MAESTRO_CLONES
void statistics_of_rows(const LogitRows& logits, const HeadNumbers& head, bool plain, const RowStatistics& out,
                        std::int64_t first, std::int64_t last) {
  if (plain) {
    out.entropies == nullptr ? statistics_of_rows<true, false>(logits, head, out, first, last)
                             : statistics_of_rows<true, true>(logits, head, out, first, last);
  } else {
    out.entropies == nullptr ? statistics_of_rows<false, false>(logits, head, out, first, last)
                             : statistics_of_rows<false, true>(logits, head, out, first, last);
  }
}

// The numbers that the gradient of one row is computed from.
struct Row {
  float peak, share;  // share = 1 / total
  float log_total, entropy, dlogprob, dentropy;
};

// dL/du of 16 columns; `own` is dL/dlog p in the lane of the target, 0 elsewhere.
template <bool kPlain, bool kEntropy>
MAESTRO_INLINE Float16 slopes(const HeadNumbers& head, const Row& row, const Capped& c, Float16 own) {
  const Float16 gap = gaps<kPlain>(head, c.y, row.peak);
  const Float16 p = exp16(gap) * row.share;
  Float16 g = own - p * row.dlogprob;
  if (kEntropy) {
    const Float16 more = p * row.dentropy * (gap - row.log_total + row.entropy);
    g -= p == 0.0f ? splat16(0.0f) : more;  // A gap of -inf would give NaN; a NaN stays.
  }
  return kPlain ? g : g / head.temperature * c.slope;
}

template <bool kPlain, bool kEntropy>
MAESTRO_INLINE void dlogits_of_row(float* x, std::int64_t V, const HeadNumbers& head, const Row& row,
                                   std::int64_t target) {
  const bool known = target >= 0 && target < V;
  const float own = known ? x[target] : 0.0f;
  const Float16 zero = splat16(0.0f);
  for (std::int64_t v = 0; v < V; v += kLanes) {
    const std::int64_t count = V - v;
    const Float16 g =
        slopes<kPlain, kEntropy>(head, row, capped<kPlain>(head, load_some(x + v, count, 0.0f), v, count), zero);
    if (count >= kLanes) {
      store16(x + v, g);
    } else {
      for (std::int64_t i = 0; i < count; ++i) x[v + i] = g[i];
    }
  }
  if (known) {
    x[target] = slopes<kPlain, kEntropy>(head, row, capped_at<kPlain>(head, own, target), splat16(row.dlogprob))[0];
  }
}

template <bool kPlain, bool kEntropy>
MAESTRO_INLINE void dlogits_of_rows(const LogitRows& logits, const HeadNumbers& head, const RowStatistics& stats,
                                    const RowGradients& gradients, std::int64_t first, std::int64_t last) {
  for (std::int64_t r = first; r < last; ++r) {
    float* x = logits.x + r * logits.stride;
    const float dlogprob = gradients.dlogprobs[r], dentropy = kEntropy ? gradients.dentropies[r] : 0.0f;
    if (logits.targets[r] == head.ignore_index || (dlogprob == 0.0f && dentropy == 0.0f)) {
      std::fill_n(x, logits.columns, 0.0f);
      continue;
    }
    const double total = stats.totals[r];
    const Row row{stats.peaks[r],
                  static_cast<float>(1.0 / total),
                  static_cast<float>(log_of(total)),
                  kEntropy ? stats.entropies[r] : 0.0f,
                  dlogprob,
                  dentropy};
    dlogits_of_row<kPlain, kEntropy>(x, logits.columns, head, row, logits.targets[r]);
  }
}

MAESTRO_CLONES
void dlogits_of_rows(const LogitRows& logits, const HeadNumbers& head, bool plain, const RowStatistics& stats,
                     const RowGradients& gradients, std::int64_t first, std::int64_t last) {
  if (plain) {
    gradients.dentropies == nullptr ? dlogits_of_rows<true, false>(logits, head, stats, gradients, first, last)
                                    : dlogits_of_rows<true, true>(logits, head, stats, gradients, first, last);
  } else {
    gradients.dentropies == nullptr ? dlogits_of_rows<false, false>(logits, head, stats, gradients, first, last)
                                    : dlogits_of_rows<false, true>(logits, head, stats, gradients, first, last);
  }
}

// Whether y = x and T = 1, as in most models.
bool is_plain(const HeadNumbers& head) {
  return head.bias == nullptr && head.scale == 1.0f && head.softcap == 0.0f && head.temperature == 1.0f;
}

}  // namespace

void row_statistics(const LogitRows& logits, const HeadNumbers& head, const RowStatistics& out, int threads) {
  const bool plain = is_plain(head);
  const int useful = useful_threads(threads, logits.rows * logits.columns, kElementsPerThread);
#pragma omp parallel for num_threads(useful) if (useful > 1) schedule(static)
  for (int part = 0; part < useful; ++part) {
    statistics_of_rows(logits, head, plain, out, logits.rows * part / useful, logits.rows * (part + 1) / useful);
  }
}

void dlogits(const LogitRows& logits, const HeadNumbers& head, const RowStatistics& stats,
             const RowGradients& gradients, int threads) {
  const bool plain = is_plain(head);
  const int useful = useful_threads(threads, logits.rows * logits.columns, kElementsPerThread);
#pragma omp parallel for num_threads(useful) if (useful > 1) schedule(static)
  for (int part = 0; part < useful; ++part) {
    dlogits_of_rows(logits, head, plain, stats, gradients, logits.rows * part / useful,
                    logits.rows * (part + 1) / useful);
  }
}

}  // namespace maestro_fast
