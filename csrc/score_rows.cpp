// From rewards to scores: r' = (r - mean) * factor per reward, s = sum of w r' - beta * KL per response.
#include <algorithm>

#include "chunk.hpp"
#include "simd.hpp"

namespace maestro_fast {
namespace {

MAESTRO_INLINE Double4 one_over(Double4 x) { return x == 0.0 ? splat(0.0) : 1.0 / x; }

// The moments of four columns of a group.
struct Columns {
  Double4 count, mean, std;
};

// Takes kBlocks times four columns at once, because with four alone each addition would wait for the one before.
template <bool kMasked, int kBlocks>
MAESTRO_INLINE void moments_of_columns(const float* x, std::int64_t n, std::int64_t K, std::int64_t width, int ddof,
                                       Columns* out) {
  Double4 shift[kBlocks], count[kBlocks], total[kBlocks], squares[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    shift[b] = load4(x + 4 * b, width);
    if (kMasked) {  // the first live value of each column
      for (std::int64_t r = 1; r < n && any(shift[b] != shift[b]); ++r) {
        shift[b] = shift[b] == shift[b] ? shift[b] : load4(x + r * K + 4 * b, width);
      }
      shift[b] = shift[b] == shift[b] ? shift[b] : splat(0.0);
    }
    count[b] = splat(kMasked ? 0.0 : static_cast<double>(n));
    total[b] = squares[b] = splat(0.0);
  }
  for (std::int64_t r = 0; r < n; ++r) {
    for (int b = 0; b < kBlocks; ++b) {
      const Double4 value = load4(x + r * K + 4 * b, width);
      Double4 d = value - shift[b];
      if (kMasked) {
        d = value == value ? d : splat(0.0);
        count[b] += value == value ? splat(1.0) : splat(0.0);
      }
      total[b] += d;
      squares[b] += d * d;
    }
  }
  const Double4 one = splat(1.0);
  for (int b = 0; b < kBlocks; ++b) {
    const Double4 m = total[b] / max4(count[b], one);
    const Double4 variance =
        not_below_0(squares[b] - total[b] * m) / max4(count[b] - static_cast<double>(ddof), one);
    out[b] = {count[b], shift[b] + m, sqrt4(variance)};
  }
}

MAESTRO_INLINE void place_columns(const Chunk& chunk, const AdvantageProfile& p, const BatchColumns& batch,
                                  const Columns& own, std::int64_t group, std::int64_t k) {
  const std::int64_t at = group * padded(chunk.K) + k;
  const Double4 one = splat(1.0), zero = splat(0.0);
  Double4 center = zero, factor = one;
  if (p.reward_center == Scope::group || p.reward_center == Scope::leave_one_out) center = own.mean;
  if (p.reward_scale == Scope::group) factor = one_over(own.std + p.reward_eps);
  if (p.reward_center == Scope::leave_one_out) {
    factor *= own.count > 1.0 ? own.count / max4(own.count - 1.0, one) : one;
  }
  if (p.reward_center == Scope::batch) center = load4(batch.mean.data() + k);
  if (p.reward_scale == Scope::batch) factor *= load4(batch.factor.data() + k);
  const Scope decisive = p.reward_scale == Scope::none ? p.reward_center : p.reward_scale;
  if (p.raw_singleton) {
    if (p.reward_center != Scope::batch) center = own.count == 1.0 ? zero : center;
    if (p.reward_scale == Scope::group) factor = own.count == 1.0 ? one / (one + p.reward_eps) : factor;
  }
  if (decisive == Scope::batch) {  // a value that is the only one has nothing to be compared with
    factor = load4(batch.count.data() + k) < 2.0 ? zero : factor;
  } else if (!p.raw_singleton) {
    factor = own.count < 2.0 ? zero : factor;
  }
  store4(chunk.center + at, center);
  store4(chunk.factor + at, factor);
}

template <bool kMasked>
MAESTRO_INLINE void columns_of_group(const Chunk& chunk, const AdvantageProfile& p, const BatchColumns& batch,
                                     std::int64_t group) {
  const std::int64_t K = chunk.K, row = chunk.begin[group], n = chunk.begin[group + 1] - row;
  const float* x = chunk.rewards + row * K;
  Columns own[2];
  std::int64_t k = 0;
  for (; k + 8 <= K; k += 8) {
    moments_of_columns<kMasked, 2>(x + k, n, K, 4, p.ddof, own);
    place_columns(chunk, p, batch, own[0], group, k);
    place_columns(chunk, p, batch, own[1], group, k + 4);
  }
  for (; k < K; k += 4) {
    // Two calls, so that the compiler knows the width of all but the last columns of a row.
    if (K - k >= 4) {
      moments_of_columns<kMasked, 1>(x + k, n, K, 4, p.ddof, own);
    } else {
      moments_of_columns<kMasked, 1>(x + k, n, K, K - k, p.ddof, own);
    }
    place_columns(chunk, p, batch, own[0], group, k);
  }
}

// The sums of a row before its lanes are added up. With abstentions: the sum of all weights, the sum of the weights of
// live rewards, and the number of live rewards.
struct Row {
  Double4 score, whole, rest, live;
};

// Loads the weights of one row, or those that all rows share, which have been widened before and end with zeros.
MAESTRO_INLINE Double4 weights4(const float* w, std::int64_t width) { return load4(w, width); }
MAESTRO_INLINE Double4 weights4(const double* w, std::int64_t) { return load4(w); }

template <bool kMasked, bool kAffine, class Weight>
MAESTRO_INLINE void add_columns(const float* x, const Weight* w, const double* center, const double* factor,
                                float* normalized, std::int64_t width, Row& row) {
  Double4 value = load4(x, width), weight = weights4(w, width);
  const Mask4 live = value == value;
  if (kAffine) value = (value - load4(center)) * load4(factor);
  if (kMasked) {
    value = live ? value : splat(0.0);
    row.whole += weight;
    weight = live ? weight : splat(0.0);
    row.rest += weight;
    row.live += live ? splat(1.0) : splat(0.0);
  }
  if (kMasked || kAffine) {
    store4(normalized, value, width);
  } else {
    std::copy_n(x, width < 4 ? width : 4, normalized);  // rewards that are not normalised stay as they are
  }
  row.score += weight * value;
}

template <bool kMasked, bool kAffine, class Weight>
MAESTRO_INLINE Row sum_of_row(const Chunk& chunk, const Weight* weights, std::int64_t r, const double* center,
                              const double* factor) {
  const std::int64_t K = chunk.K;
  const float* x = chunk.rewards + r * K;
  const Weight* w = weights + r * chunk.weight_stride;
  float* normalized = chunk.out.normalized + r * K;
  Row row{splat(0.0), splat(0.0), splat(0.0), splat(0.0)};
  std::int64_t k = 0;
  for (; k + 4 <= K; k += 4) {
    add_columns<kMasked, kAffine>(x + k, w + k, center + k, factor + k, normalized + k, 4, row);
  }
  if (k < K) add_columns<kMasked, kAffine>(x + k, w + k, center + k, factor + k, normalized + k, K - k, row);
  return row;
}

// The score of a row with abstentions, and whether the row counts.
MAESTRO_INLINE double masked_score(const Row& row, std::int64_t K, bool renormalize, double& live) {
  const double known = sum(row.live) - static_cast<double>(padded(K) - K);  // the padding was counted as live
  live = known > 0 ? 1 : 0;
  double factor = 1;
  if (renormalize && known < static_cast<double>(K)) {
    const double rest = sum(row.rest);
    if (rest == 0) live = 0;  // all its weight is on abstained rewards, so there is none to scale up
    if (live != 0) factor = sum(row.whole) / rest;
  }
  return live != 0 ? sum(row.score) * factor : 0.0;
}

// Computes the scores of a group. Returns whether some score is NaN, which means an abstention unless kMasked.
template <bool kMasked, bool kAffine, class Weight>
MAESTRO_INLINE bool scores_of_group(const Chunk& chunk, const Weight* weights, const AdvantageProfile& p,
                                    std::int64_t group) {
  const std::int64_t first = chunk.begin[group], last = chunk.begin[group + 1];
  const double* center = chunk.center + (kAffine ? group * padded(chunk.K) : 0);
  const double* factor = chunk.factor + (kAffine ? group * padded(chunk.K) : 0);
  std::int64_t r = first;
  if (kMasked) {
    for (; r < last; ++r) {
      const Row row = sum_of_row<kMasked, kAffine>(chunk, weights, r, center, factor);
      chunk.raw[r] = masked_score(row, chunk.K, p.renormalize, chunk.live[r]);
    }
    return false;
  }
  Mask4 unknown{};
  for (; r + 4 <= last; r += 4) {
    const Row a = sum_of_row<kMasked, kAffine>(chunk, weights, r, center, factor);
    const Row b = sum_of_row<kMasked, kAffine>(chunk, weights, r + 1, center, factor);
    const Row c = sum_of_row<kMasked, kAffine>(chunk, weights, r + 2, center, factor);
    const Row d = sum_of_row<kMasked, kAffine>(chunk, weights, r + 3, center, factor);
    const Double4 score = sums(a.score, b.score, c.score, d.score);
    unknown |= score != score;
    store4(chunk.raw + r, score);
  }
  bool nan = any(unknown);
  for (; r < last; ++r) {
    chunk.raw[r] = sum(sum_of_row<kMasked, kAffine>(chunk, weights, r, center, factor).score);
    nan |= chunk.raw[r] != chunk.raw[r];
  }
  return nan;
}

template <bool kMasked, class Weight>
MAESTRO_INLINE bool score_groups(const Chunk& chunk, const Weight* weights, const AdvantageProfile& p,
                                 const BatchColumns& batch) {
  const bool affine = !p.rewards_as_they_are();
  for (std::int64_t g = 0; g < chunk.groups; ++g) {
    if (affine) columns_of_group<kMasked>(chunk, p, batch, g);
    const bool nan = affine ? scores_of_group<kMasked, true>(chunk, weights, p, g)
                            : scores_of_group<kMasked, false>(chunk, weights, p, g);
    if (nan) return true;
  }
  return false;
}

// Counts the live responses of a group, and finds whether all their scores are the same.
MAESTRO_INLINE void spread_of_group(const Chunk& chunk, bool abstained, std::int64_t group) {
  const std::int64_t last = chunk.begin[group + 1];
  std::int64_t r = chunk.begin[group];
  if (!abstained) {
    const Double4 first = splat(chunk.raw[r]);
    chunk.count[group] = static_cast<double>(last - r);
    Mask4 differ{};
    for (; r + 4 <= last; r += 4) differ |= load4(chunk.raw + r) != first;
    bool some = any(differ);
    for (; r < last; ++r) some |= chunk.raw[r] != first[0];
    chunk.flat[group] = !some;
    return;
  }
  double count = 0, first = 0;
  bool some = false;
  for (; r < last; ++r) {
    if (chunk.live[r] == 0) continue;
    if (count == 0) first = chunk.raw[r];
    some |= chunk.raw[r] != first;
    ++count;
  }
  chunk.count[group] = count;
  chunk.flat[group] = !some;
}

MAESTRO_CLONES
void score_chunk(const Chunk& given, const AdvantageProfile& profile, const BatchColumns& batch) {
  const Chunk chunk = given;  // a copy, so that the compiler knows that no store changes it
  const AdvantageProfile p = profile;
  bool abstained;
  if (chunk.weight_stride == 0) {
    abstained = score_groups<false>(chunk, chunk.shared_weights, p, batch);
    if (abstained) score_groups<true>(chunk, chunk.shared_weights, p, batch);
  } else {
    abstained = score_groups<false>(chunk, chunk.weights, p, batch);
    if (abstained) score_groups<true>(chunk, chunk.weights, p, batch);
  }
  for (std::int64_t g = 0; g < chunk.groups; ++g) spread_of_group(chunk, abstained, g);
  *chunk.abstained = abstained;
}

}  // namespace

void score_rows(const Chunk& chunk, const AdvantageProfile& p, const BatchColumns& batch) {
  score_chunk(chunk, p, batch);
  if (chunk.kl == nullptr) return;
  for (std::int64_t r = 0; r < chunk.rows; ++r) {
    const bool dead = *chunk.abstained && chunk.live[r] == 0;
    chunk.scores[r] = dead ? 0.0 : chunk.raw[r] - chunk.beta * static_cast<double>(chunk.kl[r]);
  }
}

}  // namespace maestro_fast
