// Log-probabilities of given tokens: reduce_slices, then one warp per row.
#include "logsumexp.cuh"

namespace mpg::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_logprobs_kernel(const GatherLogprobs<float> args) {
  const ModelLogits& logits = args.logits;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row < (1 + logits.N) * logits.B * logits.K) gather_row<T>(args, row);
}

}  // namespace

int gather_logprobs(const GatherLogprobs<float>& args, void* stream) {
  const ModelLogits& logits = args.logits;
  reduce_slices(logits, 1 / args.temperature, args.partials, stream);
  const dim3 grid(blocks_for((1 + logits.N) * logits.B * logits.K, kWarps));
  with_logit_type<float>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    MPG_LAUNCH(gather_logprobs_kernel<T>, grid, kThreads, 0, stream, args);
  });
  return launch_status();
}

}  // namespace mpg::cuda
