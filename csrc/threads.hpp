// The number of threads for a piece of work.
#pragma once

#include <cstdint>

namespace maestro_fast {

// At most `wanted` threads, and one for each `grain` of `work`. It is 1 in a forked child, where libgomp would wait for
// ever for the threads that the parent had started.
int useful_threads(int wanted, std::int64_t work, std::int64_t grain);

}  // namespace maestro_fast
