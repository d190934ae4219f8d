#include "balance_sequences.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <string>

namespace maestro_fast {
namespace {

constexpr std::int64_t kNone = -1;

void check(const std::int64_t* lengths, std::size_t count, std::int64_t parts, bool equal_size) {
  if (parts <= 0) throw std::invalid_argument("parts: got " + std::to_string(parts) + ", expected at least 1");
  if (count < static_cast<std::size_t>(parts)) {
    throw std::invalid_argument("lengths: got " + std::to_string(count) + " sequences, expected at least parts = " +
                                std::to_string(parts));
  }
  if (equal_size && count % static_cast<std::size_t>(parts) != 0) {
    throw std::invalid_argument("lengths: got " + std::to_string(count) + " sequences, expected a multiple of parts = " +
                                std::to_string(parts) + " with equal_size");
  }
  std::int64_t room = std::numeric_limits<std::int64_t>::max();
  for (std::size_t i = 0; i < count; ++i) {
    if (lengths[i] < 0) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "]: got " + std::to_string(lengths[i]) +
                                  ", expected at least 0");
    }
    if (lengths[i] > room) throw std::invalid_argument("lengths: their sum is beyond int64");
    room -= lengths[i];
  }
}

// A set of sequences is a chain of indices. Balance::next_ has the links.
struct Set {
  std::int64_t total = 0, size = 0, first = kNone, last = kNone;
};

bool more(const Set& a, const Set& b) {
  // Equal totals are ordered by size: an empty set comes after a set of sequences without tokens, so that the empty set
  // gets filled. Equal sizes are ordered by index, so the order is strict, and the result depends on the lengths alone.
  if (a.total != b.total) return a.total > b.total;
  if (a.size != b.size) return a.size > b.size;
  return a.first < b.first;
}

// A split deals some of the sequences into as many sets as there are parts. The largest set comes first.
struct Split {
  std::vector<Set> sets;
  std::int64_t age;

  std::int64_t spread() const { return sets.front().total - sets.back().total; }
};

struct SmallerSpread {
  const std::vector<Split>& splits;

  bool operator()(std::size_t a, std::size_t b) const {
    const std::int64_t left = splits[a].spread(), right = splits[b].spread();
    return left != right ? left < right : splits[a].age > splits[b].age;
  }
};

class Balance {
 public:
  Balance(const std::int64_t* lengths, std::size_t count, std::size_t parts, bool equal_size)
      : lengths_(lengths), next_(count, kNone), parts_(parts) {
    std::vector<std::size_t> longest_first(count);
    std::iota(longest_first.begin(), longest_first.end(), std::size_t{0});
    std::stable_sort(longest_first.begin(), longest_first.end(),
                     [lengths](std::size_t a, std::size_t b) { return lengths[a] > lengths[b]; });
    // With equal sizes a split starts as one sequence per part, of neighbouring lengths. Merging adds up the sizes.
    const std::size_t step = equal_size ? parts : 1;
    for (std::size_t i = 0; i < count; i += step) add(longest_first.data() + i, step);
  }

  // Merges the two splits of the largest spreads, the largest sets of one with the smallest of the other, until one is
  // left.
  const std::vector<Set>& run() {
    std::priority_queue<std::size_t, std::vector<std::size_t>, SmallerSpread> widest(SmallerSpread{splits_});
    for (std::size_t i = 0; i < splits_.size(); ++i) widest.push(i);
    while (widest.size() > 1) {
      const std::size_t into = widest.top();
      widest.pop();
      const std::size_t from = widest.top();
      widest.pop();
      merge(splits_[into], splits_[from]);
      widest.push(into);
    }
    return splits_[widest.top()].sets;
  }

  std::vector<std::int64_t> members(const Set& set) const {
    std::vector<std::int64_t> indices;
    for (std::int64_t i = set.first; i != kNone; i = next_[static_cast<std::size_t>(i)]) indices.push_back(i);
    std::sort(indices.begin(), indices.end());
    return indices;
  }

 private:
  void add(const std::size_t* indices, std::size_t count) {
    Split split{std::vector<Set>(parts_), age_++};
    for (std::size_t s = 0; s < count; ++s) {
      const auto i = static_cast<std::int64_t>(indices[s]);
      split.sets[s] = {lengths_[indices[s]], 1, i, i};
    }
    splits_.push_back(std::move(split));
  }

  void merge(Split& into, Split& from) {
    for (std::size_t s = 0; s < parts_; ++s) join(into.sets[s], from.sets[parts_ - 1 - s]);
    std::sort(into.sets.begin(), into.sets.end(), more);
    into.age = age_++;
    from.sets = {};
  }

  void join(Set& into, const Set& from) {
    if (from.size == 0) return;
    if (into.size == 0) {
      into = from;
      return;
    }
    next_[static_cast<std::size_t>(into.last)] = from.first;
    into.last = from.last;
    into.total += from.total;
    into.size += from.size;
  }

  const std::int64_t* lengths_;
  std::vector<std::int64_t> next_;
  std::size_t parts_;
  std::vector<Split> splits_;
  std::int64_t age_ = 0;
};

}  // namespace

std::vector<std::vector<std::int64_t>> balance_sequences(const std::int64_t* lengths, std::size_t count,
                                                         std::int64_t parts, bool equal_size) {
  check(lengths, count, parts, equal_size);
  Balance balance(lengths, count, static_cast<std::size_t>(parts), equal_size);
  std::vector<std::vector<std::int64_t>> result;
  for (const Set& set : balance.run()) result.push_back(balance.members(set));
  std::sort(result.begin(), result.end());
  return result;
}

}  // namespace maestro_fast
