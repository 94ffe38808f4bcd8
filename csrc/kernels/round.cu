// The bookkeeping of a round, see round.h: one warp per sequence, a few dozen numbers. As tensor
// operations the two are forty launches.
#include "../round.h"
#include "launch.cuh"

namespace mpg::cuda {
namespace {

struct MinOfWarp {
  __device__ int64_t operator()(int64_t x) const {
    x = reduce_warp(x, [](int64_t a, int64_t b) { return a < b ? a : b; });
    return from_word<int64_t>(__shfl_sync(kAllLanes, word_of(x), 0));
  }
};

__global__ void count_usable_kernel(const CountUsable<float> args) {
  count_usable_tokens(args, blockIdx.x, int(threadIdx.x), kWarp, MinOfWarp());
}

__global__ void commit_block_kernel(const CommitBlock<float> args) {
  commit_sequence(args, blockIdx.x, int(threadIdx.x), kWarp, MinOfWarp());
}

}  // namespace

void count_usable(const CountUsable<float>& args, void* stream) {
  MPG_LAUNCH(count_usable_kernel, dim3(unsigned(args.B)), kWarp, 0, stream, args);
}

void commit_block(const CommitBlock<float>& args, void* stream) {
  MPG_LAUNCH(commit_block_kernel, dim3(unsigned(args.B)), kWarp, 0, stream, args);
}

}  // namespace mpg::cuda
