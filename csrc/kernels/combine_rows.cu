// Combined rows (see combined_log_mass), normalised.
//
// Four launches: two for the models' normalisers; grid (rows, slices) for log v and its log-sum-exp
// over the slice; the same grid to merge the slices and take the result off. The normalisers make a
// launch of their own because the number of models, and so what a block would have to keep, has no
// bound.
#include "logsumexp.cuh"

namespace mpg::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) log_masses_kernel(const CombineRows<float> args) {
  const int64_t P = args.rows.logits.K, V = args.rows.logits.V, row = blockIdx.x;
  LogSum<float> sum;
  for_slice(V, [&](int64_t y) {
    const float log_mass = combined_log_mass<T>(args, row / P, row % P, y);
    args.log_rows[row * V + y] = log_mass;
    sum.add(log_mass, 1.f);
  });
  sum = reduce_block(sum, Merge{1.f});
  if (threadIdx.x == 0) args.row_partials[row * num_slices(V) + blockIdx.y] = sum;
}

__global__ void __launch_bounds__(kThreads) subtract_totals_kernel(const CombineRows<float> args) {
  const int64_t V = args.rows.logits.V, row = blockIdx.x;
  __shared__ float max, log_sum;
  if (threadIdx.x < kWarp) {
    const Normalizer<float> merged = merge_slices(args.row_partials, row, num_slices(V), 1.f);
    if (threadIdx.x == 0) {
      max = merged.max;
      log_sum = merged.log_sum;
      if (blockIdx.y == 0) args.log_totals[row] = max + log_sum;
    }
  }
  __syncthreads();  // all threads read the normaliser
  const Normalizer<float> normalizer = {max, log_sum};
  if (normalizer.log_sum == -INFINITY) return;  // a row without mass is -inf as it is
  for_slice(V, [&](int64_t y) {
    float& log_mass = args.log_rows[row * V + y];
    log_mass = logprob(log_mass, normalizer, 1.f);
  });
}

}  // namespace

void combine_rows(const CombineRows<float>& args, void* stream) {
  const ModelLogits& logits = args.rows.logits;
  normalize_rows(args.rows, stream);
  const dim3 grid(unsigned(logits.B * logits.K), unsigned(num_slices(logits.V)));
  with_logit_type<float>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    MPG_LAUNCH(log_masses_kernel<T>, grid, kThreads, 0, stream, args);
  });
  MPG_LAUNCH(subtract_totals_kernel, grid, kThreads, 0, stream, args);
}

}  // namespace mpg::cuda
