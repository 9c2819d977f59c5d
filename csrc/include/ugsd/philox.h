// Philox4x32-10 (Salmon et al., SC 2011): uniforms as a function of (seed, offset, row, stream).
#pragma once

#include "ugsd/types.h"

namespace ugsd {

// Disjoint counters for the decisions that must not share randomness.
enum class Stream : uint32_t { kDraft = 0, kAccept = 1, kResidual = 2 };

struct Philox {
  uint32_t words[4];
};

UGSD_INLINE Philox philox4x32(const uint32_t (&counter)[4], uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 53 bits in [0, 1), the same number in every backend; `position` is the place in a drafted block.
UGSD_INLINE double uniform(int64_t seed, int64_t offset, int64_t row, Stream stream, int64_t position = 0) {
  const auto key = static_cast<uint64_t>(seed), count = static_cast<uint64_t>(offset);
  const uint32_t counter[4] = {static_cast<uint32_t>(count), static_cast<uint32_t>(count >> 32),
                               static_cast<uint32_t>(row),
                               static_cast<uint32_t>(stream) | static_cast<uint32_t>(position) << 8};
  const Philox p = philox4x32(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  return static_cast<double>((uint64_t{p.words[0] >> 5} << 26) + (p.words[1] >> 6)) * 0x1p-53;
}

}  // namespace ugsd
