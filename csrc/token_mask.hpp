// Which tokens of a padded batch [rows, width] count, and values of rows at their tokens. maestro_fast/ops/token_mask.py
// has the formulas.
#pragma once

#include <cstdint>

namespace maestro_fast {

enum class MaskType : int { int64, int32, byte, float32 };

// Writes for each row the number of its tokens and whether these are its first ones. Returns whether every entry is 0
// or 1; the outputs mean nothing if not.
bool examine_mask(const void* mask, MaskType type, std::int64_t rows, std::int64_t width, std::int64_t* count,
                  bool* prefix, int threads);

// out[r, t] = values[r] where the mask is 1, else 0. The mask of a row whose tokens are its first ones is not read.
void spread_over_tokens(const float* values, const void* mask, MaskType type, std::int64_t rows, std::int64_t width,
                        const std::int64_t* count, const bool* prefix, float* out, int threads);

// out[r] = the sum of row r, accumulated in double.
void sum_over_tokens(const float* values, std::int64_t rows, std::int64_t width, float* out, int threads);

}  // namespace maestro_fast
