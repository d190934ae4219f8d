// Splitting sequences into a given number of parts of nearly equal length: the largest differencing method.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace maestro_fast {

// parts[p]: the indices of the sequences in part p, ascending; parts by their first index.
// Throws std::invalid_argument for parts <= 0, for fewer sequences than parts, for a negative length, for lengths whose
// sum is beyond int64, and with equal_size for a count that parts does not divide.
// O(count log count + count parts log parts) time, with equal_size count instead of count parts.
std::vector<std::vector<std::int64_t>> balance_sequences(const std::int64_t* lengths, std::size_t count,
                                                         std::int64_t parts, bool equal_size);

}  // namespace maestro_fast
