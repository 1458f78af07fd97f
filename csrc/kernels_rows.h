// Operations on single rows, and what all kernels share: how a model rounds, exp and SiLU.
#pragma once

namespace {

#if defined(GE_DOT)
using BF16Act = BF16;
#else
using BF16Act = float;  // holding bf16 values: multiplying bf16 takes a conversion to float, done once here
#endif

struct Float32Model {
  using Value = float;  // as the caller stores it
  using Weight = float;
  using Act = float;
  static constexpr bool kRounds = false;
};

struct BFloat16Model {
  using Value = BF16;
  using Weight = BF16;
  using Act = BF16Act;
  static constexpr bool kRounds = true;
};

template <bool kRounds>
inline Vec rounded(Vec a) {
  if constexpr (kRounds) return round_to_bf16(a);
  return a;
}

// Store an operation's result, rounded to bf16 if that is the model's dtype (a bf16 store rounds by itself).
template <bool kRounds>
inline void put(float* to, Vec a) {
  store(to, rounded<kRounds>(a));
}

template <bool kRounds>
inline void put(BF16* to, Vec a) {
  store(to, a);
}

// 2^x to about one unit in the last place; 0 below -200, infinity above 200, NaN for NaN. The polynomial is
// the Taylor series of 2^f on [-0.5, 0.5], cut where the rest is below 2^-27.
inline Vec exp2(Vec x) {
  x = min(set1(200.0f), max(set1(-200.0f), x));
  const Vec n = nearest(x), f = sub(x, n);
  Vec p = set1(1.5252734e-5f);
  p = fma(p, f, set1(1.5403530e-4f));
  p = fma(p, f, set1(1.3333558e-3f));
  p = fma(p, f, set1(9.6181291e-3f));
  p = fma(p, f, set1(5.5504109e-2f));
  p = fma(p, f, set1(2.4022651e-1f));
  p = fma(p, f, set1(6.9314718e-1f));
  p = fma(p, f, set1(1.0f));
  return times_pow2(p, n);
}

constexpr float kLog2E = 1.44269504f;

inline Vec silu(Vec x) { return div(x, add(set1(1.0f), exp2(mul(x, set1(-kLog2E))))); }

template <class Model>
void widen(const void* from, int n, void* to, std::size_t stride) {
  const auto* source = static_cast<const typename Model::Value*>(from);
  auto* target = static_cast<typename Model::Act*>(to);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) put<Model::kRounds>(target + i, load(source + i));
  for (; i < n; ++i) {
    if constexpr (sizeof(typename Model::Act) == sizeof(typename Model::Value)) {
      target[i] = source[i];
    } else {
      target[i] = to_float(source[i]);
    }
  }
  for (; i < static_cast<int>(stride); ++i) target[i] = {};
}

template <class Model>
void narrow(const void* from, int n, void* to) {
  const auto* source = static_cast<const typename Model::Act*>(from);
  auto* target = static_cast<typename Model::Value*>(to);
  for (int i = 0; i < n; ++i) {
    if constexpr (sizeof(typename Model::Act) == sizeof(typename Model::Value)) {
      target[i] = source[i];
    } else {
      target[i] = to_bf16(source[i]);
    }
  }
}

template <class Act>
inline float scale_of_norm(const Act* x, float eps, int n) {
  Vec squares = zero(), more = zero();
  for (int i = 0; i < n; i += 2 * kLanes) {
    const Vec a = load(x + i), b = load(x + i + kLanes);
    squares = fma(a, a, squares);
    more = fma(b, b, more);
  }
  return 1.0f / __builtin_sqrtf(sum(add(squares, more)) / static_cast<float>(n) + eps);
}

template <class Model>
void rms_norm(const void* x, const float* weight, float eps, int n, void* out) {
  const auto* row = static_cast<const typename Model::Act*>(x);
  auto* target = static_cast<typename Model::Act*>(out);
  const Vec scale = set1(scale_of_norm(row, eps, n));
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    put<Model::kRounds>(target + i, mul(mul(load(row + i), scale), load(weight + i)));
  if (i < n) {
    alignas(64) float tail[kLanes] = {};
    for (int j = i; j < n; ++j) tail[j - i] = weight[j];
    put<Model::kRounds>(target + i, mul(mul(load(row + i), scale), load(tail)));
  }
}

template <class Model>
void silu_mul(const void* gate, const void* up, int n, void* out) {
  const auto *a = static_cast<const typename Model::Act*>(gate),
             *b = static_cast<const typename Model::Act*>(up);
  auto* target = static_cast<typename Model::Act*>(out);
  for (int i = 0; i < n; i += kLanes) put<Model::kRounds>(target + i, mul(silu(load(a + i)), load(b + i)));
}

// Rounding to int8: value = scale * q, scale = max |value| / 127, q = value * (127 / max |value|) to the nearest, ties
// to even. A value that is not finite makes the scale NaN; a row below kLeastMagnitude becomes zeros.
constexpr float kLeastMagnitude = 1e-35f;  // 127 / that is still finite

struct Magnitude {
  float scale, inverse;
};

template <class Value>
inline Magnitude magnitude_of(const Value* values, int n) {
  Vec top = zero(), broken = zero();
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(values + i);
    top = max(top, max(v, sub(zero(), v)));
    broken = fma(v, zero(), broken);  // NaN for NaN and infinities
  }
  float largest_value = largest(top), is_broken = sum(broken);
  for (; i < n; ++i) {
    const float v = to_float(values[i]), size = v < 0 ? -v : v;
    largest_value = size > largest_value ? size : largest_value;
    is_broken += v * 0.0f;
  }
  return {largest_value / 127.0f + is_broken, largest_value > kLeastMagnitude ? 127.0f / largest_value : 0.0f};
}

// The rounding for `inverse`, a Magnitude's.
template <class Value>
inline void round_to_int8(const Value* values, int n, float inverse, std::int8_t* out) {
  const Vec factor = set1(inverse);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, to_int(mul(load(values + i), factor)));
  for (; i < n; ++i) {
    const float v = to_float(values[i]) * inverse;
    out[i] = v == v ? static_cast<std::int8_t>(__builtin_nearbyintf(v)) : 0;
  }
}

template <class Value>
inline float quantize(const Value* values, int n, std::int8_t* out) {
  const Magnitude magnitude = magnitude_of(values, n);
  round_to_int8(values, n, magnitude.inverse, out);
  return magnitude.scale;
}

}  // namespace
