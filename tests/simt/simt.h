// Executes CUDA kernels on the CPU for tests: what launch.cuh includes under MPG_SIMT.
//
// One block at a time, one fiber per thread. A fiber runs until a barrier or a warp operation;
// there the scheduler takes over. Every warp runs as far as it can before the next one starts, the
// interleaving in which a missing barrier does the most harm. What hardware leaves undefined is an
// error here: barriers that not all threads reach, warp operations whose mask names an absent lane
// or not the caller, launches over the limits. Shared memory is all ones bits, NaN, when a block
// starts. The environment variable MPG_SIMT_ORDER picks the order of blocks, warps and lanes:
// forward (default), reverse or random.
//
// Overruns and misaligned accesses are for the sanitizers that this is compiled with. Out of sight
// remain: blocks that run at the same time, and memory order, as every switch of fibers is one
// (a __syncwarp beside another warp operation is never missed). One-dimensional blocks.
// x86-64 only.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SIMT_START_SWITCH(fake, bottom, size) __sanitizer_start_switch_fiber(fake, bottom, size)
#define SIMT_FINISH_SWITCH(fake, bottom, size) __sanitizer_finish_switch_fiber(fake, bottom, size)
#else
#define SIMT_START_SWITCH(fake, bottom, size) (void)0
#define SIMT_FINISH_SWITCH(fake, bottom, size) (void)0
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static
#define MPG_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (void)(stream), simt::launch(grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); })

// Declares the dynamic shared memory of a block, for nvcc `extern __shared__ type name[]`. No
// kernel needs any so far; the first that does brings this macro to launch.cuh.
#define MPG_DYNAMIC_SHARED(type, name) \
  type* const name = reinterpret_cast<type*>(simt::machine.dynamic_shared.data())

// The static shared memory of all kernels, collected by shared.ld.
extern "C" char simt_shared_begin[], simt_shared_end[];

namespace simt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr unsigned kLanes = 32, kMaxThreads = 1024;
constexpr size_t kMaxDynamicShared = 48 * 1024;  // without asking the driver for more
constexpr size_t kStackBytes = 256 * 1024;

enum class State { kReady, kAtBarrier, kAtWarpOp, kFinished };

struct Fiber {
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // of the address sanitizer
  State state = State::kFinished;
  uintptr_t site = 0;  // where in the source it waits
  unsigned mask = 0;   // of the warp operation
  uint64_t sent = 0;
  uint64_t shown = 0;  // what was sent when the operation was complete; a fast lane sends again
};

struct Machine {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);  // never resized: fibers refer to it
  unsigned num_threads = 0, current = 0;
  void (*call)(void*) = nullptr;
  void* kernel = nullptr;
  std::exception_ptr thrown;
  std::vector<char> dynamic_shared;  // of exactly the size asked for, so that an overrun shows
  void* stack_pointer = nullptr;     // of the scheduler, which runs on the caller's stack
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
};
inline Machine machine;

// Saves the callee-saved registers and the stack pointer, and continues on another stack.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*save*/, void* /*next*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

inline void to_scheduler() {
  Fiber& fiber = machine.fibers[machine.current];
  SIMT_START_SWITCH(&fiber.fake_stack, machine.stack_bottom, machine.stack_bytes);
  swap_stacks(&fiber.stack_pointer, machine.stack_pointer);
  SIMT_FINISH_SWITCH(fiber.fake_stack, nullptr, nullptr);
}

inline void to_fiber(unsigned thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  threadIdx = {thread, 0, 0};
  SIMT_START_SWITCH(&machine.fake_stack, fiber.stack, kStackBytes);
  swap_stacks(&machine.stack_pointer, fiber.stack_pointer);
  SIMT_FINISH_SWITCH(machine.fake_stack, nullptr, nullptr);
}

// A fiber serves one thread of every block: its frames unwind, so nothing of a block is left.
inline void run_fiber() {
  SIMT_FINISH_SWITCH(nullptr, &machine.stack_bottom, &machine.stack_bytes);
  for (;;) {
    try {
      machine.call(machine.kernel);
    } catch (...) {
      machine.thrown = std::current_exception();
    }
    machine.fibers[machine.current].state = State::kFinished;
    to_scheduler();
  }
}

inline void start_fiber(Fiber& fiber) {
  fiber.state = State::kReady;
  if (fiber.stack != nullptr) return;
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw Error("simt: no memory for a stack");
  ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);  // an abandoned fiber's frames were here
  fiber.stack = static_cast<char*>(stack);
  // As swap_stacks leaves a stack: six registers, then the address to return to, which is called
  // with a stack pointer 8 off 16 bytes like any function.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(&run_fiber);
  fiber.stack_pointer = top - 6;
}

