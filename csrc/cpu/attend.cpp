// Attention of rows that have their own lengths. A head's keys and values are read in parts, each
// for all queries that share them, as far as a row goes and no farther; the softmax is put together
// from its parts. What comes out of a query depends on nothing but its own row.
#include <algorithm>
#include <vector>

#include "simd.h"

namespace mpg::cpu {
namespace {

constexpr int64_t kKeys = 512;  // of a part: with their values 256 KiB of floats at 64 features

template <class T>
MPG_INLINE const T* head_data(const HeadRows& rows, int64_t row, int64_t head) {
  return static_cast<const T*>(rows.data) + row * rows.stride_row + head * rows.stride_head;
}

// Scores of neighbouring keys.
template <class A, class T>
MPG_INLINE void score_keys(const T* query, const T* keys, int64_t stride, int64_t count, int64_t D,
                           A scale, A* scores) {
  int64_t s = 0;
  for (; s + 4 <= count; s += 4) {
    const T *k0 = keys + s * stride, *k1 = k0 + stride, *k2 = k1 + stride, *k3 = k2 + stride;
    A a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t i = 0; i < D; ++i) {
      const A feature = to_float(query[i]);
      a += feature * to_float(k0[i]);
      b += feature * to_float(k1[i]);
      c += feature * to_float(k2[i]);
      d += feature * to_float(k3[i]);
    }
    scores[s] = a * scale;
    scores[s + 1] = b * scale;
    scores[s + 2] = c * scale;
    scores[s + 3] = d * scale;
  }
  for (; s < count; ++s) {
    const T* key = keys + s * stride;
    A a = 0;
#pragma omp simd reduction(+ : a)
    for (int64_t i = 0; i < D; ++i) a += A(to_float(query[i])) * to_float(key[i]);
    scores[s] = a * scale;
  }
}

// One query with the first `count` keys of a part. sums (E), max and total are of the parts so far.
template <class A, class T>
MPG_INLINE void attend_part(const AttendRows<A>& args, const T* query, const T* keys,
                            const T* values, int64_t count, A* sums, A& max, A& total) {
  A scores[kKeys];
  score_keys(query, keys, args.key.stride_position, count, args.D, args.scale, scores);
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
  for (int64_t i = 0; i < args.E; ++i) sums[i] *= factor;
  const int64_t stride = args.value.stride_position;
  int64_t s = 0;
  for (; s + 8 <= count; s += 8)
    add_weighted<8>(scores + s, values + s * stride, stride, args.E, sums);
  for (; s < count; ++s) add_weighted<1>(scores + s, values + s * stride, stride, args.E, sums);
}

// All queries of a row that share the keys of one head. states: for each of them E + 2 numbers
template <class A, class T>
MPG_INLINE void attend_head(const AttendRows<A>& args, int64_t row, int64_t head, A* states) {
  const int64_t num_queries = args.G * args.q, size = args.E + 2;
  const int64_t* positions = args.positions + row * args.q;
  int64_t longest = 0;
  for (int64_t t = 0; t < args.q; ++t) longest = std::max(longest, args.length(positions[t]));
  for (int64_t i = 0; i < num_queries; ++i) {
    std::fill(states + i * size, states + (i + 1) * size, A(0));
    states[i * size + args.E] = -INFINITY;
  }
  for (int64_t begin = 0; begin < longest; begin += kKeys) {
    const T* keys = head_data<T>(args.key, row, head) + begin * args.key.stride_position;
    const T* values = head_data<T>(args.value, row, head) + begin * args.value.stride_position;
    for (int64_t i = 0; i < num_queries; ++i) {
      const int64_t t = i % args.q, count = std::min(kKeys, args.length(positions[t]) - begin);
      if (count <= 0) continue;
      const T* query = head_data<T>(args.query, row, head * args.G + i / args.q) +
                       t * args.query.stride_position;
      A* state = states + i * size;
      attend_part(args, query, keys, values, count, state, state[args.E], state[args.E + 1]);
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
      at_level<attend_head<A, T>>(args, item / args.H, item % args.H, states.data());
    }
  });
}

MPG_INSTANTIATE(attend_rows, AttendRows);

}  // namespace mpg::cpu
