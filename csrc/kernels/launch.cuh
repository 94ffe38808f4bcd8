// How a kernel is launched, in one place, so that a host compiler can be given another way
// (MPG_SIMT: the kernel tests that execute this source on a CPU bring their own simt.h); and how
// the threads of a warp and of a block reduce what they hold.
#pragma once

#include "../numerics.h"

#if defined(MPG_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>
// A kernel whose name has a comma goes in parentheses.
#define MPG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

namespace mpg::cuda {

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWarp = 32;
// Eight warps: enough to hide latency, few enough that a block's registers never limit residency.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
  return unsigned((items + items_per_block - 1) / items_per_block);
}

// Calls f, by one thread of a block each, for the elements of the slice blockIdx.y of V.
template <class F>
__device__ __forceinline__ void for_slice(int64_t V, F f, int64_t slice_size = kSliceSize) {
  const int64_t begin = blockIdx.y * slice_size;
  const int64_t end = V - begin < slice_size ? V : begin + slice_size;
  for (int64_t y = begin + threadIdx.x; y < end; y += kThreads) f(y);
}

// Bits of at most 8 bytes, as they travel between threads: shuffles know no structs, and shared
// memory holds none with a constructor.
template <class T>
__device__ __forceinline__ uint64_t word_of(T x) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  return word;
}

template <class T>
__device__ __forceinline__ T from_word(uint64_t word) {
  T x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}

// Combines over the first `count` lanes of a warp, a power of two; the result is lane 0's. Not a
// butterfly: with fused multiply-adds not all that combines is commutative to the last bit, and
// lanes would disagree.
template <class T, class F>
__device__ __forceinline__ T reduce_warp(T x, F combine, int count = kWarp) {
  for (int offset = count / 2; offset > 0; offset /= 2) {
    x = combine(x, from_word<T>(__shfl_down_sync(kAllLanes, word_of(x), offset)));
  }
  return x;
}

// Combines over a block, always in the same order; the result is every thread's.
template <int kBlock = kThreads, class T, class F>
__device__ __forceinline__ T reduce_block(T x, F combine) {
  constexpr int kCount = kBlock / kWarp;
  static_assert((kCount & (kCount - 1)) == 0);
  __shared__ uint64_t of_warp[kCount];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x = reduce_warp(x, combine);
  __syncthreads();  // the result of the call before has been read
  if (lane == 0) of_warp[warp] = word_of(x);
  __syncthreads();  // every warp reads what all wrote
  x = reduce_warp(from_word<T>(of_warp[lane % kCount]), combine, kCount);
  return from_word<T>(__shfl_sync(kAllLanes, word_of(x), 0));
}

template <int kBlock = kThreads, class T>
__device__ __forceinline__ T sum_block(T x) {
  return reduce_block<kBlock>(x, [](T a, T b) { return a + b; });
}

// The sum over the lanes of a warp up to each one.
template <class T>
__device__ __forceinline__ T scan_warp(T x) {
  const int lane = threadIdx.x % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int source = lane < offset ? lane : lane - offset;
    const T before = from_word<T>(__shfl_sync(kAllLanes, word_of(x), source));
    if (lane >= offset) x += before;
  }
  return x;
}

// The sum over a block of kThreads up to each thread.
template <class T>
__device__ __forceinline__ T scan_block(T x) {
  __shared__ uint64_t of_warp[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  x = scan_warp(x);
  __syncthreads();  // the sums of the call before have been read
  if (lane == kWarp - 1) of_warp[warp] = word_of(x);
  __syncthreads();  // every warp reads what those before it wrote
  T before = 0;
  for (int w = 0; w < warp; ++w) before += from_word<T>(of_warp[w]);
  return before + x;
}

}  // namespace mpg::cuda
