// How a kernel is launched, in one place, so that a host compiler can be given another way
// (MPG_SIMT: the kernel tests that execute this source on a CPU bring their own simt.h).
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

inline int launch_status() { return int(cudaGetLastError()); }

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWarp = 32;
// Eight warps: enough to hide latency, few enough that a block's registers never limit residency.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

inline unsigned blocks_for(int64_t items, int64_t items_per_block) {
  return unsigned((items + items_per_block - 1) / items_per_block);
}

}  // namespace mpg::cuda
