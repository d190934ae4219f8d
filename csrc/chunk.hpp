// A run of whole groups, the unit of work: small enough for the first cache, and cut without regard to the number of
// threads, so that every sum over the batch has one order.
#pragma once

#include <cstdint>
#include <vector>

#include "group_advantages.hpp"

namespace maestro_fast {

constexpr std::int64_t kRowsPerChunk = 256;

// Rows padded to a multiple of four, the width of a vector.
inline std::int64_t padded(std::int64_t count) { return (count + 3) / 4 * 4; }

// A sample's moments. What is added up is x - shift, for a shift out of the sample: identical values then have a spread
// of exactly 0, and since no value is further than sqrt(n) standard deviations from the mean (Samuelson), the sum of
// squares loses at most log2(n) of its 53 bits.
struct Moments {
  double weight = 0, mean = 0, squares = 0;  // squares: sum of (x - mean)^2
  double top = 0;                            // the largest live value, 0 without one
  bool any = false;

  void add(const Moments& more);  // Chan, Golub, LeVeque 1979
};

// The mean and standard deviation that a scope uses. Lengths may be fractions of a token in all: with a weight below 1
// both are taken about the largest value, as the reference does.
struct Center {
  double mean = 0, std = 0;

  Center() = default;
  Center(const Moments& moments, int ddof);
};

// What a reward over the whole batch is centred and scaled by, [K padded].
struct BatchColumns {
  std::vector<double> mean, factor, count;
};

// Rows in the order of the groups, contiguous.
struct Chunk {
  std::int64_t groups, rows, K;
  const std::int64_t* begin;  // [groups + 1], from 0
  const float* rewards;       // [rows, K]
  const float* weights;       // [rows, K], or [K] with a stride of 0
  std::int64_t weight_stride;
  const double* shared_weights;  // [K padded] with zeros, where the stride is 0
  const float *kl, *lengths;  // [rows] or null
  double beta;

  double *raw, *scores;       // [rows]; the score before the KL, and after (the same array without a KL)
  double* live;               // [rows] 1 or 0, written if some response abstained
  double *center, *factor;    // [groups, K padded]
  bool* flat;                 // [groups], no spread
  double* count;              // [groups], live responses
  bool* abstained;            // whether some reward did

  AdvantageOutputs out;
};

// Fills raw, scores, live, flat, count, abstained and out.normalized.
void score_rows(const Chunk& chunk, const AdvantageProfile& profile, const BatchColumns& batch);

// The moments of the live scores of the chunk, each counted once or once per token.
Moments score_moments(const Chunk& chunk, bool per_token);

// Fills every output but out.normalized.
void finish_rows(const Chunk& chunk, const AdvantageProfile& profile, const Center& batch, const Center& tokens);

}  // namespace maestro_fast