// After an error: fibers stopped inside a kernel cannot be used again.
inline void abandon_fibers() {
  for (Fiber& fiber : machine.fibers) {
    if (fiber.stack != nullptr) munmap(fiber.stack, kStackBytes);
    fiber = Fiber();
  }
  machine.thrown = nullptr;
}

inline std::string place(unsigned thread) {
  return " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", thread " +
         std::to_string(thread) + ")";
}

inline void wait(State state, unsigned mask, uintptr_t site) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  fiber.mask = mask;
  fiber.site = site;
  to_scheduler();
}

// Lets the lanes go on whose warp operation is complete: all of the mask wait at one site.
inline bool release_warp(unsigned first) {
  const unsigned count = std::min(kLanes, machine.num_threads - first);
  Fiber* lanes = &machine.fibers[first];
  bool released = false;
  for (unsigned lane = 0; lane < count; ++lane) {
    if (lanes[lane].state != State::kAtWarpOp) continue;
    const auto [mask, site] = std::pair(lanes[lane].mask, lanes[lane].site);
    bool complete = true;
    for (unsigned other = 0; other < kLanes; ++other) {
      if ((mask >> other & 1) == 0) continue;
      if (other >= count || lanes[other].state == State::kFinished) {
        throw Error("simt: warp operation waits for lane " + std::to_string(other) +
                    ", which has left" + place(first + lane));
      }
      complete &= lanes[other].state == State::kAtWarpOp && lanes[other].mask == mask &&
                  lanes[other].site == site;
    }
    if (!complete) continue;
    for (unsigned other = 0; other < count; ++other) {
      if ((mask >> other & 1) == 0) continue;
      lanes[other].state = State::kReady;
      lanes[other].shown = lanes[other].sent;
    }
    released = true;
  }
  return released;
}

// Once no warp can go on: true if the block has finished, else all threads pass their barrier.
inline bool pass_barrier() {
  const auto begin = machine.fibers.begin(), end = begin + machine.num_threads;
  const auto is = [](State state) { return [=](const Fiber& f) { return f.state == state; }; };
  if (std::all_of(begin, end, is(State::kFinished))) return true;
  const auto stuck = std::find_if(begin, end, is(State::kAtWarpOp));
  if (stuck != end) {
    throw Error("simt: deadlock, a warp operation never completes" +
                place(unsigned(stuck - begin)));
  }
  const auto left = std::find_if(begin, end, is(State::kFinished));
  if (left != end) {
    throw Error("simt: divergent barrier, a thread left before it" + place(unsigned(left - begin)));
  }
  for (auto fiber = begin; fiber != end; ++fiber) {
    if (fiber->site != begin->site) {
      throw Error("simt: divergent barrier, threads wait at two" + place(unsigned(fiber - begin)));
    }
    fiber->state = State::kReady;
  }
  return false;
}

enum class Order { kForward, kReverse, kRandom };

inline Order order_from_environment() {
  const char* value = std::getenv("MPG_SIMT_ORDER");
  const std::string_view name = value == nullptr ? "forward" : value;
  if (name == "forward") return Order::kForward;
  if (name == "reverse") return Order::kReverse;
  if (name == "random") return Order::kRandom;
  throw Error("simt: MPG_SIMT_ORDER must be forward, reverse or random, got " + std::string(name));
}

inline void arrange(std::vector<unsigned>& items, unsigned first, unsigned count, Order order,
                    std::mt19937& random) {
  items.resize(count);
  std::iota(items.begin(), items.end(), first);
  if (order == Order::kReverse) std::reverse(items.begin(), items.end());
  if (order == Order::kRandom) std::shuffle(items.begin(), items.end(), random);
}

// Written past the redzones between variables, hence unchecked.
__attribute__((no_sanitize("address"))) inline void poison_shared_memory() {
  for (volatile char* byte = simt_shared_begin; byte != simt_shared_end; ++byte) *byte = char(0xff);
}

inline void run_block(Order order, std::mt19937& random) {
  poison_shared_memory();
  std::fill(machine.dynamic_shared.begin(), machine.dynamic_shared.end(), char(0xff));
  for (unsigned i = 0; i < machine.num_threads; ++i) start_fiber(machine.fibers[i]);
  static std::vector<unsigned> warps, threads;
  do {
    arrange(warps, 0, (machine.num_threads + kLanes - 1) / kLanes, order, random);
    for (const unsigned warp : warps) {
      const unsigned first = warp * kLanes;
      do {
        arrange(threads, first, std::min(kLanes, machine.num_threads - first), order, random);
        for (const unsigned thread : threads) {
          if (machine.fibers[thread].state != State::kReady) continue;
          to_fiber(thread);
          if (machine.thrown) std::rethrow_exception(machine.thrown);
        }
      } while (release_warp(first));
    }
  } while (!pass_barrier());
}

