// Numbers for the keys of responses, and the groups that follow from them. maestro_fast/ops/groups.py says what for.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace maestro_fast {

struct Numbers {
  std::int64_t groups = 0, sessions = 0;
};

// Numbers keys by their first occurrence, and equal keys alike. Keys that are left out (`skip`, which may be null) get -1.
Numbers number_keys(const std::vector<std::string_view>& keys, const bool* skip, std::int64_t* group);

// The same for keys "{group}_{session}_{output}", whose group may hold underscores: the number of the group, that of
// "{group}_{session}", and the output. Throws std::invalid_argument for a key of another form.
Numbers number_keys(const std::vector<std::string_view>& keys, const bool* skip, std::int64_t* group,
                    std::int64_t* session, std::int64_t* output);

// Sorts responses by group: order [batch] and offsets [groups + 1]. Returns the size of the largest group. Throws
// std::invalid_argument for an id outside 0 .. groups - 1.
std::int64_t order_by_group(const std::int64_t* ids, std::int64_t batch, std::int64_t groups, std::int64_t* order,
                            std::int64_t* offsets);

}  // namespace maestro_fast
