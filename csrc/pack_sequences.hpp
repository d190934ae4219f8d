// Packs sequences into micro-batches by first-fit decreasing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace maestro_fast {

// Returns bins[b], the ascending indices of the sequences in bin b; bins are in the order of their creation.
// Throws std::invalid_argument for max_tokens <= 0 and for a length outside 0 .. max_tokens.
// It takes O(count log count) time and O(count) memory.
std::vector<std::vector<std::int64_t>> pack_sequences(const std::int64_t* lengths, std::size_t count,
                                                      std::int64_t max_tokens);

}  // namespace maestro_fast
