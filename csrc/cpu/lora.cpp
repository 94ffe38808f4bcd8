// Low-rank updates of rows that each run an adapter of their own. Neighbouring rows of one group
// are a run: a part of the group's factor, which then lies in a cache, is used for all its tokens.
// Every number that comes out is a sum of its own, taken in an order that does not depend on the
// other tokens.
#include <algorithm>

#include "simd.h"

namespace mpg::cpu {
namespace {

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

// One part of the ranks, for the tokens [t, count) from `row` on.
template <int kLanes, int kTokens, class A, class T>
MPG_INLINE void shrink_tokens(const LoraShrink<A>& args, int64_t row, int64_t t, int64_t count,
                              int64_t rank) {
  const int64_t q = args.rows.q, in = args.in, end = std::min(rank + kRankPart, args.rows.rank);
  const T* down = factor<T>(args.down, args.rows, row, in);
  for (; t + kTokens <= count; t += kTokens) {
    const T* x[kTokens];
    for (int i = 0; i < kTokens; ++i) x[i] = token<const T>(args.x, q, row, t + i);
    const auto keep = [&](const A(&sums)[kTokens][kOthers], int64_t first, int num_ranks) {
      for (int i = 0; i < kTokens; ++i) {
        T* hidden = token<T>(args.hidden, q, row, t + i) + first;
        for (int j = 0; j < num_ranks; ++j) hidden[j] = to_stored<T>(sums[i][j]);
      }
    };
    A sums[kTokens][kOthers];
    int64_t r = rank;
    for (; r + kOthers <= end; r += kOthers) {
      multiply_rows<kLanes, kTokens, kOthers>(x, down + r * in, in, in, sums);
      keep(sums, r, kOthers);
    }
    for (; r < end; ++r) {
      multiply_rows<kLanes, kTokens, 1>(x, down + r * in, in, in, sums);
      keep(sums, r, 1);
    }
  }
  if constexpr (kTokens > 1) {
    if (t < count) shrink_tokens<kLanes, kTokens - 1, A, T>(args, row, t, count, rank);
  }
}

template <class Tile, class A, class T>
MPG_INLINE void shrink_run(const LoraShrink<A>& args, int64_t row, int64_t count, int64_t rank) {
  shrink_tokens<Tile::kLanes, Tile::kRows, A, T>(args, row, 0, count, rank);
}

// One part of the outputs, for the tokens [t, count) from `row` on.
template <int kLanes, int kTokens, class A, class T>
MPG_INLINE void expand_tokens(const LoraExpand<A>& args, int64_t row, int64_t t, int64_t count,
                              int64_t begin) {
  const int64_t q = args.rows.q, stride = args.size;
  const int64_t size = std::min(kOutputPart, stride - begin);
  const T* up = factor<T>(args.up, args.rows, row, stride) + begin;
  for (; t + kTokens <= count; t += kTokens) {
    A sums[kTokens][kOutputPart] = {};
    int64_t rank = args.rows.groups[row] * args.step, up_rank = 0;
    for (const RankBlock* block = args.blocks; block < args.blocks + args.num_blocks; ++block) {
      const int64_t first = std::max(block->begin - begin, int64_t(0));
      const int64_t num_outputs = std::min(block->end - begin, size) - first;
      const T* hidden[kTokens];
      A* of_block[kTokens];
      for (int i = 0; i < kTokens; ++i) {
        hidden[i] = token<const T>(args.hidden, q, row, t + i) + rank + up_rank;
        of_block[i] = sums[i] + first;
      }
      if (num_outputs > 0) {
        add_products<kLanes>(hidden, block->num_ranks, up + up_rank * stride + first, stride,
                             num_outputs, of_block);
      }
      up_rank += block->num_ranks;
    }
    for (int i = 0; i < kTokens; ++i) {
      T* out = token<T>(args.out, q, row, t + i) + begin;
      for (int64_t c = 0; c < size; ++c) out[c] = to_stored<T>(A(to_float(out[c])) + sums[i][c]);
    }
  }
  if constexpr (kTokens > 1) {
    if (t < count) expand_tokens<kLanes, kTokens - 1, A, T>(args, row, t, count, begin);
  }
}

template <class Tile, class A, class T>
MPG_INLINE void expand_run(const LoraExpand<A>& args, int64_t row, int64_t count, int64_t begin) {
  expand_tokens<Tile::kLanes, Tile::kRows, A, T>(args, row, 0, count, begin);
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
        at_levels<shrink_run<WideTile, A, T>, shrink_run<NarrowTile, A, T>,
                  shrink_run<SmallTile, A, T>>(args, row, num_tokens, rank);
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
      at_levels<expand_run<WideTile, A, T>, expand_run<NarrowTile, A, T>,
                expand_run<SmallTile, A, T>>(args, row, count * rows.q, part * kOutputPart);
    });
  });
}

MPG_INSTANTIATE(lora_shrink, LoraShrink);
MPG_INSTANTIATE(lora_expand, LoraExpand);

}  // namespace mpg::cpu
