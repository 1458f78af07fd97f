// Eight floats in an array, for any CPU. The same functions as in vec_avx512.h and vec_avx2.h; a
// multiplication and an addition round separately here.
#pragma once

namespace {

constexpr int kLanes = 8;
#define GE_TILE_ROWS 2
constexpr int kTileRows =
    GE_TILE_ROWS;             // of a linear's register tile: compilers keep 2 x 8 floats in registers
constexpr int kTileVecs = 1;  // columns of that tile, in registers

struct Vec {
  float lane[kLanes];
};

template <class Function>
inline Vec by_lane(const Function& function) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = function(i);
  return out;
}

inline Vec set1(float value) {
  return by_lane([&](int) { return value; });
}
inline Vec zero() { return set1(0.0f); }
inline Vec load(const float* from) {
  return by_lane([&](int i) { return from[i]; });
}
inline Vec load(const BF16* from) {
  return by_lane([&](int i) { return to_float(from[i]); });
}
inline void store(float* to, Vec a) {
  for (int i = 0; i < kLanes; ++i) to[i] = a.lane[i];
}
inline void store(BF16* to, Vec a) {
  for (int i = 0; i < kLanes; ++i) to[i] = to_bf16(a.lane[i]);
}
inline Vec add(Vec a, Vec b) {
  return by_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec sub(Vec a, Vec b) {
  return by_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return by_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec div(Vec a, Vec b) {
  return by_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return by_lane([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline Vec max(Vec a, Vec b) {  // b where either is NaN
  return by_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec min(Vec a, Vec b) {  // b where either is NaN
  return by_lane([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec nearest(Vec a) {
  return by_lane([&](int i) { return __builtin_nearbyintf(a.lane[i]); });
}
inline Vec round_to_bf16(Vec a) {
  return by_lane([&](int i) { return to_float(to_bf16(a.lane[i])); });
}

inline float pow2(int n) {
  const std::uint32_t bits = static_cast<std::uint32_t>(n + 127) << 23;
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// n whole, within +-250: in two factors, because 2^n itself may be out of range.
inline Vec times_pow2(Vec a, Vec n) {
  return by_lane([&](int i) {
    if (n.lane[i] != n.lane[i]) return n.lane[i];  // no integer stands for NaN
    const int whole = static_cast<int>(n.lane[i]), half = whole / 2;
    return a.lane[i] * pow2(half) * pow2(whole - half);
  });
}

// kLanes pairs of bf16: their first and their second values.
inline void load_pairs(const BF16* from, Vec& first, Vec& second) {
  first = by_lane([&](int i) { return to_float(from[2 * i]); });
  second = by_lane([&](int i) { return to_float(from[2 * i + 1]); });
}

// Lanes from `count` on become -infinity.
inline Vec keep_first(Vec a, int count) {
  return by_lane([&](int i) { return i < count ? a.lane[i] : -__builtin_inff(); });
}

inline float sum(Vec a) {
  const float* v = a.lane;
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// Lane i of the result is the sum of the lanes of a[i], always in the same order.
inline Vec sum_each(const Vec (&a)[kLanes]) {
  return by_lane([&](int i) { return sum(a[i]); });
}

inline float largest(Vec a) {
  float out = a.lane[0];
  for (int i = 1; i < kLanes; ++i) out = a.lane[i] > out ? a.lane[i] : out;
  return out;
}

inline void prefetch(const void* address) { __builtin_prefetch(address); }
inline void prefetch_second_level(const void* address) { __builtin_prefetch(address, 0, 2); }

}  // namespace
