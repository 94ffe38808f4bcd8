// Keyed uniforms, see philox.h: one thread per number.
#include "../philox.h"
#include "launch.cuh"

namespace mpg::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) draw_uniforms_kernel(const DrawUniforms args) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.B * args.count) return;
  const int64_t b = i / args.count;
  args.uniforms[i] = keyed_uniform(args.seeds[b], args.rounds[b], args.purpose,
                                   args.first + uint32_t(i % args.count));
}

}  // namespace

void draw_uniforms(const DrawUniforms& args, void* stream) {
  const dim3 grid(blocks_for(args.B * args.count, kThreads));
  MPG_LAUNCH(draw_uniforms_kernel, grid, kThreads, 0, stream, args);
}

}  // namespace mpg::cuda
