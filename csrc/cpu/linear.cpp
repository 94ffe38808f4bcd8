// Linear layers of few rows, whose weights are then read once. A tile of rows and panels is summed
// in registers. What comes out is summed in an order that depends on the number of features alone.
#include <algorithm>

#include "simd.h"

namespace mpg::cpu {
namespace {

// That a tile sums at once: two panels of so many lie in a second-level cache for all rows, and
// sums of parts have smaller errors.
constexpr int64_t kFeatures = 1024;

// Of a panel, of which the last one may not be full.
MPG_INLINE void copy_some(const float* from, int64_t count, float* to) {
  if (count == kPanel) {
    for (int j = 0; j < kPanel; ++j) to[j] = from[j];
  } else {
    for (int64_t j = 0; j < count; ++j) to[j] = from[j];
  }
}

template <int kRows, int kPanels>
MPG_INLINE void add_tile(const LinearPanels& args, int64_t row, int64_t panel, int64_t first) {
  const int64_t in = args.in, end = std::min(first + kFeatures, in);
  const float* x = args.x + row * in;
  const float* weights = args.panels + panel * in * kPanel;
  float sums[kRows][kPanels][kPanel] = {};
  for (int64_t i = first; i < end; ++i) {
    // With two panels few weights are on their way at a time: so early are the next tile's.
    if (kPanels <= 2 && row == 0) {
      for (int p = 0; p < kPanels; ++p) {
        __builtin_prefetch(weights + ((kPanels + p) * in + i) * kPanel, 0, 2);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const float feature = x[r * in + i];
      for (int p = 0; p < kPanels; ++p) {
#pragma omp simd
        for (int j = 0; j < kPanel; ++j)
          sums[r][p][j] += feature * weights[(p * in + i) * kPanel + j];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      const int64_t begin = (panel + p) * kPanel;
      float* out = args.out + (row + r) * args.size + begin;
      float total[kPanel] = {};
      const int64_t count = std::min(kPanel, args.size - begin);
      if (first > 0) {
        copy_some(out, count, total);
      } else if (args.bias != nullptr) {
        copy_some(args.bias + begin, count, total);
      }
      for (int j = 0; j < kPanel; ++j) total[j] += sums[r][p][j];
      copy_some(total, count, out);
    }
  }
}

// All rows from `row` on, in tiles of kRows and what is left.
template <int kRows, int kPanels>
MPG_INLINE void add_rows(const LinearPanels& args, int64_t row, int64_t panel, int64_t first) {
  for (; row + kRows <= args.R; row += kRows) add_tile<kRows, kPanels>(args, row, panel, first);
  if constexpr (kRows > 1) {
    if (row < args.R) add_rows<kRows - 1, kPanels>(args, row, panel, first);
  }
}

template <int kRows, int kPanels>
MPG_INLINE void multiply_panels(const LinearPanels& args, int64_t panel, int64_t end) {
  for (; panel + kPanels <= end; panel += kPanels) {
    for (int64_t first = 0; first < args.in; first += kFeatures) {
      add_rows<kRows, kPanels>(args, 0, panel, first);
    }
  }
  if constexpr (kPanels > 1) multiply_panels<kRows, kPanels / 2>(args, panel, end);
}

// Tiles of few rows have more panels, so that there are sums to add to, and weights to wait for,
// while others are on their way. A tile's sums stay in registers, here 32 of 16 numbers.
MPG_INLINE void multiply_wide(const LinearPanels& args, int64_t begin, int64_t end) {
  if (args.R <= 2) return multiply_panels<2, 8>(args, begin, end);
  if (args.R == 3) return multiply_panels<3, 6>(args, begin, end);
  if (args.R == 4) return multiply_panels<4, 4>(args, begin, end);
  multiply_panels<8, 2>(args, begin, end);
}

// The same with 16 registers of 8.
MPG_INLINE void multiply_narrow(const LinearPanels& args, int64_t begin, int64_t end) {
  if (args.R == 1) return multiply_panels<1, 4>(args, begin, end);
  multiply_panels<3, 2>(args, begin, end);
}

}  // namespace

void linear_panels(const LinearPanels& args, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (level() == Level::kAvx512) return at_avx512<multiply_wide>(args, begin, end);
#endif
  at_level<multiply_narrow>(args, begin, end);
}

}  // namespace mpg::cpu
