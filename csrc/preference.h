// The order in which top-k and top-p prefer tokens: larger value first, lower token among equals.
// As one unsigned number a token, so that a cut between kept and dropped tokens is a number too,
// found digit by digit without sorting.
#pragma once

#include "storage.h"

namespace mpg {

// Bits that order as the numbers do; adding 0 makes -0 and 0 equal.
MPG_HOST_DEVICE uint32_t ordered_bits(float x) {
  const uint32_t bits = bits_of(x + 0.f);
  return bits >> 31 ? ~bits : bits | uint32_t(1) << 31;
}

// Of the tokens of one row: a greater code is preferred, and no two are equal.
struct Preference {
  const float* row;
  int64_t V;
  int token_bits;  // enough for V - 1

  MPG_HOST_DEVICE Preference(const float* row, int64_t V) : row(row), V(V), token_bits(0) {
    while ((V - 1) >> token_bits != 0) ++token_bits;
  }
  MPG_HOST_DEVICE int num_bits() const { return 32 + token_bits; }
  MPG_HOST_DEVICE uint64_t operator()(int64_t y) const {
    return uint64_t(ordered_bits(row[y])) << token_bits | uint64_t(V - 1 - y);
  }
};

}  // namespace mpg
