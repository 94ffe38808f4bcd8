// Log-sum-exp of rows in two halves: blocks reduce slices of rows to partials, then whichever
// kernel comes next merges a row's partials with one warp.
#pragma once

#include "launch.cuh"

namespace mpg::cuda {

// First half. Partials are (rows, num_slices, 2): max and sum of a LogSum.
int reduce_slices(const ModelLogits& logits, float inv_temperature, float* partials, void* stream);

// Both halves, for ops that look at every row again: two launches.
int normalize_rows(const NormalizeRows<float>& args, void* stream);

// Merges over the lanes of a warp; the result is lane 0's. Not a butterfly: with fused
// multiply-adds merge is not commutative to the last bit, and lanes would disagree.
__device__ __forceinline__ LogSum<float> merge_lanes(LogSum<float> sum, float inv_temperature) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    LogSum<float> other;
    other.max = __shfl_down_sync(kAllLanes, sum.max, offset);
    other.sum = __shfl_down_sync(kAllLanes, sum.sum, offset);
    sum.merge(other, inv_temperature);
  }
  return sum;
}

// Merges over a block of kThreads; the result is thread 0's.
__device__ __forceinline__ LogSum<float> merge_block(LogSum<float> sum, float inv_temperature) {
  __shared__ float warp_max[kWarps], warp_sum[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  sum = merge_lanes(sum, inv_temperature);
  if (lane == 0) {
    warp_max[warp] = sum.max;
    warp_sum[warp] = sum.sum;
  }
  __syncthreads();  // warp 0 reads what the others wrote
  if (warp != 0) return sum;
  sum = LogSum<float>();
  if (lane < kWarps) {
    sum.max = warp_max[lane];
    sum.sum = warp_sum[lane];
  }
  return merge_lanes(sum, inv_temperature);
}

// Second half, by a whole warp; the result is lane 0's.
__device__ __forceinline__ Normalizer<float> merge_slices(const float* partials, int64_t row,
                                                          int64_t slices, float inv_temperature) {
  LogSum<float> sum;
  for (int64_t slice = threadIdx.x % kWarp; slice < slices; slice += kWarp) {
    const float* partial = partials + (row * slices + slice) * 2;
    LogSum<float> other;
    other.max = partial[0];
    other.sum = partial[1];
    sum.merge(other, inv_temperature);
  }
  return merge_lanes(sum, inv_temperature).normalizer();
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
