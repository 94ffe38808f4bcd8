// A draw by inverting the mass cumulated in token order, in two halves: blocks add up slices of the
// vocabulary, then one block finds the slice, the thread's run in it, and the token. Masses are
// added in double, in an order that depends on V alone. mass_of(y) is a token's mass; NaN shows in
// the total.
#pragma once

#include "launch.cuh"

namespace mpg::cuda {

// First half, by a block of kThreads; the result is every thread's.
template <class F>
__device__ __forceinline__ double slice_mass(int64_t V, F mass_of) {
  double mass = 0;
  for_slice(V, [&](int64_t y) { mass += mass_of(y); });
  return sum_block(mass);
}

__device__ __forceinline__ double total_mass(int64_t V, const double* slice_masses) {
  double total = 0;
  for (int64_t s = 0; s < num_slices(V); ++s) total += slice_masses[s];
  return total;
}

// The first of the numbers, a lane's each, that lifts their sum above `target`, or the last that is
// not 0 where rounding leaves the target above them all; 0 where all are, so that it is always one
// to read. Takes the sum before it off the target.
__device__ __forceinline__ int pick_lane(double mass, double& target) {
  const double sum = scan_warp(mass);
  const unsigned above = __ballot_sync(kAllLanes, mass > 0 && sum > target);
  const unsigned some = __ballot_sync(kAllLanes, mass > 0);
  const int last = some == 0 ? 0 : kWarp - 1 - __clz(int(some));
  const int lane = above == 0 ? last : kWarp - 1 - __clz(int(above & (0 - above)));
  target -= __shfl_sync(kAllLanes, sum - mass, lane);
  return lane;
}

// Second half, by a block of kThreads, where the total is positive; the result is thread 0's.
// `target` is the uniform times the total. One warp finds eight runs, then the run, then the token.
template <class F>
__device__ __forceinline__ int64_t draw(int64_t V, const double* slice_masses, double target,
                                        F mass_of) {
  constexpr int64_t kRun = kSliceSize / kThreads;  // consecutive tokens of one thread
  static_assert(kRun == kWarp);
  __shared__ double run_masses[kThreads];
  // Every thread finds the same slice.
  const int64_t slice = pick(num_slices(V), target, [&](int64_t s) { return slice_masses[s]; });
  const int64_t begin = slice * kSliceSize;
  const auto run_token_mass = [&](int64_t thread, int64_t i) {
    const int64_t y = begin + thread * kRun + i;
    return y < V ? mass_of(y) : 0;
  };
  double mass = 0;
  for (int64_t i = 0; i < kRun; ++i) mass += run_token_mass(threadIdx.x, i);
  run_masses[threadIdx.x] = mass;
  __syncthreads();  // the first warp reads all runs
  if (threadIdx.x >= kWarp) return -1;
  const int lane = threadIdx.x;
  const double* of_lane = run_masses + lane * kWarps;
  mass = 0;
  for (int w = 0; w < kWarps; ++w) mass += of_lane[w];
  const int runs = pick_lane(mass, target) * kWarps;
  const int run = runs + pick_lane(lane < kWarps ? run_masses[runs + lane] : 0, target);
  return begin + run * kRun + pick_lane(run_token_mass(run, lane), target);
}

}  // namespace mpg::cuda
