// Log-probabilities of given tokens, the scores of their prefixes (Eq. 13-16, 18-19), acceptance
// (Eq. 14, 17, 20), the bound update (3.3), and all of it from logits in two launches:
// reduce_slices, then one block per sequence (for log-probabilities alone one warp per row).
//
// One warp handles one sequence, one lane one prefix: K <= 32. The work is a few hundred additions;
// what matters is that nothing of it costs a launch or a trip to the host.
#include "logsumexp.cuh"

namespace mpg::cuda {
namespace {

// The log-probability of a row's token, by a whole warp, from the row's partials.
template <class T>
__device__ __forceinline__ void gather_row(const GatherLogprobs<float>& args, int64_t row) {
  const ModelLogits& logits = args.logits;
  const float inv_temperature = 1 / args.temperature;
  const Normalizer<float> normalizer =
      merge_slices(args.partials, row, logits.num_slices(), inv_temperature);
  if (threadIdx.x % kWarp != 0) return;
  const int64_t token = args.tokens[row % (logits.B * logits.K)];
  const bool is_token = token >= 0 && token < logits.V;
  args.logprobs[row] =
      is_token ? logprob(to_float(row_data<T>(logits, row)[token]), normalizer, inv_temperature)
               : -INFINITY;
}

// By a whole warp; all lanes return the result. A lane reads only the score that it wrote itself.
__device__ __forceinline__ int64_t accept_sequence(const AcceptPrefixes<float>& args, int64_t b) {
  const int lane = threadIdx.x % kWarp;
  const bool counts = lane < args.K && lane < args.lengths[b];
  const float score = counts ? args.scores[b * args.K + lane] : 0;
  const bool accepts =
      counts && is_accepted(score, args.log_bound[b], args.uniforms[b * args.K + lane]);
  const unsigned accepting = __ballot_sync(kAllLanes, accepts);
  const unsigned invalid = __ballot_sync(kAllLanes, counts && is_nan(score));
  const int64_t accepted = invalid != 0 ? -1 : kWarp - __clz(int(accepting));
  if (lane == 0) args.accepted[b] = accepted;
  return accepted;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_logprobs_kernel(const GatherLogprobs<float> args) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row < args.logits.num_rows()) gather_row<T>(args, row);
}

__global__ void score_prefixes_kernel(const ScorePrefixes<float> args) {
  if (threadIdx.x < args.K) score_prefix(args, blockIdx.x, threadIdx.x);
}

__global__ void accept_prefixes_kernel(const AcceptPrefixes<float> args) {
  accept_sequence(args, blockIdx.x);
}

__global__ void update_bound_kernel(const UpdateBound<float> args) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b < args.B && args.active[b]) {
    mpg::update_bound(args.bound, b, args.scores + b * args.P, args.P);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) verify_chunks_kernel(const VerifyChunks<float> args) {
  const ModelLogits& logits = args.gather.logits;
  const int64_t b = blockIdx.x;
  const int K = int(logits.K), num_rows = int(1 + logits.N) * K;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int r = warp; r < num_rows; r += kWarps) {
    gather_row<T>(args.gather, (r / K * logits.B + b) * K + r % K);
  }
  __syncthreads();  // warp 0 reads the log-probabilities that all warps wrote
  if (warp != 0) return;

  if (lane < K) score_prefix(args.scoring, b, lane);
  const int64_t accepted = accept_sequence(args.acceptance, b);
  __syncwarp();  // lane 0 reads the accepted score, which another lane wrote
  if (lane == 0 && accepted >= 1) {
    mpg::update_bound(args.bound, b, args.scoring.scores + b * K + accepted - 1, 1);
  }
}

}  // namespace

void gather_logprobs(const GatherLogprobs<float>& args, void* stream) {
  const ModelLogits& logits = args.logits;
  reduce_slices(logits, 1 / args.temperature, args.partials, stream);
  const dim3 grid(blocks_for(logits.num_rows(), kWarps));
  with_logit_type<float>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    MPG_LAUNCH(gather_logprobs_kernel<T>, grid, kThreads, 0, stream, args);
  });
}

void score_prefixes(const ScorePrefixes<float>& args, void* stream) {
  MPG_LAUNCH(score_prefixes_kernel, dim3(unsigned(args.B)), kWarp, 0, stream, args);
}

void accept_prefixes(const AcceptPrefixes<float>& args, void* stream) {
  MPG_LAUNCH(accept_prefixes_kernel, dim3(unsigned(args.B)), kWarp, 0, stream, args);
}

void update_bound(const UpdateBound<float>& args, void* stream) {
  MPG_LAUNCH(update_bound_kernel, dim3(blocks_for(args.B, kThreads)), kThreads, 0, stream, args);
}

void verify_chunks(const VerifyChunks<float>& args, void* stream) {
  const ModelLogits& logits = args.gather.logits;
  reduce_slices(logits, 1.f, args.gather.partials, stream);
  with_logit_type<float>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    MPG_LAUNCH(verify_chunks_kernel<T>, dim3(unsigned(logits.B)), kThreads, 0, stream, args);
  });
}

}  // namespace mpg::cuda
