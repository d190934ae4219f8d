// A run of whole groups is the unit of work. It is small enough for the first cache, and cut without regard to the
// number of threads, so that every sum over the batch has one order.
#pragma once

#include <cstdint>
#include <vector>

#include "group_advantages.hpp"

namespace maestro_fast {

constexpr std::int64_t kRowsPerChunk = 256;

// Rows padded to a multiple of four, the width of a vector.
inline std::int64_t padded(std::int64_t count) { return (count + 3) / 4 * 4; }

// A sample's moments. The sums are of x - shift, for a shift out of the sample. Identical values then have a spread of
// exactly 0, and since no value is further than sqrt(n) standard deviations from the mean (Samuelson), the sum of
// squares loses at most log2(n) of its 53 bits.
struct Moments {
  double weight = 0, mean = 0, squares = 0;  // squares: sum of (x - mean)^2
  double top = 0;                            // the largest live value, 0 without one
  bool any = false;

  void add(const Moments& more);  // Chan, Golub, LeVeque 1979
};

// The mean and standard deviation that a scope uses. The lengths may sum to less than one token. Then both moments are
// taken about the largest value, as the reference does.
struct Center {
  double mean = 0, std = 0;

  Center() = default;
  Center(const Moments& moments, int ddof);
};

// The mean and the factor of each reward whose scope is the whole batch, [K padded].
struct BatchColumns {
  std::vector<double> mean, factor, count;
};

// Contiguous rows in the order of the groups, and room for what is found out about them.
struct Chunk {
  std::int64_t groups, rows, K;
  const std::int64_t* begin;  // [groups + 1], from 0
  const float* rewards;       // [rows, K]
  const float* weights;       // [rows, K], or [K] with a stride of 0
  std::int64_t weight_stride;
  const double* shared_weights;  // [K padded] with zeros, where the stride is 0
  const float *kl, *lengths;  // [rows] or null
  double beta;

  double *raw, *scores;       // [rows]; the score before and after the KL (one array without a KL)
  double* live;               // [rows] 1 or 0, written if some response abstained
  double *center, *factor;    // [groups, K padded]
  bool* flat;                 // [groups], whether a group has no spread
  double* count;              // [groups], live responses
  bool* abstained;            // whether some reward abstained

  AdvantageOutputs out;
};

// Fills raw, scores, live, flat, count, abstained and out.normalized.
void score_rows(const Chunk& chunk, const AdvantageProfile& profile, const BatchColumns& batch);

// The moments of the live scores of the chunk, each counted once or once per token.
Moments score_moments(const Chunk& chunk, bool per_token);

// Fills every output but out.normalized.
void finish_rows(const Chunk& chunk, const AdvantageProfile& profile, const Center& batch, const Center& tokens);

}  // namespace maestro_fast
