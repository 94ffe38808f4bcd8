// Attention of rows that have their own lengths. A head's keys and values are read in parts, each
// for all queries that share them, as far as a row goes and no farther; the softmax is put together
// from its parts. What comes out of a query depends on nothing but its own row.
#include <algorithm>
#include <vector>

#include "simd.h"

namespace mpg::cpu {
namespace {

constexpr int64_t kPart = 512;   // keys: with their values 256 KiB of floats at 64 features
constexpr int64_t kValues = 32;  // of a part, that are added while as many keys are asked for

template <class T>
MPG_INLINE const T* head_data(const HeadRows& rows, int64_t row, int64_t head) {
  return static_cast<const T*>(rows.data) + row * rows.stride_row + head * rows.stride_head;
}

// Makes of a query's scores of a part its weights, beside those of the parts so far in its state.
template <class A>
MPG_INLINE void weigh_scores(int64_t count, A* scores, int64_t E, A* state) {
  A &max = state[E], &total = state[E + 1];
  A new_max = max;
#pragma omp simd reduction(max : new_max)
  for (int64_t s = 0; s < count; ++s) new_max = scores[s] > new_max ? scores[s] : new_max;
  const A shift = new_max == -INFINITY ? 0 : new_max;  // -inf - -inf is NaN
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < count; ++s) {
    scores[s] = exp_of(scores[s] - shift);
    sum += scores[s];
  }
  const A factor = exp_of(max - shift);  // of what was taken off a smaller maximum
  max = new_max;
  total = total * factor + sum;
  for (int64_t i = 0; i < E; ++i) state[i] *= factor;
}

// The queries of kQueries heads with the first `count` keys of a part, which they share. states:
// of each query what attend_head says, of the parts so far. next: keys that will be read after
// these, null where others have read this part before.
template <int kLanes, int kQueries, class A, class T>
MPG_INLINE void attend_part(const AttendRows<A>& args, const T* first_query, const T* keys,
                            const T* values, int64_t count, const T* next, A* states) {
  const int64_t key_stride = args.key.stride_position, stride = args.value.stride_position;
  A scores[kQueries][kPart];
  const T* queries[kQueries];
  A* sums[kQueries];
  for (int g = 0; g < kQueries; ++g) {
    queries[g] = first_query + g * args.query.stride_head;
    sums[g] = states + g * args.q * (args.E + 2);
  }
  const auto keep = [&](const A(&products)[kQueries][kOthers], int64_t s, int num_keys) {
    for (int g = 0; g < kQueries; ++g) {
      for (int i = 0; i < num_keys; ++i) scores[g][s + i] = products[g][i] * args.scale;
    }
  };
  A products[kQueries][kOthers];
  int64_t s = 0;
  for (; s + kOthers <= count; s += kOthers) {
    if (next != nullptr) prefetch(values + s * stride, kOthers, stride, args.E);
    multiply_rows<kLanes, kQueries, kOthers>(queries, keys + s * key_stride, key_stride, args.D,
                                             products);
    keep(products, s, kOthers);
  }
  for (; s < count; ++s) {
    multiply_rows<kLanes, kQueries, 1>(queries, keys + s * key_stride, key_stride, args.D,
                                       products);
    keep(products, s, 1);
  }
  for (int g = 0; g < kQueries; ++g) weigh_scores(count, scores[g], args.E, sums[g]);
  for (s = 0; s < count; s += kValues) {
    const int64_t num_values = std::min(kValues, count - s);
    if (next != nullptr) prefetch(next + s * key_stride, num_values, key_stride, args.D);
    const A* weights[kQueries];
    for (int g = 0; g < kQueries; ++g) weights[g] = scores[g] + s;
    add_products<kLanes>(weights, num_values, values + s * stride, stride, args.E, sums);
  }
}

// The same of all heads from g on, in tiles of kQueries and what is left.
template <int kLanes, int kQueries, class A, class T>
MPG_INLINE void attend_heads(const AttendRows<A>& args, int64_t g, const T* queries, const T* keys,
                             const T* values, int64_t count, const T* next, A* states) {
  for (; g + kQueries <= args.G; g += kQueries) {
    attend_part<kLanes, kQueries>(args, queries + g * args.query.stride_head, keys, values, count,
                                  g == 0 ? next : nullptr, states + g * args.q * (args.E + 2));
  }
  if constexpr (kQueries > 1) {
    if (g < args.G)
      attend_heads<kLanes, kQueries - 1>(args, g, queries, keys, values, count, next, states);
  }
}

// All queries of a row that share the keys of one head. states: for each of them the sum of values
// (E), the largest score and the sum of weights
template <class Tile, class A, class T>
MPG_INLINE void attend_head(const AttendRows<A>& args, int64_t row, int64_t head, A* states) {
  const int64_t num_queries = args.G * args.q, size = args.E + 2;
  const int64_t* positions = args.positions + row * args.q;
  int64_t longest = 0;
  for (int64_t t = 0; t < args.q; ++t) longest = std::max(longest, args.length(positions[t]));
  for (int64_t i = 0; i < num_queries; ++i) {
    std::fill(states + i * size, states + (i + 1) * size, A(0));
    states[i * size + args.E] = -INFINITY;
  }
  const T* queries = head_data<T>(args.query, row, head * args.G);
  const T* following = head + 1 < args.H  ? head_data<T>(args.key, row, head + 1)
                       : row + 1 < args.R ? head_data<T>(args.key, row + 1, 0)
                                          : head_data<T>(args.key, row, head);
  for (int64_t begin = 0; begin < longest; begin += kPart) {
    const T* keys = head_data<T>(args.key, row, head) + begin * args.key.stride_position;
    const T* values = head_data<T>(args.value, row, head) + begin * args.value.stride_position;
    const T* next = begin + kPart < longest ? keys + kPart * args.key.stride_position : following;
    for (int64_t t = 0; t < args.q; ++t) {
      const int64_t count = std::min(kPart, args.length(positions[t]) - begin);
      if (count <= 0) continue;
      attend_heads<Tile::kLanes, Tile::kRows>(args, 0, queries + t * args.query.stride_position,
                                              keys, values, count, t == 0 ? next : nullptr,
                                              states + t * size);
    }
  }
  for (int64_t i = 0; i < num_queries; ++i) {
    const int64_t t = i % args.q, query_head = head * args.G + i / args.q;
    const A* state = states + i * size;
    T* out =
        static_cast<T*>(args.out) + ((row * args.q + t) * args.H * args.G + query_head) * args.E;
    for (int64_t c = 0; c < args.E; ++c) out[c] = to_stored<T>(state[c] / state[args.E + 1]);
  }
}

}  // namespace

template <class A>
void attend_rows(const AttendRows<A>& args, int64_t begin, int64_t end) {
  std::vector<A> states(args.G * args.q * (args.E + 2));
  with_logit_type<A>(args.dtype, [&]<class T>(T) {
    for (int64_t item = begin; item < end; ++item) {
      at_levels<attend_head<WideTile, A, T>, attend_head<NarrowTile, A, T>,
                attend_head<SmallTile, A, T>>(args, item / args.H, item % args.H, states.data());
    }
  });
}

MPG_INSTANTIATE(attend_rows, AttendRows);

}  // namespace mpg::cpu
