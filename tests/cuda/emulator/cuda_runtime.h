// Stands in for CUDA's header, so that csrc/cuda/*.cu compile as plain C++ and their kernels run on the host.
//
// Every thread of a block is a fibre; a warp's lanes run up to their next collective, in changing order, then all go
// on. Blocks run one after another in a shuffled order. What a GPU would not forgive ends the process with a message:
// lanes of a warp at different collectives, or a warp that ends while others wait for it. As in a graph's capture,
// launches can be kept with their arguments and run later. Of the runtime there is no more than what a capture allows.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#ifndef __x86_64__
#error "the emulator switches stacks on x86-64 alone"
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;

enum class Wait { kNothing, kShuffle, kBallot, kWarp, kBlock, kForever };

struct Fibre {
  void* stack_pointer;
  Wait wait;
  uint64_t slots[2];  // of two collectives in a row
  unsigned round;
};

inline std::vector<Fibre> fibres;
inline Fibre* current = nullptr;
inline void* scheduler = nullptr;
inline const std::function<void()>* body = nullptr;
inline int64_t launches = 0;
inline bool capturing = false;
inline std::vector<std::function<void()>> captured;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// Saves the registers that a call preserves, and goes on with another stack.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*to*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

inline void wait(Wait what) {
  current->wait = what;
  switch_stack(&current->stack_pointer, scheduler);
}

inline void run_thread() {
  (*body)();
  wait(Wait::kForever);
}

inline char* stacks(size_t count) {
  static char* memory = nullptr;
  static size_t made = 0;
  if (count > made) {
    if (memory) munmap(memory, made * kStackBytes);
    memory = static_cast<char*>(
        mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) fail("no memory for stacks");
    made = count;
  }
  return memory;
}

inline void prepare(Fibre& fibre, char* stack) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where a caller's frame would be
  *--top = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fibre = {top, Wait::kNothing, {0, 0}, 0};
}

inline void step_warp(size_t first, bool forward) {
  for (int k = 0; k < kLanes; ++k) {
    const size_t t = first + static_cast<size_t>(forward ? k : kLanes - 1 - k);
    if (fibres[t].wait != Wait::kNothing) continue;
    current = &fibres[t];
    threadIdx.x = static_cast<unsigned>(t);
    switch_stack(&scheduler, current->stack_pointer);
  }
  const Wait what = fibres[first].wait;
  for (size_t t = first; t < first + kLanes; ++t)
    if (fibres[t].wait != what || fibres[t].round != fibres[first].round)
      fail("lanes of a warp diverge at a collective");
  if (what == Wait::kBlock || what == Wait::kForever) return;
  for (size_t t = first; t < first + kLanes; ++t) fibres[t].wait = Wait::kNothing;
}

inline void run_block(size_t threads) {
  char* memory = stacks(threads);
  for (size_t t = 0; t < threads; ++t) prepare(fibres[t], memory + t * kStackBytes);
  for (unsigned step = 0;; ++step) {
    bool running = false, waiting = false;
    for (size_t first = 0; first < threads; first += kLanes) {
      if (fibres[first].wait == Wait::kNothing) step_warp(first, step % 2 == 0);
      running |= fibres[first].wait == Wait::kNothing;
      waiting |= fibres[first].wait == Wait::kBlock;
    }
    if (running) continue;
    if (!waiting) return;
    for (size_t t = 0; t < threads; ++t) {
      if (fibres[t].wait == Wait::kForever) fail("a thread ends while others wait for it");
      fibres[t].wait = Wait::kNothing;
    }
  }
}

inline void run_grid(const dim3& grid, const dim3& block, const std::function<void()>& kernel) {
  if (block.x % kLanes) fail("blocks of whole warps only");
  ++launches;
  body = &kernel;
  gridDim = grid;
  blockDim = block;
  if (fibres.size() < block.x) fibres.resize(block.x);
  // A prime stride that does not divide the grid visits every block once.
  uint64_t stride = 7919;
  while (grid.x % stride == 0) stride += 2;
  for (uint64_t i = 0; i < grid.x; ++i) {
    blockIdx.x = static_cast<unsigned>((i * stride + static_cast<uint64_t>(launches)) % grid.x);
    run_block(block.x);
  }
}

template <class T>
uint64_t packed(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

inline int lane() { return static_cast<int>(threadIdx.x % kLanes); }

// Shows a value to the warp; another lane's is then read by `from`.
inline unsigned show(uint64_t bits, Wait what) {
  Fibre* own = current;
  const unsigned slot = own->round++ % 2;
  own->slots[slot] = bits;
  wait(what);
  return slot;
}

inline uint64_t from(int lane, unsigned slot) {
  const size_t first = threadIdx.x / kLanes * kLanes;
  return fibres[first + static_cast<size_t>(lane)].slots[slot];
}

template <class T>
T shuffle(unsigned mask, T value, int source) {
  if (mask != 0xffffffff) fail("collectives of whole warps only");
  const int own = lane();
  const unsigned slot = show(packed(value), Wait::kShuffle);
  const uint64_t bits = from(source < 0 || source >= kLanes ? own : source, slot);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Args&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (emulator::capturing)
    emulator::captured.push_back([=] { emulator::run_grid(grid, block, [&] { kernel(args...); }); });
  else
    emulator::run_grid(grid, block, [&] { kernel(args...); });
  return cudaSuccess;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulator::shuffle(mask, value, source % emulator::kLanes);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  return emulator::shuffle(mask, value, emulator::lane() ^ other);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned step) {
  return emulator::shuffle(mask, value, emulator::lane() - static_cast<int>(step));
}
inline unsigned __ballot_sync(unsigned mask, bool flag) {
  if (mask != 0xffffffff) emulator::fail("collectives of whole warps only");
  const unsigned slot = emulator::show(flag, emulator::Wait::kBallot);
  unsigned bits = 0;
  for (int k = 0; k < emulator::kLanes; ++k) bits |= static_cast<unsigned>(emulator::from(k, slot)) << k;
  return bits;
}
inline void __syncwarp() { emulator::show(0, emulator::Wait::kWarp); }
inline void __syncthreads() { emulator::wait(emulator::Wait::kBlock); }
inline void __threadfence() {}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(emulator::packed(x)); }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32) | low) >> (shift % 32));
}
inline int min(int a, int b) { return a < b ? a : b; }
