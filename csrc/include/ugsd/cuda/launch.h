// Where an op is launched and what memory it may use.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ugsd::cuda {

// What the kernels of one call hand to each other.
struct Workspace {
  unsigned* counters;  // zero between calls
  char* bytes;         // whatever the last call left
};

struct Launch {
  cudaStream_t stream;
  Workspace (*reserve)(void* owner, int64_t counters, int64_t bytes);
  void* owner;

  Workspace workspace(int64_t counters, int64_t bytes) const { return reserve(owner, counters, bytes); }
};

}  // namespace ugsd::cuda
