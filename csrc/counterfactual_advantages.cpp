// The moments of the group without j are joined from those of the responses before j and after it. Subtracting j from
// the sums of the whole group would be as quick, but would cancel where j is an outlier. Joining two parts never
// cancels.
#include "counterfactual_advantages.hpp"

#include <cmath>
#include <limits>

#include "batch.hpp"
#include "simd.hpp"

namespace maestro_fast {
namespace {

// A part of a group: the number of its live responses, the moments of their scores, and the range of their scores
// before the KL.
struct Part {
  double count = 0, mean = 0, squares = 0;
  double low = std::numeric_limits<double>::infinity(), top = -std::numeric_limits<double>::infinity();
  bool unknown = false;  // whether one of these is NaN, over which the range passes
};

MAESTRO_INLINE Part joined(const Part& a, const Part& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count, apart = b.mean - a.mean;
  return {count, a.mean + apart * (b.count / count), a.squares + b.squares + apart * apart * (a.count * b.count / count),
          a.low < b.low ? a.low : b.low, a.top > b.top ? a.top : b.top, a.unknown || b.unknown};
}

MAESTRO_INLINE Part single(const Chunk& chunk, std::int64_t r) {
  if (*chunk.abstained && chunk.live[r] == 0) return {};
  return {1, chunk.scores[r], 0, chunk.raw[r], chunk.raw[r], chunk.raw[r] != chunk.raw[r]};
}

// The weights of the actions [K, A padded] as doubles, so that the weights of four actions are adjacent.
struct Actions {
  const double* weights;
  std::int64_t count;
};

// The scores of one response under four actions, before the KL, and whether it counts under them.
struct Scores4 {
  Double4 raw;
  Mask4 live;
};

MAESTRO_INLINE Scores4 scores_under(const Chunk& chunk, const AdvantageProfile& p, const Actions& actions,
                                    std::int64_t group, std::int64_t row, std::int64_t a) {
  const std::int64_t K = chunk.K, width = padded(actions.count);
  const float* x = chunk.rewards + row * K;
  const Double4 zero = splat(0.0), one = splat(1.0);
  // The order of additions is that of sum() for a row in score_rows.cpp, so equal weights give bitwise equal scores.
  Double4 score[4] = {zero, zero, zero, zero}, whole[4] = {zero, zero, zero, zero}, rest[4] = {zero, zero, zero, zero};
  std::int64_t known = 0;
  for (std::int64_t k = 0; k < K; ++k) {
    const Double4 weight = load4(actions.weights + k * width + a);
    whole[k % 4] += weight;
    if (x[k] != x[k]) continue;
    ++known;
    double value = x[k];
    if (chunk.center != nullptr) {
      const std::int64_t at = group * padded(K) + k;
      value = (value - chunk.center[at]) * chunk.factor[at];
    }
    rest[k % 4] += weight;
    score[k % 4] += weight * value;
  }
  Scores4 result{(score[0] + score[1]) + (score[2] + score[3]), Mask4{} - (known > 0 ? 1 : 0)};
  if (p.renormalize && known < K) {
    const Double4 kept = (rest[0] + rest[1]) + (rest[2] + rest[3]);
    const Double4 all = (whole[0] + whole[1]) + (whole[2] + whole[3]);
    result.live &= kept != 0.0;
    result.raw *= all / (kept != 0.0 ? kept : one);
  }
  result.raw = result.live ? result.raw : zero;
  return result;
}

// The advantages of a response with the scores `own`, compared with the others of its group.
MAESTRO_INLINE Double4 advantages_beside(const Part& others, const Scores4& own, double penalty,
                                         const AdvantageProfile& p) {
  const Double4 zero = splat(0.0), score = own.raw - penalty, apart = score - others.mean;
  const double count = others.count + 1, share = others.count / count;
  const bool alone = others.count == 0, raw = alone && p.raw_singleton;
  const Double4 nothing = score - score;  // 0, or NaN for a score that is not finite
  Double4 centred = score;
  if (p.score_center == Scope::group && !raw) centred = alone ? nothing : apart * share;
  if (p.score_center == Scope::leave_one_out && !raw) centred = alone ? nothing : apart;
  if (p.score_scale != Scope::none) {
    const double divisor = std::max(count - p.ddof, 1.0);
    const Double4 variance = alone ? splat(raw ? 1.0 : 0.0) : (others.squares + apart * apart * share) / divisor;
    const Double4 spread = p.eps_in_variance ? sqrt4(variance + p.score_eps) : sqrt4(variance) + p.score_eps;
    centred = spread == 0.0 ? zero : centred / spread;
  }
  // A NaN among the scores before the KL counts as spread.
  const Mask4 unknown = (own.raw != own.raw) | (Mask4{} - (others.unknown ? 1 : 0));
  const Mask4 spread_out =
      (own.raw > others.low) | (own.raw < others.top) | (splat(others.top) > others.low) | unknown;
  // What is alone has nothing to be compared with, so only a NaN shows.
  const Mask4 counts = raw ? own.live : own.live & (alone ? unknown : spread_out);
  return counts ? centred : zero;
}

MAESTRO_CLONES
void counterfactual_chunk(const Chunk& chunk, const AdvantageProfile& p, const Actions& actions, Part* after,
                          float* const* rows_out) {
  for (std::int64_t g = 0; g < chunk.groups; ++g) {
    const std::int64_t first = chunk.begin[g], last = chunk.begin[g + 1];
    after[last - first] = {};
    for (std::int64_t r = last; r-- > first;) after[r - first] = joined(single(chunk, r), after[r - first + 1]);
    Part before;
    for (std::int64_t r = first; r < last; ++r) {
      const Part others = joined(before, after[r - first + 1]);
      const double penalty = chunk.kl == nullptr ? 0.0 : chunk.beta * static_cast<double>(chunk.kl[r]);
      for (std::int64_t a = 0; a < actions.count; a += 4) {
        const Scores4 own = scores_under(chunk, p, actions, g, r, a);
        store4(rows_out[r] + a, advantages_beside(others, own, penalty, p), actions.count - a);
      }
      before = joined(before, single(chunk, r));
    }
  }
}

}  // namespace

void counterfactual_advantages(const AdvantageInputs& in, const float* action_weights, std::int64_t actions,
                               const Partition& groups, const AdvantageProfile& profile, float* out, int threads) {
  if (groups.batch == 0) return;
  const std::int64_t K = in.rewards_per_row, width = padded(actions);
  std::vector<double> transposed(static_cast<std::size_t>(K * width));
  for (std::int64_t a = 0; a < actions; ++a) {
    for (std::int64_t k = 0; k < K; ++k) transposed[static_cast<std::size_t>(k * width + a)] = action_weights[a * K + k];
  }
  const AdvantageOutputs in_scratch{};
  const Batch batch(in, groups, profile, in_scratch, false);
  batch.each_chunk(threads, true, [&](std::int64_t c, const Chunk& chunk) {
    score_rows(chunk, profile, batch.columns);
    std::vector<Part> after(static_cast<std::size_t>(chunk.rows + 1));
    std::vector<float*> rows_out(static_cast<std::size_t>(chunk.rows));
    for (std::int64_t r = 0; r < chunk.rows; ++r) {
      rows_out[static_cast<std::size_t>(r)] = out + batch.source(batch.first_row(c) + r) * actions;
    }
    counterfactual_chunk(chunk, profile, {transposed.data(), actions}, after.data(), rows_out.data());
  });
}

}  // namespace maestro_fast
