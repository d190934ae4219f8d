// The advantages that responses would have under other weights. maestro_fast/ops/counterfactual_advantages.py has the
// formula.
#pragma once

#include "group_advantages.hpp"

namespace maestro_fast {

// Writes out [B, A] for action_weights [A, K] in O(B (A K + 1)). The profile must compare scores within groups.
void counterfactual_advantages(const AdvantageInputs& in, const float* action_weights, std::int64_t actions,
                               const Partition& groups, const AdvantageProfile& profile, float* out, int threads);

}  // namespace maestro_fast
