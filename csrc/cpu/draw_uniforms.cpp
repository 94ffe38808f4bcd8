// Keyed uniforms, see philox.h.
#include "../philox.h"

namespace mpg::cpu {

void draw_uniforms(const DrawUniforms& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t index = 0; index < args.count; ++index) {
      args.uniforms[b * args.count + index] =
          keyed_uniform(args.seeds[b], args.rounds[b], args.purpose, args.first + uint32_t(index));
    }
  }
}

}  // namespace mpg::cpu
