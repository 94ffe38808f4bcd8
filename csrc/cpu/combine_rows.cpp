// Combined rows in two steps, each over slices of the vocabulary, so that the threads share a
// single row too: log v of every token with the slice's log-sum-exp; then the row's is taken off.
#include <algorithm>

#include "logsumexp.h"
#include "scores.h"

namespace mpg::cpu {
namespace {

// combined_log_mass of the tokens [begin, end) at position p of sequence b.
template <class T>
void combine_tokens(const CombineRows<double>& args, int64_t b, int64_t p, int64_t begin,
                    int64_t end, double* log_masses) {
  for (int64_t y = begin; y < end; ++y) log_masses[y - begin] = combined_log_mass<T>(args, b, p, y);
}

template <class T>
MPG_INLINE void combine_block(const CombineRows<float>& args, int64_t b, int64_t p, int64_t begin,
                              int64_t size, float* log_masses) {
  const ModelRows<T> models = {args.rows, b, p, begin};
  float base[kBlock] = {}, anchor[kBlock] = {};
  if (args.has_anchor) {
    models.logprobs(args.base, size, base);
    models.logprobs(0, size, anchor);
  }
  const float* weights = args.weights + (b * args.rows.logits.K + p) * args.N;
  ScoreSums sums(args.target, size);
  for (int64_t i = 0; i < args.N; ++i) {
    const int64_t model = i + args.has_anchor;
    sums.add(weights[i], models.logits(model), models.normalizer(model), anchor);
  }
  sums.values(log_masses);
  for (int64_t y = 0; y < size; ++y) {
    // Excluded by the base, whatever the ratios; invalid by the anchor, even where no weight asks.
    const float log_mass = is_nan(anchor[y]) ? NAN : base[y] + log_masses[y];
    log_masses[y] = base[y] == -INFINITY ? -INFINITY : log_mass;
  }
}

template <class T>
void combine_tokens(const CombineRows<float>& args, int64_t b, int64_t p, int64_t begin,
                    int64_t end, float* log_masses) {
  for (int64_t y = begin; y < end; y += kBlock) {
    at_level<combine_block<T>>(args, b, p, y, std::min(kBlock, end - y), log_masses + (y - begin));
  }
}

template <class A>
MPG_INLINE void normalize(A* log_masses, int64_t size, Normalizer<A> normalizer, A inv_temperature,
                          bool has_probs) {
  for (int64_t y = 0; y < size; ++y) {
    log_masses[y] = logprob(log_masses[y], normalizer, inv_temperature);
  }
  for (int64_t y = 0; has_probs && y < size; ++y) log_masses[y] = exp_of(log_masses[y]);
}

template <class A, class F>
void for_each_slice(const CombineRows<A>& args, int64_t begin, int64_t end, F f) {
  const int64_t V = args.rows.logits.V, slices = num_slices(V, args.slice_size);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first = item % slices * args.slice_size;
    f(item / slices, item % slices, first, std::min(V, first + args.slice_size));
  }
}

}  // namespace

template <class A>
void combine_slices(const CombineRows<A>& args, int64_t begin, int64_t end) {
  const ModelLogits& logits = args.rows.logits;
  for_each_slice(args, begin, end, [&](int64_t row, int64_t slice, int64_t first, int64_t last) {
    A* log_masses = args.log_rows + row * logits.V + first;
    with_logit_type<A>(logits.dtype, [&]<class T>(T) {
      combine_tokens<T>(args, row / logits.K, row % logits.K, first, last, log_masses);
    });
    args.row_partials[row * num_slices(logits.V, args.slice_size) + slice] =
        row_log_sum(log_masses, last - first, args.inv_temperature);
  });
}

template <class A>
void combine_rows(const CombineRows<A>& args, int64_t begin, int64_t end) {
  const int64_t V = args.rows.logits.V, slices = num_slices(V, args.slice_size);
  for_each_slice(args, begin, end, [&](int64_t row, int64_t slice, int64_t first, int64_t last) {
    LogSum<A> sum;
    for (int64_t s = 0; s < slices; ++s) {
      sum.merge(args.row_partials[row * slices + s], args.inv_temperature);
    }
    const Normalizer<A> normalizer = sum.normalizer();
    if (slice == 0) {
      args.log_totals[row] = normalizer.max * args.inv_temperature + normalizer.log_sum;
    }
    A* log_masses = args.log_rows + row * V + first;
    if (normalizer.log_sum != -A(INFINITY)) {
      at_level<normalize<A>>(log_masses, last - first, normalizer, args.inv_temperature,
                             args.has_probs);
    } else if (args.has_probs) {
      std::fill(log_masses, log_masses + last - first, A(0));
    }
  });
}

MPG_INSTANTIATE(combine_slices, CombineRows);
MPG_INSTANTIATE(combine_rows, CombineRows);

}  // namespace mpg::cpu
