// Log-sum-exp of rows in two halves: blocks reduce slices of rows to partials, then whichever
// kernel comes next merges a row's partials with one warp.
#pragma once

#include "launch.cuh"

namespace mpg::cuda {

// First half. Partials are (rows, num_slices).
void reduce_slices(const ModelLogits& logits, float inv_temperature, LogSum<float>* partials,
                   void* stream);

// Combines two sums of one temperature.
struct Merge {
  float inv_temperature;
  __device__ LogSum<float> operator()(LogSum<float> sum, LogSum<float> other) const {
    sum.merge(other, inv_temperature);
    return sum;
  }
};

// Second half, by a whole warp; the result is lane 0's.
__device__ __forceinline__ Normalizer<float> merge_slices(const LogSum<float>* partials,
                                                          int64_t row, int64_t slices,
                                                          float inv_temperature) {
  LogSum<float> sum;
  for (int64_t slice = threadIdx.x % kWarp; slice < slices; slice += kWarp) {
    sum.merge(partials[row * slices + slice], inv_temperature);
  }
  return reduce_warp(sum, Merge{inv_temperature}).normalizer();
}

}  // namespace mpg::cuda
