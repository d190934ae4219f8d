// Splits sequences into a given number of parts with nearly equal tokens, by the largest differencing method.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace maestro_fast {

// Returns parts[p], the ascending indices of the sequences in part p; parts are sorted by their first index.
// Throws std::invalid_argument for parts <= 0, for fewer sequences than parts, for a negative length, for lengths whose
// sum is beyond int64, and with equal_size for a count that parts does not divide.
// It takes O(count log count + count parts log parts) time, or with equal_size O(count log count + count log parts).
std::vector<std::vector<std::int64_t>> balance_sequences(const std::int64_t* lengths, std::size_t count,
                                                         std::int64_t parts, bool equal_size);

}  // namespace maestro_fast
