#include "group_advantages.hpp"

#include <vector>

#include "batch.hpp"

namespace maestro_fast {
namespace {

// These two copy outputs from the chunk's memory to the places of the responses, if these are not the same.
void put_normalized(const Batch& batch, std::int64_t row, const Chunk& chunk) {
  if (batch.in_order()) return;
  for (std::int64_t r = 0; r < chunk.rows; ++r) {
    std::copy_n(chunk.out.normalized + r * chunk.K, chunk.K, batch.out.normalized + batch.source(row + r) * chunk.K);
  }
}

void put_vectors(const Batch& batch, std::int64_t row, const Chunk& chunk) {
  if (batch.in_order()) return;
  for (std::int64_t r = 0; r < chunk.rows; ++r) {
    const std::int64_t to = batch.source(row + r);
    batch.out.advantages[to] = chunk.out.advantages[r];
    batch.out.scores[to] = chunk.out.scores[r];
    batch.out.mean[to] = chunk.out.mean[r];
    batch.out.std[to] = chunk.out.std[r];
    batch.out.degenerate[to] = chunk.out.degenerate[r];
  }
}

Center combined(const std::vector<Moments>& parts, int ddof) {
  Moments all;
  for (const Moments& part : parts) all.add(part);
  return {all, ddof};
}

}  // namespace

void group_advantages(const AdvantageInputs& in, const Partition& groups, const AdvantageProfile& profile,
                      const AdvantageOutputs& out, int threads) {
  if (groups.batch == 0) return;
  const bool two_sweeps = profile.scores_over(Scope::batch) || profile.scores_over(Scope::tokens);
  const Batch batch(in, groups, profile, out, two_sweeps);
  const auto chunks = static_cast<std::size_t>(batch.chunks);
  std::vector<Moments> plain(profile.scores_over(Scope::batch) ? chunks : 0);
  std::vector<Moments> by_token(profile.scores_over(Scope::tokens) ? chunks : 0);

  const auto finish = [&](std::int64_t c, const Chunk& chunk, const Center& whole, const Center& tokens) {
    finish_rows(chunk, profile, whole, tokens);
    put_vectors(batch, batch.first_row(c), chunk);
  };
  batch.each_chunk(threads, true, [&](std::int64_t c, const Chunk& chunk) {
    score_rows(chunk, profile, batch.columns);
    put_normalized(batch, batch.first_row(c), chunk);
    if (!plain.empty()) plain[static_cast<std::size_t>(c)] = score_moments(chunk, false);
    if (!by_token.empty()) by_token[static_cast<std::size_t>(c)] = score_moments(chunk, true);
    if (!two_sweeps) finish(c, chunk, {}, {});
  });
  if (!two_sweeps) return;
  const Center whole = combined(plain, profile.ddof), tokens = combined(by_token, profile.ddof);
  batch.each_chunk(threads, false, [&](std::int64_t c, const Chunk& chunk) { finish(c, chunk, whole, tokens); });
}

}  // namespace maestro_fast
