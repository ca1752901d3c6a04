// Size of a maximum matching between the rows and the columns of a sparse pattern (Hopcroft & Karp
// 1973), which is the pattern's structural rank: the rank of almost every matrix with these
// non-zeros.
#pragma once

#include <cstdint>
#include <vector>

namespace tscnc {

class BipartiteMatching {
 public:
  // Neighbours of left vertex i: neighbours[begin[i]] to neighbours[begin[i + 1] - 1], each below
  // right_count.
  BipartiteMatching(const std::vector<int64_t>& begin, const std::vector<int32_t>& neighbours,
                    int64_t right_count)
      : begin_(begin),
        neighbours_(neighbours),
        left_count_(static_cast<int64_t>(begin.size()) - 1),
        left_match_(left_count_, -1),
        right_match_(right_count, -1),
        level_(left_count_),
        next_(left_count_) {}

  int64_t size() {
    int64_t matched = match_greedily();
    while (build_levels()) {
      next_.assign(begin_.begin(), begin_.end() - 1);
      for (int64_t i = 0; i < left_count_; ++i) {
        if (left_match_[i] < 0 && augment(i)) ++matched;
      }
    }
    return matched;
  }

 private:
  int64_t match_greedily() {
    int64_t matched = 0;
    for (int64_t i = 0; i < left_count_; ++i) {
      for (int64_t e = begin_[i]; e < begin_[i + 1]; ++e) {
        if (right_match_[neighbours_[e]] >= 0) continue;
        right_match_[neighbours_[e]] = static_cast<int32_t>(i);
        left_match_[i] = neighbours_[e];
        ++matched;
        break;
      }
    }
    return matched;
  }

  // Distances from the free left vertices along alternating paths; whether one ends at a free right
  // vertex.
  bool build_levels() {
    queue_.clear();
    for (int64_t i = 0; i < left_count_; ++i) {
      level_[i] = left_match_[i] < 0 ? 0 : -1;
      if (level_[i] == 0) queue_.push_back(static_cast<int32_t>(i));
    }
    bool reaches_free = false;
    for (size_t head = 0; head < queue_.size(); ++head) {
      const int32_t i = queue_[head];
      for (int64_t e = begin_[i]; e < begin_[i + 1]; ++e) {
        const int32_t partner = right_match_[neighbours_[e]];
        if (partner < 0) {
          reaches_free = true;
        } else if (level_[partner] < 0) {
          level_[partner] = level_[i] + 1;
          queue_.push_back(partner);
        }
      }
    }
    return reaches_free;
  }

  // Depth-first search from a free vertex through rising levels, on an explicit stack: paths can be
  // as long as the pattern has rows. Every edge is looked at once per phase.
  bool augment(int64_t root) {
    stack_.assign(1, static_cast<int32_t>(root));
    while (!stack_.empty()) {
      const int32_t i = stack_.back();
      if (next_[i] == begin_[i + 1]) {
        level_[i] = -1;
        stack_.pop_back();
        if (!stack_.empty()) ++next_[stack_.back()];
        continue;
      }
      const int32_t partner = right_match_[neighbours_[next_[i]]];
      if (partner < 0) {
        for (const int32_t vertex : stack_) {
          left_match_[vertex] = neighbours_[next_[vertex]];
          right_match_[left_match_[vertex]] = vertex;
        }
        return true;
      }
      if (level_[partner] == level_[i] + 1) {
        stack_.push_back(partner);
      } else {
        ++next_[i];
      }
    }
    return false;
  }

  const std::vector<int64_t>& begin_;
  const std::vector<int32_t>& neighbours_;
  int64_t left_count_;
  std::vector<int32_t> left_match_, right_match_, level_;
  std::vector<int64_t> next_;
  std::vector<int32_t> queue_, stack_;
};

}  // namespace tscnc
