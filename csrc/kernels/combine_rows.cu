// Combined rows (see combined_log_mass), normalised.
//
// Four launches: two for the models' normalisers; grid (rows, slices) for log v and its log-sum-exp
// over the slice; the same grid to merge the slices and take the result off. The normalisers make a
// launch of their own because the number of models, and so what a block would have to keep, has no
// bound.
#include "logsumexp.cuh"
#include "packed.cuh"

namespace mpg::cuda {
namespace {

constexpr int kTokens = 8;  // of a thread at a time: 16 bytes of each model in half precision

// Log-probabilities of a model's tokens from y on; `count` of them, the others may be anything.
template <class T>
__device__ __forceinline__ void load_logprobs(const NormalizeRows<float>& rows, int64_t model,
                                              int64_t b, int64_t p, int64_t y, int64_t count,
                                              float (&logprobs)[kTokens]) {
  using P = Packed<T>;
  const ModelLogits& logits = rows.logits;
  const T* x = row_data<T>(logits, model, b, p) + y;
  const Normalizer<float> normalizer = rows.normalizers[(model * logits.B + b) * logits.K + p];
  const bool is_packed = count >= kTokens && reinterpret_cast<uintptr_t>(x) % sizeof(P) == 0;
#pragma unroll
  for (int first = 0; first < kTokens; first += P::kSize) {
    P packed = {};
    if (is_packed) packed = load_packed<P>(x + first);
#pragma unroll
    for (int e = 0; e < P::kSize; ++e) {
      if (!is_packed && first + e < count) packed.element[e] = x[first + e];
      logprobs[first + e] = logprob(to_float(packed.element[e]), normalizer, 1.f);
    }
  }
}

// combined_log_mass of kTokens tokens, model by model: each one's weight and normaliser are loaded
// once for all of them.
template <class T>
__global__ void __launch_bounds__(kThreads) log_masses_kernel(const CombineRows<float> args) {
  const int64_t V = args.rows.logits.V, row = blockIdx.x, begin = blockIdx.y * args.slice_size;
  const int64_t b = blockIdx.x / unsigned(args.rows.logits.K);
  const int64_t p = blockIdx.x % unsigned(args.rows.logits.K);
  const int64_t end = V - begin < args.slice_size ? V : begin + args.slice_size;
  LogSum<float> sum;
  for (int64_t y = begin + threadIdx.x * kTokens; y < end; y += kThreads * kTokens) {
    const int64_t count = end - y;
    float base[kTokens] = {}, anchor[kTokens] = {}, logprobs[kTokens];
    if (args.has_anchor) {
      load_logprobs<T>(args.rows, args.base, b, p, y, count, base);
      load_logprobs<T>(args.rows, 0, b, p, y, count, anchor);
    }
    ScoreSum<float> sums[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sums[t] = ScoreSum<float>(args.target);
    for (int64_t i = 0; i < args.N; ++i) {
      const float weight = args.weights[row * args.N + i];
      if (weight == 0) continue;
      load_logprobs<T>(args.rows, i + args.has_anchor, b, p, y, count, logprobs);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float ratio = args.has_anchor ? log_ratio(logprobs[t], anchor[t]) : logprobs[t];
        sums[t].add(weight, sums[t].term(weight, ratio));
      }
    }
    float log_masses[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float log_mass = base[t];  // excluded by the base, whatever the ratios
      if (log_mass != -INFINITY) log_mass = is_nan(anchor[t]) ? NAN : log_mass + sums[t].value();
      log_masses[t] = log_mass;
      if (t < count) sum.add(log_mass, args.inv_temperature);
    }
    store_packed(log_masses, count, args.log_rows + row * V + y);
  }
  sum = reduce_block(sum, Merge{args.inv_temperature});
  if (threadIdx.x == 0) args.row_partials[row * num_slices(V, args.slice_size) + blockIdx.y] = sum;
}

__global__ void __launch_bounds__(kThreads) subtract_totals_kernel(const CombineRows<float> args) {
  const int64_t V = args.rows.logits.V, row = blockIdx.x;
  __shared__ float max, log_sum;
  if (threadIdx.x < kWarp) {
    const Normalizer<float> merged =
        merge_slices(args.row_partials, row, num_slices(V, args.slice_size), args.inv_temperature);
    if (threadIdx.x == 0) {
      max = merged.max;
      log_sum = merged.log_sum;
      if (blockIdx.y == 0) args.log_totals[row] = max * args.inv_temperature + log_sum;
    }
  }
  __syncthreads();  // all threads read the normaliser
  const Normalizer<float> normalizer = {max, log_sum};
  const bool has_mass = normalizer.log_sum != -INFINITY;
  for_slice(
      V,
      [&](int64_t y) {
        float& x = args.log_rows[row * V + y];
        if (has_mass) x = logprob(x, normalizer, args.inv_temperature);  // else -inf as it is
        if (args.has_probs) x = std::exp(x);
      },
      args.slice_size);
}

}  // namespace

void combine_rows(const CombineRows<float>& args, void* stream) {
  const ModelLogits& logits = args.rows.logits;
  normalize_rows(args.rows, stream);
  const dim3 grid(unsigned(logits.B * logits.K), unsigned(num_slices(logits.V, args.slice_size)));
  with_logit_type<float>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    MPG_LAUNCH(log_masses_kernel<T>, grid, kThreads, 0, stream, args);
  });
  MPG_LAUNCH(subtract_totals_kernel, grid, kThreads, 0, stream, args);
}

}  // namespace mpg::cuda
