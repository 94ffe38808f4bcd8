// Kernels with one fault each, to show that simt.h reports it. Usage: harness <kernel>; prints the
// error or what the kernel computed.
#include <cmath>
#include <cstdio>
#include <map>

#include "simt.h"

namespace mpg::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffff;
constexpr unsigned kThreads = 64;
float result[simt::kMaxThreads];
int turn = 0;

// Every thread reads what its neighbour in the other warp wrote.
void swap_warps(bool has_barrier) {
  __shared__ float x[kThreads];
  x[threadIdx.x] = float(threadIdx.x);
  if (has_barrier) __syncthreads();
  result[threadIdx.x] = x[threadIdx.x ^ 32];
}
void dynamic_shared_memory() {
  MPG_DYNAMIC_SHARED(float, x);
  x[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  result[threadIdx.x] = x[threadIdx.x ^ 32];
}
void shared_memory_overrun() {
  __shared__ float x[kThreads];
  x[threadIdx.x + (threadIdx.x == 5) * kThreads] = 1;
  result[threadIdx.x] = x[threadIdx.x];
}
// Every lane reads what its neighbour wrote.
void swap_lanes(bool has_barrier) {
  __shared__ float x[kThreads];
  x[threadIdx.x] = float(threadIdx.x);
  if (has_barrier) __syncwarp();
  result[threadIdx.x] = x[threadIdx.x ^ 1];
}
void warp_barrier() { swap_lanes(true); }
void missing_warp_barrier() { swap_lanes(false); }
void barrier() { swap_warps(true); }
void missing_barrier() { swap_warps(false); }
void divergent_barrier() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
void barrier_after_exit() {
  if (threadIdx.x < 32) __syncthreads();
}
void shuffle() { result[threadIdx.x] = __shfl_down_sync(kAllLanes, float(threadIdx.x), 1); }
void half_mask() { __shfl_down_sync(0xffff, 1.f, 1); }
void shuffle_after_exit() {
  if (threadIdx.x % 32 < 20) __shfl_down_sync(kAllLanes, 1.f, 1);
}
void shuffle_against_barrier() {
  if (threadIdx.x == 5) __syncthreads();
  __shfl_down_sync(kAllLanes, 1.f, 1);
}
void shuffle_from_outside_mask() {
  if (threadIdx.x < 16) result[threadIdx.x] = __shfl_sync(0xffff, 1.f, 16);
}
// The lower half of a warp has done one operation more when all lanes come to the same one.
void shuffle_after_half_a_warp() {
  if (threadIdx.x % 32 < 16) __syncwarp(0xffff);
  result[threadIdx.x] = __shfl_sync(kAllLanes, float(threadIdx.x), int(threadIdx.x % 32) ^ 16);
}
void ballot() { result[threadIdx.x] = float(__ballot_sync(kAllLanes, threadIdx.x % 32 < 2)); }
void order() { result[threadIdx.x] = float(turn++); }
void nothing() {}

const std::map<std::string_view, void (*)()> kKernels = {
    {"barrier", barrier},
    {"warp_barrier", warp_barrier},
    {"missing_warp_barrier", missing_warp_barrier},
    {"shared_memory_overrun", shared_memory_overrun},
    {"missing_barrier", missing_barrier},
    {"divergent_barrier", divergent_barrier},
    {"barrier_after_exit", barrier_after_exit},
    {"shuffle", shuffle},
    {"half_mask", half_mask},
    {"shuffle_after_exit", shuffle_after_exit},
    {"shuffle_against_barrier", shuffle_against_barrier},
    {"shuffle_from_outside_mask", shuffle_from_outside_mask},
    {"shuffle_after_half_a_warp", shuffle_after_half_a_warp},
    {"ballot", ballot},
    {"order", order},
};

void run(std::string_view name) {
  if (name == "block_too_large") return simt::launch(1, 1025, 0, nothing);
  if (name == "grid_too_tall") return simt::launch(dim3(1, 65536), 32, 0, nothing);
  if (name == "grid_empty") return simt::launch(0, 32, 0, nothing);
  if (name == "block_empty") return simt::launch(1, 0, 0, nothing);
  if (name == "block_of_two_dimensions") return simt::launch(1, dim3(32, 2), 0, nothing);
  if (name == "grid_too_deep") return simt::launch(dim3(1, 1, 65536), 32, 0, nothing);
  if (name == "too_much_dynamic_shared_memory") return simt::launch(1, 32, 48 * 1024 + 1, nothing);
  if (name == "too_little_dynamic_shared_memory") {
    return simt::launch(1, kThreads, (kThreads - 1) * sizeof(float), dynamic_shared_memory);
  }
  if (name == "dynamic_shared_memory") {
    return simt::launch(1, kThreads, sizeof(float[kThreads]), dynamic_shared_memory);
  }
  if (name == "blocks_grow_after_an_error") {
    try {
      simt::launch(1, kThreads, 0, half_mask);
    } catch (const simt::Error&) {
    }
    simt::launch(1, kThreads, 0, barrier);
    simt::launch(1, 1024, 0, shuffle);
    return;
  }
  simt::launch(1, kThreads, 0, kKernels.at(name));
}

}  // namespace
}  // namespace mpg::cuda

int main(int, char** arguments) {
  try {
    mpg::cuda::run(arguments[1]);
  } catch (const simt::Error& error) {
    std::puts(error.what());
    return 0;
  }
  for (unsigned i = 0; i < mpg::cuda::kThreads; ++i) std::printf("%g ", mpg::cuda::result[i]);
}
