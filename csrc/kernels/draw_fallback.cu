// The single-token fallback in closed form (lines 17-23 of Algorithm 1): y with mass
// draft_probs[y] * min(1, exp(S_1(y) - log M)), drawn by inverting the cumulated mass in token
// order.
//
// Four launches: two for the normalisers; grid (B, slices) for the mass of every slice; one block
// per sequence for the draw. Scores are recomputed where they are needed again: one slice.
#include "inverse_cdf.cuh"
#include "logsumexp.cuh"

namespace mpg::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) slice_masses_kernel(const DrawFallback<float> args) {
  const int64_t b = blockIdx.x, V = args.rows.logits.V;
  if (!args.rows.logits.active[b]) return;
  const double mass = slice_mass(V, [&](int64_t y) { return token_mass<T>(args, b, y); });
  if (threadIdx.x == 0) args.slice_masses[b * num_slices(V) + blockIdx.y] = mass;
}

template <class T>
__global__ void __launch_bounds__(kThreads) draw_fallback_kernel(const DrawFallback<float> args) {
  const int64_t b = blockIdx.x, V = args.rows.logits.V;
  double total = 0;
  if (args.rows.logits.active[b]) {
    total = total_mass(V, args.slice_masses + b * num_slices(V));
  }
  if (threadIdx.x == 0) {
    args.tokens[b] = is_nan(total) ? kInvalidToken : kNoToken;
    args.scores[b] = is_nan(total) ? NAN : -INFINITY;
    args.accept_probs[b] = float(total);
  }
  if (!(total > 0)) return;
  const int64_t y = draw(V, args.slice_masses + b * num_slices(V), args.uniforms[b] * total,
                         [&](int64_t y) { return token_mass<T>(args, b, y); });
  if (threadIdx.x != 0) return;
  args.tokens[b] = y;
  args.scores[b] = token_score<T>(args, b, y);
}

}  // namespace

void draw_fallback(const DrawFallback<float>& args, void* stream) {
  const ModelLogits& logits = args.rows.logits;
  normalize_rows(args.rows, stream);
  const dim3 slices(unsigned(logits.B), unsigned(num_slices(logits.V)));
  with_logit_type<float>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    MPG_LAUNCH(slice_masses_kernel<T>, slices, kThreads, 0, stream, args);
    MPG_LAUNCH(draw_fallback_kernel<T>, dim3(unsigned(logits.B)), kThreads, 0, stream, args);
  });
}

}  // namespace mpg::cuda
