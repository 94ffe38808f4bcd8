// Temperature, top-k, top-p and min-p. The tokens that a cut keeps are found by a radix select: one
// histogram of weights for every 8 bits of the preference code, none of the vocabulary sorted.
#include <algorithm>
#include <cmath>

#include "../preference.h"

namespace mpg::cpu {
namespace {

// The greatest code from which up the tokens weigh at least `budget`; 0 if all together do not. So
// a token is kept, code >= cut, if those preferred to it weigh less than the budget.
template <class A, class F>
typename Preference<A>::Code find_cut(const Preference<A>& preference, double budget, F weight_of) {
  typename Preference<A>::Code cut = 0;
  double above = 0;  // weight of the tokens whose leading digits exceed those of the cut
  for (int shift = (preference.num_bits() + 7) / 8 * 8 - 8; shift >= 0; shift -= 8) {
    double weights[256] = {};
    for (int64_t y = 0; y < preference.V; ++y) {
      const auto code = preference(y);
      // In two steps, because a shift by all bits of a number is undefined.
      if (code >> shift >> 8 == cut >> shift >> 8)
        weights[int(code >> shift & 255)] += weight_of(y);
    }
    int digit = 255;
    while (digit > 0 && above + weights[digit] < budget) above += weights[digit--];
    cut |= typename Preference<A>::Code(digit) << shift;
  }
  return cut;
}

}  // namespace

template <class A>
void warp_rows(const WarpRows<A>& args, int64_t begin, int64_t end) {
  const int64_t V = args.V;
  for (int64_t r = begin; r < end; ++r) {
    const A* row = args.log_rows + r * V;
    A* probs = args.probs + r * V;
    const int64_t top = std::max_element(row, row + V) - row;  // the first of equals
    const A max = row[top];
    const bool is_valid = std::all_of(row, row + V, [](A x) { return x < A(INFINITY); });
    if (!is_valid || max == -A(INFINITY) || args.temperature == 0) {
      std::fill(probs, probs + V, is_valid ? A(0) : A(NAN));
      if (is_valid && max != -A(INFINITY)) probs[top] = 1;
      continue;
    }

    for (int64_t y = 0; y < V; ++y) {  // masses at first, 1 for the largest
      probs[y] = std::exp(A((double(row[y]) - max) / args.temperature));
    }
    const Preference<A> preference(row, V);
    typename Preference<A>::Code cut = 0;
    if (args.top_k > 0 && args.top_k < V) {
      cut = find_cut(preference, double(args.top_k), [](int64_t) { return 1; });
    }
    if (args.top_p < 1) {
      const auto mass_of = [&](int64_t y) { return preference(y) < cut ? 0 : double(probs[y]); };
      double total = 0;
      for (int64_t y = 0; y < V; ++y) total += mass_of(y);
      cut = find_cut(preference, args.top_p * total, mass_of);
    }
    double total = 0;
    for (int64_t y = 0; y < V; ++y) {
      if (preference(y) < cut || probs[y] < args.min_p) probs[y] = 0;
      total += probs[y];
    }
    for (int64_t y = 0; y < V; ++y) probs[y] = A(probs[y] / total);
  }
}

template void warp_rows(const WarpRows<float>&, int64_t, int64_t);
template void warp_rows(const WarpRows<double>&, int64_t, int64_t);

}  // namespace mpg::cpu
