// A draw by inverting the mass cumulated in token order, in two passes over blocks of a row: their
// masses are added up, then the block and the token in it are found.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace mpg::cpu {

// A is the op's accumulation type. In double a row is a single block, added in the order of its
// tokens as the twins do; in float blocks are added in lanes.
template <class A>
class InverseCdf {
 public:
  // fill(begin, size, masses) writes the masses of `size` tokens from `begin` on.
  using Fill = std::function<void(int64_t, int64_t, double*)>;
  InverseCdf(int64_t V, Fill fill);

  double total() const { return total_; }  // NaN where a mass is
  int64_t draw(double uniform);            // 0 where there is no mass or NaN

 private:
  int64_t fill_block(int64_t begin);  // its size

  int64_t V_, block_size_;
  Fill fill_;
  std::vector<double> masses_;  // of one block
  std::vector<double> block_masses_;
  double total_ = 0;
};

}  // namespace mpg::cpu
