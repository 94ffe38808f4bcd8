// Log-sum-exp of rows in two halves: blocks reduce slices of rows to partials, then whichever
// kernel comes next merges a row's partials with one warp.
#pragma once

#include "launch.cuh"

namespace mpg::cuda {

// First half. Partials are (rows, num_slices).
void reduce_slices(const ModelLogits& logits, float inv_temperature, LogSum<float>* partials,
                   void* stream);

// Both halves, for ops that look at every row again: two launches.
void normalize_rows(const NormalizeRows<float>& args, void* stream);

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

// The log-probability of a row's token, by a whole warp, from the row's partials.
template <class T>
__device__ __forceinline__ void gather_row(const GatherLogprobs<float>& args, int64_t row) {
  const ModelLogits& logits = args.logits;
  const float inv_temperature = 1 / args.temperature;
  const Normalizer<float> normalizer =
      merge_slices(args.partials, row, num_slices(logits.V), inv_temperature);
  if (threadIdx.x % kWarp != 0) return;
  const int64_t token = args.tokens[row % (logits.B * logits.K)];
  const bool is_token = token >= 0 && token < logits.V;
  args.logprobs[row] =
      is_token ? logprob(to_float(row_data<T>(logits, row)[token]), normalizer, inv_temperature)
               : -INFINITY;
}

}  // namespace mpg::cuda
