#include "number_keys.hpp"

#include <algorithm>
#include <charconv>
#include <functional>
#include <stdexcept>
#include <string>

namespace maestro_fast {
namespace {

// Gives equal texts equal numbers, from 0 by first occurrence: a hash table with open addressing, at most half full.
class Numbering {
 public:
  explicit Numbering(std::size_t most) {
    texts_.reserve(most);
    std::size_t slots = 2;
    while (slots < 2 * most) slots *= 2;
    slots_.assign(slots, -1);
  }

  std::int64_t of(std::string_view text) {
    if (last_ >= 0 && text == texts_[static_cast<std::size_t>(last_)]) return last_;  // groups often stand together
    std::size_t slot = std::hash<std::string_view>()(text);
    for (;; ++slot) {
      slot &= slots_.size() - 1;
      last_ = slots_[slot];
      if (last_ < 0) break;
      if (texts_[static_cast<std::size_t>(last_)] == text) return last_;
    }
    last_ = slots_[slot] = count();
    texts_.push_back(text);
    return last_;
  }

  std::int64_t count() const { return static_cast<std::int64_t>(texts_.size()); }

 private:
  std::vector<std::string_view> texts_;  // by number
  std::vector<std::int64_t> slots_;
  std::int64_t last_ = -1;
};

[[noreturn]] void refuse(std::string_view key) {
  throw std::invalid_argument("keys: '" + std::string(key) + "', expected uid_session_output");
}

}  // namespace

Numbers number_keys(const std::vector<std::string_view>& keys, const bool* skip, std::int64_t* group) {
  Numbering groups(keys.size());
  for (std::size_t i = 0; i < keys.size(); ++i) group[i] = skip && skip[i] ? -1 : groups.of(keys[i]);
  return {groups.count(), 0};
}

Numbers number_keys(const std::vector<std::string_view>& keys, const bool* skip, std::int64_t* group,
                    std::int64_t* session, std::int64_t* output) {
  Numbering groups(keys.size()), sessions(keys.size());
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const std::string_view key = keys[i];
    const std::size_t second = key.rfind('_');
    if (second == key.npos || second == 0) refuse(key);
    const std::size_t first = key.rfind('_', second - 1);
    const char *begin = key.data() + second + 1, *end = key.data() + key.size();
    if (first == key.npos || begin == end || *begin < '0' || *begin > '9') refuse(key);
    const auto [stop, error] = std::from_chars(begin, end, output[i]);
    if (error != std::errc() || stop != end) refuse(key);
    const bool skipped = skip && skip[i];
    group[i] = skipped ? -1 : groups.of(key.substr(0, first));
    session[i] = skipped ? -1 : sessions.of(key.substr(0, second));
  }
  return {groups.count(), sessions.count()};
}

std::int64_t order_by_group(const std::int64_t* ids, std::int64_t batch, std::int64_t groups, std::int64_t* order,
                            std::int64_t* offsets) {
  std::fill_n(offsets, groups + 1, std::int64_t{0});
  for (std::int64_t i = 0; i < batch; ++i) {
    if (ids[i] < 0 || ids[i] >= groups) {
      throw std::invalid_argument("ids: " + std::to_string(ids[i]) + ", expected 0 to " + std::to_string(groups - 1));
    }
    ++offsets[ids[i] + 1];
  }
  const std::int64_t widest = *std::max_element(offsets, offsets + groups + 1);
  for (std::int64_t g = 0; g < groups; ++g) offsets[g + 1] += offsets[g];
  std::vector<std::int64_t> next(offsets, offsets + groups);
  for (std::int64_t i = 0; i < batch; ++i) order[next[static_cast<std::size_t>(ids[i])]++] = i;
  return widest;
}

}  // namespace maestro_fast
