// See inverse_cdf.h.
#include "inverse_cdf.h"

#include <algorithm>

#include "simd.h"

namespace mpg::cpu {
namespace {

MPG_INLINE double sum_in_lanes(const double* x, int64_t size) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += x[i];
  return sum;
}

double sum_in_order(const double* x, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += x[i];
  return sum;
}

}  // namespace

template <class A>
InverseCdf<A>::InverseCdf(int64_t V, Fill fill)
    : V_(V),
      block_size_(sizeof(A) == sizeof(float) ? std::min(kBlock, V) : V),
      fill_(std::move(fill)),
      masses_(block_size_) {
  const double* masses = masses_.data();
  for (int64_t begin = 0; begin < V; begin += block_size_) {
    const int64_t size = fill_block(begin);
    block_masses_.push_back(sizeof(A) == sizeof(float) ? at_level<sum_in_lanes>(masses, size)
                                                       : sum_in_order(masses, size));
    total_ += block_masses_.back();
  }
}

template <class A>
int64_t InverseCdf<A>::draw(double uniform) {
  if (!(total_ > 0)) return 0;
  double target = uniform * total_;
  const int64_t block =
      pick(int64_t(block_masses_.size()), target, [this](int64_t i) { return block_masses_[i]; });
  const int64_t begin = block * block_size_, size = fill_block(begin);
  return begin + pick(size, target, [this](int64_t i) { return masses_[i]; });
}

template <class A>
int64_t InverseCdf<A>::fill_block(int64_t begin) {
  const int64_t size = std::min(block_size_, V_ - begin);
  fill_(begin, size, masses_.data());
  return size;
}

template class InverseCdf<float>;
template class InverseCdf<double>;

}  // namespace mpg::cpu
