// The whole batch, divided into chunks of whole groups. Where responses are not in the order of their groups, the rows
// of a chunk are gathered into memory of its own.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "chunk.hpp"
#include "threads.hpp"

namespace maestro_fast {

// Uninitialised memory, which has to be written before it is read. A std::vector would fill it with zeros.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(std::int64_t count) : values_(new T[static_cast<std::size_t>(count)]) {}
  T* at(std::int64_t i) const { return values_.get() + i; }

 private:
  std::unique_ptr<T[]> values_;
};

// Intermediate results for rows and groups, either of one chunk or of the whole batch. Chunk explains them.
struct State {
  State(std::int64_t rows, std::int64_t groups) : raw(rows), scores(rows), live(rows), count(groups), flat(groups) {}
  Scratch<double> raw, scores, live, count;
  Scratch<bool> flat;
};

class Batch {
 public:
  // With `keep`, the intermediate results of all chunks are kept for a second stage. Without outputs (null pointers)
  // the results go to memory of the thread.
  Batch(const AdvantageInputs& in, const Partition& groups, const AdvantageProfile& profile,
        const AdvantageOutputs& out, bool keep);

  // The memory of one thread.
  struct Workspace {
    explicit Workspace(const Batch& batch);
    Scratch<std::int64_t> begin;
    Scratch<double> columns;
    Scratch<float> gathered;
    Scratch<bool> degenerate;
    State state;
  };

  // Runs stage(number of the chunk, chunk) for every chunk, on up to `threads` threads.
  template <class Stage>
  void each_chunk(int threads, bool with_inputs, const Stage& stage) const {
    const int useful = useful_threads(threads, groups.batch * K, kElementsPerThread);
#pragma omp parallel num_threads(useful) if (useful > 1)
    {
      const Workspace work(*this);
#pragma omp for schedule(static)
      for (std::int64_t c = 0; c < chunks; ++c) stage(c, prepared(c, work, with_inputs));
    }
  }

  bool in_order() const { return groups.size != 0; }
  std::int64_t first_row(std::int64_t c) const { return groups.begin(std::min(c * per_chunk, groups.groups)); }
  std::int64_t source(std::int64_t position) const { return in_order() ? position : groups.order[position]; }

  const AdvantageInputs& in;
  const Partition& groups;
  const AdvantageProfile& profile;
  const AdvantageOutputs& out;
  const std::int64_t K;
  std::int64_t per_chunk, chunks, rows = 0;  // groups per chunk, number of chunks, rows of the largest chunk
  BatchColumns columns;

 private:
  static constexpr std::int64_t kElementsPerThread = 1 << 16;  // with fewer, another thread costs more than it saves

  Chunk prepared(std::int64_t c, const Workspace& work, bool with_inputs) const;
  void place_inputs(Chunk& chunk, std::int64_t row, float* gathered) const;
  void place_outputs(Chunk& chunk, std::int64_t row, const Workspace& work) const;
  const float* rows_of(const float* values, std::int64_t width, std::int64_t row, std::int64_t count, float* to) const;
  void measure_columns();

  std::vector<float> ones_;
  std::vector<double> shared_weights_;
  Scratch<bool> abstained_;
  std::unique_ptr<State> kept_;
};

}  // namespace maestro_fast
