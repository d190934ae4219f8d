// Group-relative advantages. maestro_fast/ops/group_advantages.py has the formula and the meaning of every output.
#pragma once

#include <cstdint>

namespace maestro_fast {

enum class Scope : int { none, group, batch, leave_one_out, tokens };

struct AdvantageProfile {
  Scope reward_center, reward_scale, score_center, score_scale;
  double reward_eps, score_eps;
  int ddof;
  bool raw_singleton;    // a group with one live response keeps the raw value
  bool renormalize;      // the weights of live rewards are scaled up to the sum of all weights of the row
  bool eps_in_variance;  // the score is divided by sqrt(std^2 + eps)

  bool rewards_as_they_are() const { return reward_center == Scope::none && reward_scale == Scope::none; }
  bool rewards_over(Scope scope) const { return reward_center == scope || reward_scale == scope; }
  bool scores_over(Scope scope) const { return score_center == scope || score_scale == scope; }
};

// B responses in N groups, which are consecutive and have `size` responses each. If size is 0, group g has the
// responses order[offsets[g]] to order[offsets[g + 1] - 1].
struct Partition {
  std::int64_t groups, batch, size;
  const std::int64_t* offsets;
  const std::int64_t* order;

  std::int64_t begin(std::int64_t group) const { return size ? group * size : offsets[group]; }
};

struct AdvantageInputs {
  const void* rewards;  // [B, K] float32, or bfloat16
  bool bfloat16;
  std::int64_t rewards_per_row;  // K
  const float* weights;          // [B, K], [K], or null for ones
  bool weights_per_row;
  const float* kl;  // [B] or null
  double beta;
  const float* lengths;  // [B], or null without the scope tokens
};

struct AdvantageOutputs {
  float *advantages, *scores, *normalized, *mean, *std;  // [B], normalized [B, K]
  bool* degenerate;                                      // [B]
};

// Writes every element of the outputs, with the same bits for any number of threads.
void group_advantages(const AdvantageInputs& in, const Partition& groups, const AdvantageProfile& profile,
                      const AdvantageOutputs& out, int threads);

}  // namespace maestro_fast
