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

}  // namespace mpg::cuda
