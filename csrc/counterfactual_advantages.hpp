// What a response's advantage would have been under other weights; the formula: maestro_fast/ops.
#pragma once

#include "group_advantages.hpp"

namespace maestro_fast {

// action_weights [A, K], out [B, A]. The profile compares scores within groups. O(B (A K + 1)).
void counterfactual_advantages(const AdvantageInputs& in, const float* action_weights, std::int64_t actions,
                               const Partition& groups, const AdvantageProfile& profile, float* out, int threads);

}  // namespace maestro_fast
