// Rows of a language-model head's logits: log-probs and entropies, and their gradient. maestro_fast/ops/head_rows.py has
// the formulas; one row is one token.
#pragma once

#include <cstdint>

namespace maestro_fast {

// Logits [rows, columns] before scale, bias and soft cap; `stride` elements lie between the starts of two rows.
struct LogitRows {
  float* x;
  std::int64_t rows, columns, stride;
  const std::int64_t* targets;  // [rows]
};

// y = softcap(scale x + bias), which the temperature then divides.
struct HeadNumbers {
  const float* bias;  // [columns] or null
  float scale;
  float softcap;  // 0 stands for none
  float temperature;
  std::int64_t ignore_index;
};

// The statistics of each row. `entropies` is null where they are not wanted.
struct RowStatistics {
  float *logprobs, *peaks, *totals, *entropies;
};

// dL/dlog p and dL/dH of each row; `dentropies` is null where dL/dH is 0.
struct RowGradients {
  const float *dlogprobs, *dentropies;
};

// Fills the statistics. Ignored rows are not read; they get 0, and a total of 1. A target out of range gives NaN.
void row_statistics(const LogitRows& logits, const HeadNumbers& head, const RowStatistics& out, int threads);

// Overwrites the logits with dL/d(scale x + bias). It is 0 in ignored rows and where both gradients are 0. Of `stats` it
// reads the peaks and totals, and with `dentropies` the entropies.
void dlogits(const LogitRows& logits, const HeadNumbers& head, const RowStatistics& stats,
             const RowGradients& gradients, int threads);

}  // namespace maestro_fast
