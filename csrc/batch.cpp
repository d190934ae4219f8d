#include "batch.hpp"

#include <cstring>

namespace maestro_fast {
namespace {

// A bfloat16 is the upper half of a float32.
float widened(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

Batch::Batch(const AdvantageInputs& in, const Partition& groups, const AdvantageProfile& profile,
             const AdvantageOutputs& out, bool keep)
    : in(in), groups(groups), profile(profile), out(out), K(in.rewards_per_row), ones_(padded(K), 1.0f) {
  per_chunk = std::max<std::int64_t>(1, kRowsPerChunk * groups.groups / groups.batch);
  chunks = (groups.groups + per_chunk - 1) / per_chunk;
  for (std::int64_t c = 0; c < chunks; ++c) rows = std::max(rows, first_row(c + 1) - first_row(c));
  abstained_ = Scratch<bool>(chunks);
  if (!in.weights_per_row) {
    shared_weights_.assign(static_cast<std::size_t>(padded(K)), 0.0);
    std::copy_n(in.weights == nullptr ? ones_.data() : in.weights, K, shared_weights_.begin());
  }
  if (keep) kept_ = std::make_unique<State>(groups.batch, groups.groups);
  if (profile.rewards_over(Scope::batch)) measure_columns();
}

// `gathered` has room for rewards, weights and normalized [rows, K], and for kl, lengths and four outputs [rows].
Batch::Workspace::Workspace(const Batch& b)
    : begin(b.per_chunk + 1),
      columns(b.profile.rewards_as_they_are() ? 0 : 2 * b.per_chunk * padded(b.K)),
      gathered(b.in_order() && !b.in.bfloat16 && b.out.normalized != nullptr ? 0 : b.rows * (3 * b.K + 6)),
      degenerate(b.in_order() ? 0 : b.rows),
      state(b.kept_ ? 0 : b.rows, b.kept_ ? 0 : b.per_chunk) {}

Chunk Batch::prepared(std::int64_t c, const Workspace& work, bool with_inputs) const {
  const std::int64_t group = c * per_chunk, row = first_row(c);
  Chunk chunk{};
  chunk.groups = std::min(per_chunk, groups.groups - group);
  chunk.rows = first_row(c + 1) - row;
  chunk.K = K;
  for (std::int64_t g = 0; g <= chunk.groups; ++g) *work.begin.at(g) = groups.begin(group + g) - row;
  chunk.begin = work.begin.at(0);
  chunk.beta = in.beta;
  if (!profile.rewards_as_they_are()) {
    chunk.center = work.columns.at(0);
    chunk.factor = work.columns.at(per_chunk * padded(K));
  }
  const State& state = kept_ ? *kept_ : work.state;
  const std::int64_t r = kept_ ? row : 0, g = kept_ ? group : 0;
  chunk.raw = state.raw.at(r);
  chunk.scores = in.kl == nullptr ? chunk.raw : state.scores.at(r);
  chunk.live = state.live.at(r);
  chunk.flat = state.flat.at(g);
  chunk.count = state.count.at(g);
  chunk.abstained = abstained_.at(c);
  if (with_inputs) place_inputs(chunk, row, work.gathered.at(0));
  place_outputs(chunk, row, work);
  return chunk;
}

void Batch::place_inputs(Chunk& chunk, std::int64_t row, float* gathered) const {
  if (in.bfloat16) {
    for (std::int64_t r = 0; r < chunk.rows; ++r) {
      const auto* from = static_cast<const std::uint16_t*>(in.rewards) + source(row + r) * K;
      for (std::int64_t k = 0; k < K; ++k) gathered[r * K + k] = widened(from[k]);
    }
    chunk.rewards = gathered;
  } else {
    chunk.rewards = rows_of(static_cast<const float*>(in.rewards), K, row, chunk.rows, gathered);
  }
  chunk.weights = in.weights == nullptr ? ones_.data() : in.weights;
  chunk.shared_weights = shared_weights_.data();
  if (in.weights_per_row) {
    chunk.weight_stride = K;
    chunk.weights = rows_of(in.weights, K, row, chunk.rows, gathered + rows * K);
  }
  float* vectors = gathered + 3 * rows * K;
  if (in.kl != nullptr) chunk.kl = rows_of(in.kl, 1, row, chunk.rows, vectors);
  if (in.lengths != nullptr) chunk.lengths = rows_of(in.lengths, 1, row, chunk.rows, vectors + rows);
}

void Batch::place_outputs(Chunk& chunk, std::int64_t row, const Workspace& work) const {
  float* const vectors = work.gathered.at(0) + 3 * rows * K + 2 * rows;
  if (in_order() && out.normalized != nullptr) {
    chunk.out = {out.advantages + row, out.scores + row, out.normalized + row * K,
                 out.mean + row,       out.std + row,    out.degenerate + row};
  } else {
    chunk.out = {vectors,            vectors + rows,     work.gathered.at(2 * rows * K),
                 vectors + 2 * rows, vectors + 3 * rows, work.degenerate.at(0)};
  }
}

const float* Batch::rows_of(const float* values, std::int64_t width, std::int64_t row, std::int64_t count,
                            float* to) const {
  if (in_order()) return values + row * width;
  for (std::int64_t r = 0; r < count; ++r) std::copy_n(values + source(row + r) * width, width, to + r * width);
  return to;
}

// Computes the moments of whole columns, in the order of the groups. It is not optimised, because no named profile
// normalises a reward over the batch.
void Batch::measure_columns() {
  for (std::int64_t k = 0; k < K; ++k) {
    Moments all;
    for (std::int64_t position = 0; position < groups.batch; ++position) {
      const std::int64_t i = source(position) * K + k;
      const float value = in.bfloat16 ? widened(static_cast<const std::uint16_t*>(in.rewards)[i])
                                      : static_cast<const float*>(in.rewards)[i];
      if (value == value) all.add({1.0, value, 0.0, value, true});
    }
    const Center center(all, profile.ddof);
    const double divisor = center.std + profile.reward_eps;
    columns.mean.push_back(center.mean);
    columns.factor.push_back(divisor == 0 ? 0.0 : 1.0 / divisor);
    columns.count.push_back(all.weight);
  }
  for (auto* values : {&columns.mean, &columns.factor, &columns.count}) {
    values->resize(static_cast<std::size_t>(padded(K)));
  }
}

}  // namespace maestro_fast
