// Temperature, top-k, top-p and min-p. A cut of top-k or top-p is found without sorting the
// vocabulary: one histogram over the distance from the largest value, then a selection among the
// tokens of the one bin that the cut goes through.
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace mpg::cpu {
namespace {

constexpr int kBins = 256;  // each a sixteenth of a factor e wide: 16 of them, and the rest

MPG_INLINE float exp_of(float x) { return exp_nonpositive(x); }
MPG_INLINE double exp_of(double x) { return std::exp(x); }

// The largest value, or NaN where there is NaN or +inf.
template <class A>
MPG_INLINE A max_of(const A* row, int64_t V) {
  A max = -A(INFINITY);
  int64_t num_invalid = 0;
#pragma omp simd reduction(max : max) reduction(+ : num_invalid)
  for (int64_t y = 0; y < V; ++y) {
    max = row[y] > max ? row[y] : max;
    num_invalid += !(row[y] < A(INFINITY));
  }
  return num_invalid > 0 ? A(NAN) : max;
}

// Masses, 1 for the largest value, and their sum.
template <class A>
MPG_INLINE double exponentiate(const A* row, int64_t V, double max, double scale, A* masses) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t y = 0; y < V; ++y) {
    masses[y] = exp_of(A((row[y] - max) * scale));
    total += masses[y];
  }
  return total;
}

// Keeps the masses of tokens with x >= least, and adds them up.
template <class A>
MPG_INLINE double keep_from(A least, const A* x, int64_t size, A* masses) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t y = 0; y < size; ++y) {
    masses[y] = x[y] >= least ? masses[y] : 0;
    total += masses[y];
  }
  return total;
}

// Tokens are preferred by value and, among equals, by lower id.
template <class A>
double keep_to(int64_t last, const A* row, int64_t V, A* masses) {
  const int64_t size = last + 1;  // of those that also an equal value would keep
  return at_level<keep_from<A>>(row[last], row, size, masses) +
         at_level<keep_from<A>>(std::nextafter(row[last], A(INFINITY)), row + size, V - size,
                                masses + size);
}

template <class A>
MPG_INLINE void multiply(double factor, int64_t V, A* masses) {
  for (int64_t y = 0; y < V; ++y) masses[y] = A(masses[y] * factor);
}

template <class A>
MPG_INLINE void find_bins(const A* row, int64_t V, A max, double temperature, uint8_t* bins) {
  const A scale = A(16 / temperature);
  for (int64_t y = 0; y < V; ++y) {
    const A distance = (max - row[y]) * scale;
    bins[y] = uint8_t(distance < kBins - 1 ? int32_t(distance) : kBins - 1);
  }
}

// The least preferred token of those to keep: with it, and not without, they weigh `budget`.
template <class A, class F>
int64_t find_last(const A* row, const std::vector<uint8_t>& bins, double budget, F weight_of) {
  // Four histograms: in a single one, most sums would wait for the one before.
  double parts[4][kBins] = {}, weights[kBins];
  for (size_t y = 0; y < bins.size(); ++y) parts[y % 4][bins[y]] += weight_of(y);
  for (int i = 0; i < kBins; ++i)
    weights[i] = parts[0][i] + parts[1][i] + parts[2][i] + parts[3][i];
  int bin = 0, last_bin = kBins - 1;
  while (weights[last_bin] == 0) --last_bin;  // where rounding leaves all together below the budget
  double before = 0;                          // weight of the tokens preferred to those in question
  while (bin < last_bin && before + weights[bin] < budget) before += weights[bin++];

  std::vector<int64_t> tokens;
  for (size_t y = 0; y < bins.size(); ++y) {
    if (bins[y] == bin) tokens.push_back(int64_t(y));
  }
  auto begin = tokens.begin(), end = tokens.end();
  while (end - begin > 1) {
    const auto middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, [row](int64_t a, int64_t b) {
      return row[a] > row[b] || (row[a] == row[b] && a < b);
    });
    double weight = 0;
    for (auto y = begin; y < middle; ++y) weight += weight_of(*y);
    if (before + weight >= budget) {
      end = middle;
    } else {
      before += weight;
      begin = middle;
    }
  }
  return *begin;
}

}  // namespace

template <class A>
void warp_rows(const WarpRows<A>& args, int64_t begin, int64_t end) {
  const int64_t V = args.V;
  for (int64_t r = begin; r < end; ++r) {
    const A* row = args.log_rows + r * V;
    A* probs = args.probs + r * V;
    const WarpOptions options = args.options_of(r);
    const A max = options.is_valid() ? at_level<max_of<A>>(row, V) : A(NAN);
    if (is_nan(max) || max == -A(INFINITY) || options.temperature == 0) {
      std::fill(probs, probs + V, is_nan(max) ? A(NAN) : A(0));
      if (max > -A(INFINITY)) probs[std::find(row, row + V, max) - row] = 1;
      continue;
    }

    double total = at_level<exponentiate<A>>(row, V, max, options.scale(), probs);
    std::vector<uint8_t> bins;
    const bool has_top_k = options.top_k > 0 && options.top_k < V;
    if (has_top_k || options.top_p < 1) {
      bins.resize(V);
      at_level<find_bins<A>>(row, V, max, options.temperature, bins.data());
    }
    if (has_top_k) {
      const int64_t last = find_last(row, bins, double(options.top_k), [](int64_t) { return 1; });
      total = keep_to(last, row, V, probs);
    }
    if (options.top_p < 1) {
      const auto mass_of = [probs](int64_t y) { return double(probs[y]); };
      total = keep_to(find_last(row, bins, options.top_p * total, mass_of), row, V, probs);
    }
    if (options.min_p > 0) total = at_level<keep_from<A>>(A(options.min_p), probs, V, probs);
    at_level<multiply<A>>(1 / total, V, probs);
  }
}

MPG_INSTANTIATE(warp_rows, WarpRows);

}  // namespace mpg::cpu
