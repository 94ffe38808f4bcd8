// Rows divided by their root mean square, times a weight: what a decoder layer does to every token
// before it multiplies it. What comes out of a row depends on nothing else.
#include "simd.h"

namespace mpg::cpu {
namespace {

template <class A, class T>
MPG_INLINE void norm_rows(const RmsNorm<A>& args, int64_t begin, int64_t end) {
  const int64_t size = args.size;
  const T* weight = static_cast<const T*>(args.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * size;
    T* out = static_cast<T*>(args.out) + row * size;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) {
      const A feature = to_float(x[i]);
      sum += feature * feature;
    }
    const A scale = 1 / std::sqrt(sum / A(size) + args.eps);
    if (args.rounds_first) {
      for (int64_t i = 0; i < size; ++i) {
        const A normed = to_float(to_stored<T>(to_float(x[i]) * scale));
        out[i] = to_stored<T>(normed * (args.offset + to_float(weight[i])));
      }
    } else {
      for (int64_t i = 0; i < size; ++i) {
        const A normed = to_float(x[i]) * scale;
        out[i] = to_stored<T>(normed * (args.offset + to_float(weight[i])));
      }
    }
  }
}

}  // namespace

template <class A>
void rms_norm(const RmsNorm<A>& args, int64_t begin, int64_t end) {
  with_logit_type<A>(args.dtype, [&]<class T>(T) { at_level<norm_rows<A, T>>(args, begin, end); });
}

MPG_INSTANTIATE(rms_norm, RmsNorm);

}  // namespace mpg::cpu
