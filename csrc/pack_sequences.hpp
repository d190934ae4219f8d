// First-fit-decreasing bin packing of sequences into micro-batches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace maestro_fast {

// bins[b]: the indices of the sequences in bin b, ascending; bins in order of creation.
// Throws std::invalid_argument for max_tokens <= 0 and for a length outside 0 .. max_tokens.
// O(count log count) time, O(count) memory.
std::vector<std::vector<std::int64_t>> pack_sequences(const std::int64_t* lengths, std::size_t count,
                                                      std::int64_t max_tokens);

}  // namespace maestro_fast
