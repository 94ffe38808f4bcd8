// The order in which top-k and top-p prefer tokens: larger value first, lower token among equals.
// As one unsigned number a token, so that a cut between kept and dropped tokens is a number too,
// found digit by digit without sorting.
#pragma once

#include <type_traits>

#include "storage.h"

namespace mpg {

// Bits that order as the numbers do; adding 0 makes -0 and 0 equal.
MPG_HOST_DEVICE uint32_t ordered_bits(float x) {
  x += 0.f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | uint32_t(1) << 31;
}
MPG_HOST_DEVICE uint64_t ordered_bits(double x) {
  x += 0.;
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

__extension__ typedef unsigned __int128 UInt128;

// Of the tokens of one row: a greater code is preferred, and no two are equal.
template <class A>
struct Preference {
  using Code = std::conditional_t<sizeof(A) == sizeof(float), uint64_t, UInt128>;
  const A* row;
  int64_t V;
  int token_bits;  // enough for V - 1

  MPG_HOST_DEVICE Preference(const A* row, int64_t V) : row(row), V(V), token_bits(0) {
    while ((V - 1) >> token_bits != 0) ++token_bits;
  }
  MPG_HOST_DEVICE int num_bits() const { return int(sizeof(A) * 8) + token_bits; }
  MPG_HOST_DEVICE Code operator()(int64_t y) const {
    return Code(ordered_bits(row[y])) << token_bits | Code(V - 1 - y);
  }
};

}  // namespace mpg
