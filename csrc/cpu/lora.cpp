// Low-rank updates of rows that each run an adapter of their own. Neighbouring rows of one group
// are a run: a part of the group's factor, which then lies in a cache, is used for all its tokens.
// Every number that comes out is a sum of its own, taken in an order that does not depend on the
// other tokens.
#include <algorithm>

#include "simd.h"

namespace mpg::cpu {
namespace {

constexpr int kTokens = 4;

// Token t of those of the rows from `row` on.
template <class T, class Pointer>
MPG_INLINE T* token(const TokenRows<Pointer>& rows, int64_t q, int64_t row, int64_t t) {
  return static_cast<T*>(rows.data) + (row + t / q) * rows.stride_row +
         t % q * rows.stride_position;
}

template <class T>
MPG_INLINE const T* factor(const void* factors, const AdapterRows& rows, int64_t row,
                           int64_t size) {
  return static_cast<const T*>(factors) + rows.groups[row] * rows.rank * size;
}

// Products of one token with two ranks.
template <class A, class T>
MPG_INLINE void multiply(const T* x, const T* down0, const T* down1, int64_t in, A* sums) {
  A a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
  for (int64_t i = 0; i < in; ++i) {
    const A feature = to_float(x[i]);
    a += feature * to_float(down0[i]);
    b += feature * to_float(down1[i]);
  }
  sums[0] = a;
  sums[1] = b;
}

// The same of four tokens.
template <class A, class T>
MPG_INLINE void multiply(const T* const (&x)[kTokens], const T* down0, const T* down1, int64_t in,
                         A (&sums)[kTokens][2]) {
  const T *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  A a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3, b0, b1, b2, b3)
  for (int64_t i = 0; i < in; ++i) {
    const A first = to_float(down0[i]), second = to_float(down1[i]);
    const A feature0 = to_float(x0[i]), feature1 = to_float(x1[i]);
    const A feature2 = to_float(x2[i]), feature3 = to_float(x3[i]);
    a0 += feature0 * first;
    a1 += feature1 * first;
    a2 += feature2 * first;
    a3 += feature3 * first;
    b0 += feature0 * second;
    b1 += feature1 * second;
    b2 += feature2 * second;
    b3 += feature3 * second;
  }
  const A of_tokens[kTokens][2] = {{a0, b0}, {a1, b1}, {a2, b2}, {a3, b3}};
  std::memcpy(sums, of_tokens, sizeof sums);
}

// One part of the ranks, for the first `count` tokens from `row` on.
template <class A, class T>
MPG_INLINE void shrink_run(const LoraShrink<A>& args, int64_t row, int64_t count, int64_t rank) {
  const int64_t q = args.rows.q, in = args.in, other = std::min(rank + 1, args.rows.rank - 1);
  const T* down = factor<T>(args.down, args.rows, row, in);
  for (int64_t t = 0; t < count;) {
    const int64_t num_tokens = count - t < kTokens ? 1 : kTokens;
    const T* x[kTokens];
    A sums[kTokens][2];
    for (int64_t i = 0; i < num_tokens; ++i) x[i] = token<const T>(args.x, q, row, t + i);
    if (num_tokens == 1) {
      multiply(x[0], down + rank * in, down + other * in, in, sums[0]);
    } else {
      multiply(x, down + rank * in, down + other * in, in, sums);
    }
    for (int64_t i = 0; i < num_tokens; ++i) {
      T* hidden = token<T>(args.hidden, q, row, t + i);
      hidden[rank] = to_stored<T>(sums[i][0]);
      hidden[other] = to_stored<T>(sums[i][other - rank]);
    }
    t += num_tokens;
  }
}

// Adds kRanks ranks of one token.
template <int kRanks, class A, class T>
MPG_INLINE void add(const T* hidden, const T* up, int64_t stride, int64_t size, A* sums) {
  A h[kRanks];
  for (int j = 0; j < kRanks; ++j) h[j] = to_float(hidden[j]);
  add_weighted<kRanks>(h, up, stride, size, sums);
}

// One part of the outputs.
template <class A, class T>
MPG_INLINE void expand_run(const LoraExpand<A>& args, int64_t row, int64_t count, int64_t begin) {
  const int64_t q = args.rows.q, stride = args.size;
  const int64_t size = std::min(kOutputPart, stride - begin);
  const T* up = factor<T>(args.up, args.rows, row, stride) + begin;
  for (int64_t t = 0; t < count; ++t) {
    const T* hidden = token<const T>(args.hidden, q, row, t) + args.rows.groups[row] * args.step;
    T* out = token<T>(args.out, q, row, t) + begin;
    A sums[kOutputPart] = {};
    int64_t j = 0;
    for (const RankBlock* block = args.blocks; block < args.blocks + args.num_blocks; ++block) {
      const int64_t first = std::max(block->begin - begin, int64_t(0));
      const int64_t num_outputs = std::min(block->end - begin, size) - first;
      const int64_t end = j + block->num_ranks;
      if (num_outputs > 0) {
        for (; j + 4 <= end; j += 4)
          add<4>(hidden + j, up + j * stride + first, stride, num_outputs, sums + first);
        for (; j < end; ++j)
          add<1>(hidden + j, up + j * stride + first, stride, num_outputs, sums + first);
      }
      j = end;
    }
    for (int64_t c = 0; c < size; ++c) out[c] = to_stored<T>(A(to_float(out[c])) + sums[c]);
  }
}

// Calls f(part, row, number of rows) for the runs of the items, which count the rows part by part.
template <class F>
void for_each_run(const AdapterRows& rows, int64_t begin, int64_t end, F f) {
  while (begin < end) {
    const int64_t row = begin % rows.R, most = std::min(rows.R - row, end - begin);
    int64_t count = 1;
    while (count < most && rows.groups[row + count] == rows.groups[row]) ++count;
    f(begin / rows.R, row, count);
    begin += count;
  }
}

}  // namespace

template <class A>
void lora_shrink(const LoraShrink<A>& args, int64_t begin, int64_t end) {
  const AdapterRows& rows = args.rows;
  with_logit_type<A>(rows.dtype, [&]<class T>(T) {
    for_each_run(rows, begin, end, [&](int64_t part, int64_t row, int64_t count) {
      const int64_t rank = part * kRankPart, num_tokens = count * rows.q;
      if (rows.has_adapter(rows.groups[row])) {
        at_level<shrink_run<A, T>>(args, row, num_tokens, rank);
        return;
      }
      for (int64_t t = 0; t < num_tokens; ++t) {
        T* hidden = token<T>(args.hidden, rows.q, row, t);
        std::fill(hidden + rank, hidden + std::min(rank + kRankPart, rows.rank), T{});
      }
    });
  });
}

template <class A>
void lora_expand(const LoraExpand<A>& args, int64_t begin, int64_t end) {
  const AdapterRows& rows = args.rows;
  with_logit_type<A>(rows.dtype, [&]<class T>(T) {
    for_each_run(rows, begin, end, [&](int64_t part, int64_t row, int64_t count) {
      if (!rows.has_adapter(rows.groups[row])) return;
      at_level<expand_run<A, T>>(args, row, count * rows.q, part * kOutputPart);
    });
  });
}

MPG_INSTANTIATE(lora_shrink, LoraShrink);
MPG_INSTANTIATE(lora_expand, LoraExpand);

}  // namespace mpg::cpu
