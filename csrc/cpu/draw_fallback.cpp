// The single-token fallback in closed form: y with its token_mass. Where the draft proposes few
// tokens, as after top-p, they are scored one by one.
#include "inverse_cdf.h"
#include "scores.h"

namespace mpg::cpu {
namespace {

// token_mass of `size` tokens from `begin` on, one by one. Inside the code of a level it would take
// a third longer.
template <class T, class A>
__attribute__((noinline)) void token_masses_each(const DrawFallback<A>& args, int64_t b,
                                                 int64_t begin, int64_t size, double* masses) {
  for (int64_t y = 0; y < size; ++y) masses[y] = token_mass<T>(args, b, begin + y);
}

template <class T>
MPG_INLINE void token_masses_in_lanes(const DrawFallback<float>& args, int64_t b, int64_t begin,
                                      int64_t size, double* masses) {
  const ModelLogits& logits = args.rows.logits;
  const float* draft_probs = args.draft_probs + b * logits.V + begin;
  int64_t num_proposed = 0;
#pragma omp simd reduction(+ : num_proposed)
  for (int64_t y = 0; y < size; ++y) num_proposed += !(draft_probs[y] <= 0);
  if (num_proposed < size / 16) return token_masses_each<T>(args, b, begin, size, masses);

  float anchor[kBlock], scores[kBlock];
  const ModelRows<T> models = {args.rows, b, 0, begin};
  models.logprobs(0, size, anchor);
  ScoreSums sums(args.score, size);
  for (int64_t i = 0; i < logits.N; ++i) {
    sums.add(args.weights[b * logits.N + i], models.logits(i + 1), models.normalizer(i + 1),
             anchor);
  }
  sums.values(scores);

  const float log_bound = args.log_bound[b];
  for (int64_t y = 0; y < size; ++y) {
    const float excess = scores[y] - log_bound;
    const float accept_prob = exp_nonpositive(excess > 0 ? 0 : excess);
    const float mass = draft_probs[y] * (scores[y] == -INFINITY ? 0 : accept_prob);
    masses[y] = draft_probs[y] <= 0 ? 0 : mass;
  }
}

}  // namespace

template <class A>
void draw_fallback(const DrawFallback<A>& args, int64_t begin, int64_t end) {
  const ModelLogits& logits = args.rows.logits;
  with_logit_type<A>(logits.dtype, [&]<class T>(T) {
    for (int64_t b = begin; b < end; ++b) {
      args.tokens[b] = kNoToken;
      args.scores[b] = -A(INFINITY);
      args.accept_probs[b] = 0;
      if (!logits.active[b]) continue;

      InverseCdf<A> cdf(logits.V, [&, b](int64_t first, int64_t size, double* masses) {
        if constexpr (sizeof(A) == sizeof(float)) {
          at_level<token_masses_in_lanes<T>>(args, b, first, size, masses);
        } else {
          token_masses_each<T>(args, b, first, size, masses);
        }
      });
      args.accept_probs[b] = A(cdf.total());
      if (cdf.total() > 0) {
        args.tokens[b] = cdf.draw(args.uniforms[b]);
        args.scores[b] = token_score<T>(args, b, args.tokens[b]);
      } else if (is_nan(cdf.total())) {
        args.tokens[b] = kInvalidToken;
        args.scores[b] = A(NAN);
      }
    }
  });
}

MPG_INSTANTIATE(draw_fallback, DrawFallback);

}  // namespace mpg::cpu
