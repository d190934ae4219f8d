#include "pack_sequences.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace maestro_fast {
namespace {

void check(const std::int64_t* lengths, std::size_t count, std::int64_t max_tokens) {
  if (max_tokens <= 0) {
    throw std::invalid_argument("max_tokens: got " + std::to_string(max_tokens) + ", expected at least 1");
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (lengths[i] < 0 || lengths[i] > max_tokens) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "]: got " + std::to_string(lengths[i]) +
                                  ", expected 0 to max_tokens = " + std::to_string(max_tokens));
    }
  }
}

// The free room of every bin, in a complete binary tree whose inner nodes hold the maximum of their children.
// Unused bins have all their room. Taking the leftmost bin that fits therefore opens the bins in order.
class FreeRoom {
 public:
  FreeRoom(std::size_t bins, std::int64_t capacity) {
    while (leaves_ < bins) leaves_ *= 2;
    room_.assign(2 * leaves_, capacity);
  }

  // Takes `length` from the leftmost bin that has room for it, and returns that bin.
  std::size_t take(std::int64_t length) {
    std::size_t node = 1;
    while (node < leaves_) node = room_[2 * node] >= length ? 2 * node : 2 * node + 1;
    room_[node] -= length;
    const std::size_t bin = node - leaves_;
    while (node /= 2) room_[node] = std::max(room_[2 * node], room_[2 * node + 1]);
    return bin;
  }

 private:
  std::size_t leaves_ = 1;
  std::vector<std::int64_t> room_;
};

}  // namespace

std::vector<std::vector<std::int64_t>> pack_sequences(const std::int64_t* lengths, std::size_t count,
                                                      std::int64_t max_tokens) {
  check(lengths, count, max_tokens);

  std::vector<std::size_t> longest_first(count);
  std::iota(longest_first.begin(), longest_first.end(), std::size_t{0});
  std::stable_sort(longest_first.begin(), longest_first.end(),
                   [lengths](std::size_t a, std::size_t b) { return lengths[a] > lengths[b]; });

  FreeRoom free_room(count, max_tokens);
  std::vector<std::size_t> bin_of(count);
  std::size_t used = 0;
  for (const std::size_t i : longest_first) {
    bin_of[i] = free_room.take(lengths[i]);
    used = std::max(used, bin_of[i] + 1);
  }

  std::vector<std::vector<std::int64_t>> bins(used);
  for (std::size_t i = 0; i < count; ++i) bins[bin_of[i]].push_back(static_cast<std::int64_t>(i));
  return bins;
}

}  // namespace maestro_fast
