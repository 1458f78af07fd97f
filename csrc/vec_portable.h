// Eight floats in an array, for any CPU. The same functions as in vec_avx512.h and vec_avx2.h; a
// multiplication and an addition round separately here.
#pragma once

namespace {

constexpr int kLanes = 8;
// A linear's register tile: rows by columns in registers. Compilers keep 2 x 8 floats in registers.
constexpr int kTileRows = 2, kPairTileRows = 2, kTileVecs = 1, kWideTileVecs = 1;
// The same of attention.
constexpr int kHeadTileRows = 2, kHeadTileVecs = 1, kWideHeadTileVecs = 1;

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

inline Vec load(const std::int8_t* from) {
  return by_lane([&](int i) { return static_cast<float>(from[i]); });
}

// Eight 32-bit integers.
struct IVec {
  std::int32_t lane[kLanes];
};

template <class Function>
inline IVec by_int_lane(const Function& function) {
  IVec out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = function(i);
  return out;
}

inline IVec int_zero() {
  return by_int_lane([](int) { return 0; });
}
inline IVec load_int(const std::int32_t* from) {
  return by_int_lane([&](int i) { return from[i]; });
}
inline IVec sub(IVec a, IVec b) {
  return by_int_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec int_to_float(IVec a) {
  return by_lane([&](int i) { return static_cast<float>(a.lane[i]); });
}
inline IVec to_int(Vec a) {  // nearest, ties to even; what is out of range becomes the smallest
  return by_int_lane([&](int i) {
    const float x = __builtin_nearbyintf(a.lane[i]);
    return x > -2147483648.0f && x < 2147483648.0f ? static_cast<std::int32_t>(x) : INT32_MIN;
  });
}
inline void store(std::int8_t* to, IVec a) {
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<std::int8_t>(a.lane[i]);
}
inline void store(std::int16_t* to, IVec a) {
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<std::int16_t>(a.lane[i]);
}

// Pairs of int16.
struct PairVec {
  std::int16_t lane[2 * kLanes];
};

// kLanes pairs of int8, as int16.
inline PairVec load_int_pairs(const std::int8_t* from) {
  PairVec out;
  for (int i = 0; i < 2 * kLanes; ++i) out.lane[i] = from[i];
  return out;
}
inline PairVec set1_pair(const std::int16_t* from) {
  PairVec out;
  for (int i = 0; i < 2 * kLanes; ++i) out.lane[i] = from[i % 2];
  return out;
}
// sum + a[0] * b[0] + a[1] * b[1] in every lane
inline IVec add_pairs(IVec sum, PairVec a, PairVec b) {
  return by_int_lane([&](int i) {
    return sum.lane[i] + a.lane[2 * i] * b.lane[2 * i] + a.lane[2 * i + 1] * b.lane[2 * i + 1];
  });
}

// Lanes from `count` on become zero.
inline Vec first_or_zero(Vec a, int count) {
  return by_lane([&](int i) { return i < count ? a.lane[i] : 0.0f; });
}

// Lanes from `count` on become -infinity.
inline Vec keep_first(Vec a, int count) {
  return by_lane([&](int i) { return i < count ? a.lane[i] : -__builtin_inff(); });
}

inline float sum(Vec a) {
  const float* v = a.lane;
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

inline float largest(Vec a) {
  float out = a.lane[0];
  for (int i = 1; i < kLanes; ++i) out = a.lane[i] > out ? a.lane[i] : out;
  return out;
}

inline void prefetch(const void* address) { __builtin_prefetch(address); }
inline void prefetch_second_level(const void* address) { __builtin_prefetch(address, 0, 2); }

}  // namespace
