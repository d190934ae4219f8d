// The Conductor's forward with a linear network. maestro_fast/ops/conductor_weights.py has the formula.
#pragma once

#include <cstdint>

namespace maestro_fast {

struct ConductorHead {
  const float *mean, *rstd;    // [d]; null where h is not to be standardised
  const float *weight, *bias;  // [K, d], [K]
  std::int64_t size, actions;  // d, K
};

struct ConductorChoice {
  double tau, min_prob, alpha;
  bool soft;
  std::uint64_t seed;
  std::uint32_t step;
  std::uint64_t offset;
};

struct ConductorOutputs {
  float* weights;         // [B, K]
  std::int64_t* actions;  // [B]
  float *log_probs, *entropy, *probs;  // [B], [B], [B, K]
};

// h is [B, d], float32 or bfloat16. The results of a response depend on its own row and index, not on the rest of the
// batch.
void conductor_weights(const void* h, bool bfloat16, std::int64_t batch, const ConductorHead& head,
                       const ConductorChoice& choice, const ConductorOutputs& out, int threads);

}  // namespace maestro_fast
