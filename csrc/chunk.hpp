// The unit of work is a chunk of whole groups. It is small enough for the first-level cache. Its size does not depend
// on the number of threads, so that every sum over the batch has one order.
#pragma once

#include <cstdint>
#include <vector>

#include "group_advantages.hpp"

namespace maestro_fast {

constexpr std::int64_t kRowsPerChunk = 256;

// The count rounded up to a multiple of four, the width of a vector.
inline std::int64_t padded(std::int64_t count) { return (count + 3) / 4 * 4; }

// The moments of a sample. Their sums are taken of x - shift, where shift is a value of the sample. So identical values
// have a spread of exactly 0. No value is further than sqrt(n) standard deviations from the mean (Samuelson), so the
// sum of squares loses at most log2(n) of its 53 bits.
struct Moments {
  double weight = 0, mean = 0, squares = 0;  // the number of values (or tokens), their mean, the sum of (x - mean)^2
  double top = 0;                            // the largest live value, or 0 if there is none
  bool any = false;                          // whether there is a live value

  void add(const Moments& more);  // by the formula of Chan, Golub and LeVeque, 1979
};

// The mean and standard deviation of a scope. Where the lengths of its responses sum to less than one token, the
// divisors are 1, and both moments are taken about the largest value, as in the reference.
struct Center {
  double mean = 0, std = 0;

  Center() = default;
  Center(const Moments& moments, int ddof);
};

// The mean, the factor 1 / (std + eps) and the live values of each reward over the whole batch, [K padded].
struct BatchColumns {
  std::vector<double> mean, factor, count;
};

// Contiguous rows in the order of the groups, and memory for the results about them.
struct Chunk {
  std::int64_t groups, rows, K;
  const std::int64_t* begin;  // [groups + 1], the first row of each group, counted from 0
  const float* rewards;       // [rows, K]
  const float* weights;       // [rows, K], or [K] with a stride of 0
  std::int64_t weight_stride;
  const double* shared_weights;  // [K padded], the weights of all rows where the stride is 0, followed by zeros
  const float *kl, *lengths;  // [rows] or null
  double beta;

  double *raw, *scores;       // [rows], the scores before and after the KL; one array without a KL
  double* live;               // [rows], 1 or 0, written only if some reward abstained
  double *center, *factor;    // [groups, K padded], the normalised reward is (reward - center) * factor
  bool* flat;                 // [groups], whether all live scores of a group are the same
  double* count;              // [groups], the number of live responses
  bool* abstained;            // whether some reward of the chunk abstained

  AdvantageOutputs out;
};

// Fills raw, scores, live, flat, count, abstained and out.normalized.
void score_rows(const Chunk& chunk, const AdvantageProfile& profile, const BatchColumns& batch);

// The moments of the live scores of the chunk, each counted once or once per token.
Moments score_moments(const Chunk& chunk, bool per_token);

// Fills every output but out.normalized.
void finish_rows(const Chunk& chunk, const AdvantageProfile& profile, const Center& batch, const Center& tokens);

}  // namespace maestro_fast
