// How many threads a piece of work runs on.
#pragma once

#include <cstdint>

namespace maestro_fast {

// At most `wanted` threads, one per `grain` of `work`. It is one in a forked child, where libgomp would wait for ever
// for the threads that the parent had started.
int useful_threads(int wanted, std::int64_t work, std::int64_t grain);

}  // namespace maestro_fast
