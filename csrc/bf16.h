// bfloat16 as stored: the upper half of a float. Safe in files compiled for a wider instruction set: nothing
// here is emitted for other files to share.
#pragma once

#include <cstddef>
#include <cstdint>

#define GE_API extern "C" __attribute__((visibility("default")))

struct BF16 {
  std::uint16_t bits;
};

static inline float to_float(float value) { return value; }

static inline float to_float(BF16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// Round to nearest, ties to even; every NaN becomes the quiet one, as torch does.
static inline BF16 to_bf16(float value) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fc0};
  return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
