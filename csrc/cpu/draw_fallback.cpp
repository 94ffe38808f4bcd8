// The single-token fallback in closed form (lines 17-23 of Algorithm 1): one pass for the mass of
// every token the draft can propose, one walk along the cumulated masses.
#include <vector>

#include "../numerics.h"

namespace mpg::cpu {

template <class A>
void draw_fallback(const DrawFallback<A>& args, int64_t begin, int64_t end) {
  const ModelLogits& logits = args.rows.logits;
  const int64_t V = logits.V;
  with_logit_type<A>(logits.dtype, [&](auto type) {
    using T = decltype(type);
    std::vector<A> masses(V);
    for (int64_t b = begin; b < end; ++b) {
      args.tokens[b] = -1;
      args.scores[b] = -A(INFINITY);
      args.accept_probs[b] = 0;
      if (!logits.active[b]) continue;

      double total = 0;
      for (int64_t y = 0; y < V; ++y) {
        const A draft_prob = args.draft_probs[b * V + y];
        // Other tokens need no score, and may not have one where the anchor excludes them.
        masses[y] = draft_prob <= 0
                        ? 0
                        : accepted_mass(draft_prob, token_score<T>(args, b, y), args.log_bound[b]);
        total += masses[y];
      }
      args.accept_probs[b] = A(total);
      if (is_nan(total)) {
        args.tokens[b] = -2;
        args.scores[b] = A(NAN);
        continue;
      }
      double target = args.uniforms[b] * total;
      args.tokens[b] = pick(V, target, [&](int64_t y) { return masses[y]; });
      if (args.tokens[b] >= 0) args.scores[b] = token_score<T>(args, b, args.tokens[b]);
    }
  });
}

template void draw_fallback(const DrawFallback<float>&, int64_t, int64_t);
template void draw_fallback(const DrawFallback<double>&, int64_t, int64_t);

}  // namespace mpg::cpu
