// Elements that are loaded and stored at once, 16 bytes where rows lie on 16 bytes.
#pragma once

#include "../storage.h"

namespace mpg::cuda {

template <class T, int kElements = 16 / sizeof(T)>
struct alignas(sizeof(T) * kElements) Packed {
  static constexpr int kSize = kElements;
  T element[kElements];
};

// By value: through a reference the compiler loads element by element.
template <class P, class T>
__device__ __forceinline__ P load_packed(const T* x) {
  return *reinterpret_cast<const P*>(x);
}

// The first `count` of a thread's numbers; all of them 16 bytes at a time where they lie on 16
// bytes.
template <int kCount>
__device__ __forceinline__ void store_packed(const float (&x)[kCount], int64_t count, float* out) {
  using P = Packed<float>;
  const bool is_packed = count >= kCount && reinterpret_cast<uintptr_t>(out) % sizeof(P) == 0;
#pragma unroll
  for (int first = 0; first < kCount; first += P::kSize) {
    P packed;
#pragma unroll
    for (int e = 0; e < P::kSize; ++e) {
      packed.element[e] = x[first + e];
      if (!is_packed && first + e < count) out[first + e] = x[first + e];
    }
    if (is_packed) *reinterpret_cast<P*>(out + first) = packed;
  }
}

}  // namespace mpg::cuda
