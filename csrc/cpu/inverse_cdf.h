// A draw by inverting the mass cumulated in token order, in two passes over blocks of a row: their
// masses are added up, then the block and the token in it are found.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "simd.h"

namespace mpg::cpu {

MPG_INLINE double sum_in_lanes(const double* x, int64_t size) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += x[i];
  return sum;
}

// A is the op's accumulation type. In double a row is a single block, added in the order of its
// tokens as the twins do; in float blocks are added in lanes.
template <class A>
class InverseCdf {
 public:
  // fill(begin, size, masses) writes the masses of `size` tokens from `begin` on.
  using Fill = std::function<void(int64_t, int64_t, double*)>;

  InverseCdf(int64_t V, Fill fill) : V_(V), fill_(std::move(fill)), masses_(block_size_) {
    for (int64_t begin = 0; begin < V; begin += block_size_) {
      const int64_t size = fill_block(begin);
      const double* masses = masses_.data();
      block_masses_.push_back(kInLanes ? at_level<sum_in_lanes>(masses, size)
                                       : std::accumulate(masses, masses + size, 0.));
      total_ += block_masses_.back();
    }
  }

  double total() const { return total_; }  // NaN where a mass is

  // 0 where there is no mass or NaN.
  int64_t draw(double uniform) {
    if (!(total_ > 0)) return 0;
    double target = uniform * total_;
    const int64_t block =
        pick(int64_t(block_masses_.size()), target, [this](int64_t i) { return block_masses_[i]; });
    const int64_t begin = block * block_size_, size = fill_block(begin);
    return begin + pick(size, target, [this](int64_t i) { return masses_[i]; });
  }

 private:
  static constexpr bool kInLanes = sizeof(A) == sizeof(float);

  // out: its size
  int64_t fill_block(int64_t begin) {
    const int64_t size = std::min(block_size_, V_ - begin);
    fill_(begin, size, masses_.data());
    return size;
  }

  const int64_t V_, block_size_ = kInLanes ? std::min(kBlock, V_) : V_;
  const Fill fill_;
  std::vector<double> masses_;  // of one block
  std::vector<double> block_masses_;
  double total_ = 0;
};

}  // namespace mpg::cpu
