// gate_block: a thread a block.
#include "ugsd/cuda/device.h"
#include "ugsd/cuda/kernels.h"
#include "ugsd/gate_block.h"

namespace ugsd::cuda {
namespace {

__global__ void gate_block_kernel(GateBlockArgs args) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b < args.batch) ugsd::gate_block(args, b);
}

}  // namespace

void gate_block(const GateBlockArgs& args, const Launch& on) { launch(gate_block_kernel, on, args.batch, 128, args); }

}  // namespace ugsd::cuda
