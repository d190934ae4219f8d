// From scores to advantages: A = (s - mean) / (std + eps), over the profile's scopes.
#include <algorithm>
#include <cmath>

#include "chunk.hpp"
#include "simd.hpp"

namespace maestro_fast {
namespace {

constexpr std::int64_t kAtOnce = 16;  // groups that are computed together, so that their divisions and roots overlap

// The sums of d = score - shift and of its square over the live scores of a group.
struct GroupSums {
  double count, shift, total, squares;

  MAESTRO_INLINE double mean_difference() const { return total / std::max(count, 1.0); }

  MAESTRO_INLINE double std(int ddof) const {
    const double variance = std::max(squares - total * mean_difference(), 0.0) / std::max(count - ddof, 1.0);
    return std::sqrt(variance);
  }
};

MAESTRO_INLINE GroupSums sums_of_group(const Chunk& chunk, bool abstained, std::int64_t group) {
  const std::int64_t last = chunk.begin[group + 1];
  std::int64_t r = chunk.begin[group];
  if (abstained) {
    while (r < last && chunk.live[r] == 0) ++r;
  }
  const double shift = r < last ? chunk.scores[r] : 0.0;
  r = chunk.begin[group];
  Double4 total = splat(0.0), squares = splat(0.0);
  for (; r + 4 <= last; r += 4) {
    Double4 d = load4(chunk.scores + r) - shift;
    if (abstained) d *= load4(chunk.live + r);
    total += d;
    squares += d * d;
  }
  for (int lane = 0; r < last; ++r, ++lane) {
    double d = chunk.scores[r] - shift;
    if (abstained) d *= chunk.live[r];
    total[lane] += d;
    squares[lane] += d * d;
  }
  return {chunk.count[group], shift, sum(total), sum(squares)};
}

// A = (s - center) * factor for the rows of one group, and the mean and std that all of them report.
struct Affine {
  double center, factor, mean, std;
  bool zero;  // A is 0, whatever the scores are
};

MAESTRO_INLINE Affine affine_of_group(const GroupSums& own, const AdvantageProfile& p, const Center& batch,
                                      const Center& tokens, bool flat) {
  Affine a{0.0, 1.0, 0.0, 0.0, false};
  const bool raw = p.raw_singleton && own.count == 1;
  const Scope spread = p.score_scale == Scope::none ? Scope::group : p.score_scale;
  a.std = spread == Scope::batch ? batch.std : spread == Scope::tokens ? tokens.std : raw ? 1.0 : own.std(p.ddof);
  if (p.score_scale != Scope::none) {
    const double divisor = p.eps_in_variance ? std::sqrt(a.std * a.std + p.score_eps) : a.std + p.score_eps;
    a.factor = divisor == 0 ? 0.0 : 1.0 / divisor;  // of a NaN a NaN
  }
  if (p.score_center == Scope::batch) a.mean = batch.mean;
  if (p.score_center == Scope::tokens) a.mean = tokens.mean;
  if ((p.score_center == Scope::group || p.score_center == Scope::leave_one_out) && !raw) {
    a.mean = own.shift + own.mean_difference();
  }
  a.center = a.mean;
  if (p.score_center == Scope::leave_one_out && own.count > 1) a.factor *= own.count / (own.count - 1.0);
  a.zero = flat && !raw;
  return a;
}

MAESTRO_INLINE void fill(float* to, double value, std::int64_t count) {
  const float narrow = static_cast<float>(value);
  for (std::int64_t i = 0; i < count; ++i) to[i] = narrow;
}

MAESTRO_INLINE void write_group(const Chunk& chunk, bool abstained, std::int64_t group, const Affine& a) {
  const std::int64_t first = chunk.begin[group], n = chunk.begin[group + 1] - first;
  const double* scores = chunk.scores + first;
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    Double4 score = load4(scores + i), advantage = (score - a.center) * a.factor;
    if (abstained) advantage = load4(chunk.live + first + i) != 0.0 ? advantage : splat(0.0);
    store4(chunk.out.scores + first + i, score);
    store4(chunk.out.advantages + first + i, advantage);
  }
  for (; i < n; ++i) {
    const bool dead = abstained && chunk.live[first + i] == 0;
    chunk.out.scores[first + i] = static_cast<float>(scores[i]);
    chunk.out.advantages[first + i] = static_cast<float>(dead ? 0.0 : (scores[i] - a.center) * a.factor);
  }
  if (a.zero) fill(chunk.out.advantages + first, 0.0, n);
  fill(chunk.out.mean + first, a.mean, n);
  fill(chunk.out.std + first, a.std, n);
  std::fill_n(chunk.out.degenerate + first, n, chunk.flat[group]);
}

// Writes for each response the mean of the other live responses of its group.
MAESTRO_INLINE void write_means_of_others(const Chunk& chunk, bool abstained, std::int64_t group,
                                          const GroupSums& own) {
  for (std::int64_t r = chunk.begin[group]; r < chunk.begin[group + 1]; ++r) {
    const double live = abstained ? chunk.live[r] : 1.0;
    const double rest = own.total - live * (chunk.scores[r] - own.shift);
    chunk.out.mean[r] = static_cast<float>(own.shift + rest / std::max(own.count - live, 1.0));
  }
}

MAESTRO_CLONES
void finish_chunk(const Chunk& given, const AdvantageProfile& profile, const Center& batch, const Center& tokens) {
  const Chunk chunk = given;  // a copy, so that the compiler knows that no store changes it
  const AdvantageProfile p = profile;
  const bool abstained = *chunk.abstained;
  GroupSums own[kAtOnce];
  Affine affine[kAtOnce];
  for (std::int64_t first = 0; first < chunk.groups; first += kAtOnce) {
    const std::int64_t count = std::min(kAtOnce, chunk.groups - first);
    for (std::int64_t i = 0; i < count; ++i) own[i] = sums_of_group(chunk, abstained, first + i);
    for (std::int64_t i = 0; i < count; ++i) {
      affine[i] = affine_of_group(own[i], p, batch, tokens, chunk.flat[first + i]);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      write_group(chunk, abstained, first + i, affine[i]);
      const bool raw = p.raw_singleton && own[i].count == 1;
      if (p.score_center == Scope::leave_one_out && !raw) write_means_of_others(chunk, abstained, first + i, own[i]);
    }
  }
}

MAESTRO_CLONES
Moments moments_of_chunk(const Chunk& chunk, bool per_token) {
  Moments all;
  const bool abstained = *chunk.abstained;
  double shift = 0;
  bool weighty = false;  // whether the shift has a positive weight; it has one if any value has
  for (std::int64_t r = 0; r < chunk.rows && !weighty; ++r) {
    if (abstained && chunk.live[r] == 0) continue;
    weighty = !per_token || chunk.lengths[r] > 0;
    if (weighty || !all.any) shift = chunk.scores[r];
    all.any = true;
  }
  if (!all.any) return all;
  Double4 weights = splat(0.0), total = splat(0.0), squares = splat(0.0), top = splat(shift);
  std::int64_t r = 0;
  for (; r < chunk.rows; r += 4) {
    const std::int64_t n = std::min<std::int64_t>(4, chunk.rows - r);
    Double4 score = splat(shift), weight = splat(0.0);
    if (n == 4) {
      score = load4(chunk.scores + r);
      weight = per_token ? load4(chunk.lengths + r) : splat(1.0);
      if (abstained) {
        const Double4 live = load4(chunk.live + r);
        score = live != 0.0 ? score : splat(shift);
        weight *= live;
      }
    } else {
      for (std::int64_t i = 0; i < n; ++i) {
        if (abstained && chunk.live[r + i] == 0) continue;
        score[i] = chunk.scores[r + i];
        weight[i] = per_token ? static_cast<double>(chunk.lengths[r + i]) : 1.0;
      }
    }
    const Double4 d = score - shift;
    top = max4(top, score);
    weights += weight;
    total += weight * d;
    squares += weight * d * d;
  }
  all.weight = sum(weights);
  all.top = std::max(std::max(top[0], top[1]), std::max(top[2], top[3]));
  const double m = all.weight > 0 ? sum(total) / all.weight : 0.0;
  all.mean = shift + m;
  all.squares = std::max(sum(squares) - sum(total) * m, 0.0);
  return all;
}

}  // namespace

void finish_rows(const Chunk& chunk, const AdvantageProfile& p, const Center& batch, const Center& tokens) {
  finish_chunk(chunk, p, batch, tokens);
}

Moments score_moments(const Chunk& chunk, bool per_token) { return moments_of_chunk(chunk, per_token); }

void Moments::add(const Moments& more) {
  if (!more.any) return;
  if (!any) {
    *this = more;
    return;
  }
  top = std::max(top, more.top);
  const double both = weight + more.weight, apart = more.mean - mean;
  if (both > 0) {
    mean += apart * (more.weight / both);
    squares += more.squares + apart * apart * (weight * (more.weight / both));
  }
  weight = both;
}

Center::Center(const Moments& moments, int ddof) {
  const double divisor = std::max(moments.weight, 1.0);
  mean = moments.top + moments.weight * (moments.mean - moments.top) / divisor;
  if (moments.weight >= 1) mean = moments.mean;
  const double off = moments.mean - mean;
  const double squares = moments.squares + moments.weight * off * off;
  std = std::sqrt(squares / std::max(moments.weight - ddof, 1.0));
}

}  // namespace maestro_fast
