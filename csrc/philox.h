// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// keyed uniforms made of it. A key is used for one number, so no state is kept anywhere.
#pragma once

#include "storage.h"

namespace mpg {

struct PhiloxBlock {
  uint32_t word[4];
};

MPG_HOST_DEVICE PhiloxBlock philox4x32_10(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = kMultiplier0 * counter.word[0];
    const uint64_t product1 = kMultiplier1 * counter.word[2];
    counter = {{uint32_t(product1 >> 32) ^ counter.word[1] ^ key0, uint32_t(product1),
                uint32_t(product0 >> 32) ^ counter.word[3] ^ key1, uint32_t(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// The uniform in [0, 1) with 53 random bits whose key is (seed, round, purpose, index).
MPG_HOST_DEVICE double keyed_uniform(int64_t seed, int64_t round, uint32_t purpose,
                                     uint32_t index) {
  const PhiloxBlock counter = {{index, purpose, uint32_t(round), uint32_t(uint64_t(round) >> 32)}};
  const PhiloxBlock block = philox4x32_10(counter, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
  return (double(block.word[0] >> 5) * 0x1p26 + double(block.word[1] >> 6)) * 0x1p-53;
}

}  // namespace mpg