inline std::string sizes(dim3 d) {
  return std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z);
}

template <class Kernel>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Kernel kernel) {
  const auto is_at_most = [](unsigned size, unsigned most) { return size >= 1 && size <= most; };
  if (!is_at_most(block.x, kMaxThreads) || block.y != 1 || block.z != 1) {
    throw Error("simt: a block must have 1 to 1024 threads in x alone, got " + sizes(block));
  }
  if (!is_at_most(grid.x, 0x7fffffff) || !is_at_most(grid.y, 65535) || !is_at_most(grid.z, 65535)) {
    throw Error("simt: the grid is over the limits: " + sizes(grid));
  }
  if (shared_bytes > kMaxDynamicShared) {
    throw Error("simt: at most 48 KiB of dynamic shared memory, got " +
                std::to_string(shared_bytes) + " bytes");
  }
  const Order order = order_from_environment();
  std::mt19937 random(grid.x);  // a fixed seed: a failure repeats
  machine.num_threads = block.x;
  std::vector<char>(shared_bytes).swap(machine.dynamic_shared);
  machine.call = [](void* kernel) { (*static_cast<Kernel*>(kernel))(); };
  machine.kernel = &kernel;
  const uint64_t num_blocks = uint64_t(grid.x) * grid.y * grid.z;
  try {
    for (uint64_t i = 0; i < num_blocks; ++i) {
      const uint64_t at = order == Order::kReverse ? num_blocks - 1 - i : i;
      blockIdx = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y),
                  unsigned(at / grid.x / grid.y)};
      run_block(order, random);
    }
  } catch (...) {
    const std::exception_ptr error = std::current_exception();
    abandon_fibers();
    std::rethrow_exception(error);
  }
}

// Shows `value` to the warp, once all lanes of the mask are here.
template <class T>
void exchange(unsigned mask, T value, uintptr_t site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Fiber& fiber = machine.fibers[machine.current];
  if ((mask >> machine.current % kLanes & 1) == 0) {
    throw Error("simt: lane outside its own mask" + place(machine.current));
  }
  std::memcpy(&fiber.sent, &value, sizeof value);
  wait(State::kAtWarpOp, mask, site);
}

inline const uint64_t& shown_by(unsigned lane) {
  return machine.fibers[machine.current / kLanes * kLanes + lane].shown;
}

template <class T>
T shuffle(unsigned mask, T value, unsigned source, uintptr_t site) {
  exchange(mask, value, site);
  std::memset(static_cast<void*>(&value), 0xff, sizeof value);  // undefined for lanes not named
  if (mask >> source & 1) std::memcpy(&value, &shown_by(source), sizeof value);
  return value;
}

}  // namespace simt

// A site is a source position, not a return address: compilers duplicate calls.
#define SIMT_SITE_PARAMETERS const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_SITE (reinterpret_cast<uintptr_t>(file) * 65536 + unsigned(line))

inline void __syncthreads(SIMT_SITE_PARAMETERS) {
  simt::wait(simt::State::kAtBarrier, 0, SIMT_SITE);
}
inline void __syncwarp(unsigned mask = 0xffffffff, SIMT_SITE_PARAMETERS) {
  simt::exchange(mask, 0, SIMT_SITE);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, SIMT_SITE_PARAMETERS) {
  return simt::shuffle(mask, value, unsigned(source) % simt::kLanes, SIMT_SITE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, SIMT_SITE_PARAMETERS) {
  const unsigned lane = threadIdx.x % simt::kLanes, source = lane + delta;
  return simt::shuffle(mask, value, source < simt::kLanes ? source : lane, SIMT_SITE);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, SIMT_SITE_PARAMETERS) {
  simt::exchange(mask, uint64_t(predicate), SIMT_SITE);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < simt::kLanes; ++lane) {
    if (mask >> lane & 1) ballot |= unsigned(simt::shown_by(lane)) << lane;
  }
  return ballot;
}
// A failed launch throws, so none is left to report.
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t) { return "simulated"; }

// Blocks run one after the other, and fibers only change where they wait.
template <class T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, T(*address + value));
}

inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
