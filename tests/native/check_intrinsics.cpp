// AVX-512 intrinsics against what Intel's manual says of each lane, written out in plain code. Built with
// avx512_on_simde.h it checks the emulation, built for a CPU that has the instructions it checks this file.
#if defined(GE_EMULATE_AVX512)
#include "avx512_on_simde.h"
#else
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <limits>

namespace {

int failures = 0;

// A register, or half or a quarter of one, by lanes of any type.
struct Bits {
  alignas(64) unsigned char bytes[64] = {};

  template <class T>
  T get(int i) const {
    T value;
    std::memcpy(&value, bytes + i * sizeof(T), sizeof(T));
    return value;
  }

  template <class T>
  void set(int i, T value) {
    std::memcpy(bytes + i * sizeof(T), &value, sizeof(T));
  }

  template <class Register>
  Register as() const {
    Register r;
    std::memcpy(&r, bytes, sizeof r);
    return r;
  }
};

template <class Register>
Bits bits_of(const Register& r) {
  Bits out;
  std::memcpy(out.bytes, &r, sizeof r);
  return out;
}

std::uint64_t state = 1;

std::uint32_t random_word() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<std::uint32_t>(state >> 32);
}

Bits random_bits() {
  Bits out;
  for (int i = 0; i < 16; ++i) out.set(i, random_word());
  return out;
}

// Bit patterns of every kind: ordinary numbers most of all, ties of roundings, denormals, infinities, NaN.
Bits random_floats(bool has_nan = true) {
  static const float special[] = {0.0f, -0.0f, 1e-40f, -1e-40f, 0.5f, -1.5f, 2.5f, 3e9f, -3e9f, 3.3e38f,
                                  INFINITY, -INFINITY, std::numeric_limits<float>::min()};
  Bits out;
  for (int i = 0; i < 16; ++i) {
    const std::uint32_t kind = random_word() % 8, word = random_word();
    float value;
    if (kind == 0) {
      value = special[word % 13];
    } else if (kind == 1) {
      const std::uint32_t tie = (word & 0xffff0000u) | 0x8000u;
      std::memcpy(&value, &tie, 4);
    } else if (kind == 2) {
      std::memcpy(&value, &word, 4);
    } else {
      value = (static_cast<float>(word) / 4294967296.0f - 0.5f) * std::ldexp(1.0f, static_cast<int>(kind) * 3 - 9);
    }
    if (std::isnan(value) && !has_nan) value = 1.0f;
    out.set(i, value);
  }
  return out;
}

template <class T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// Which of several NaN comes out is not what kernels rely on.
template <>
bool same(float a, float b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

template <class T, class Register, class Lane>
void expect(const char* name, const Register& actual, int count, const Lane& lane) {
  const Bits found = bits_of(actual);
  for (int i = 0; i < count; ++i) {
    const T a = found.get<T>(i), e = static_cast<T>(lane(i));
    if (same(a, e)) continue;
    std::printf("%s: lane %d is %.9g instead of %.9g\n", name, i, static_cast<double>(a), static_cast<double>(e));
    ++failures;
    return;
  }
}

float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

float from_bf16(std::uint16_t bits) {
  const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

std::uint16_t to_bf16(float x) {
  x = flushed(x);
  std::uint32_t word;
  std::memcpy(&word, &x, 4);
  if (std::isnan(x)) return static_cast<std::uint16_t>(word >> 16 | 0x40);
  const std::uint32_t low = word & 0xffff, up = word >> 16;
  return static_cast<std::uint16_t>(up + (low > 0x8000 || (low == 0x8000 && (up & 1) != 0)));
}

void check_floats(const Bits& a, const Bits& b, const Bits& c) {
  const __m512 x = a.as<__m512>(), y = b.as<__m512>(), z = c.as<__m512>();
  const auto fa = [&](int i) { return a.get<float>(i); };
  const auto fb = [&](int i) { return b.get<float>(i); };
  const auto fc = [&](int i) { return c.get<float>(i); };
  expect<float>("add_ps", _mm512_add_ps(x, y), 16, [&](int i) { return fa(i) + fb(i); });
  expect<float>("sub_ps", _mm512_sub_ps(x, y), 16, [&](int i) { return fa(i) - fb(i); });
  expect<float>("mul_ps", _mm512_mul_ps(x, y), 16, [&](int i) { return fa(i) * fb(i); });
  expect<float>("div_ps", _mm512_div_ps(x, y), 16, [&](int i) { return fa(i) / fb(i); });
  expect<float>("fmadd_ps", _mm512_fmadd_ps(x, y, z), 16, [&](int i) { return std::fma(fa(i), fb(i), fc(i)); });
  expect<float>("max_ps", _mm512_max_ps(x, y), 16, [&](int i) { return fa(i) > fb(i) ? fa(i) : fb(i); });
  expect<float>("min_ps", _mm512_min_ps(x, y), 16, [&](int i) { return fa(i) < fb(i) ? fa(i) : fb(i); });
  expect<float>("roundscale_ps", _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), 16,
                [&](int i) { return std::nearbyint(fa(i)); });
  Bits powers;
  for (int i = 0; i < 16; ++i) powers.set(i, static_cast<float>(static_cast<int>(random_word() % 501) - 250));
  expect<float>("scalef_ps", _mm512_scalef_ps(x, powers.as<__m512>()), 16,
                [&](int i) { return std::scalbn(fa(i), static_cast<int>(powers.get<float>(i))); });
  const __mmask16 nan = _mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q), less = _mm512_cmp_ps_mask(x, y, _CMP_LT_OQ);
  const auto ones = _mm512_set1_epi32(1), zeros = _mm512_setzero_si512();
  expect<int>("cmp_ps_mask unordered", _mm512_mask_mov_epi32(zeros, nan, ones), 16,
              [&](int i) { return std::isnan(fa(i)) || std::isnan(fb(i)); });
  expect<int>("cmp_ps_mask less", _mm512_mask_mov_epi32(zeros, less, ones), 16,
              [&](int i) { return fa(i) < fb(i); });
  const auto mask = static_cast<__mmask16>(random_word());
  expect<float>("mask_mov_ps", _mm512_mask_mov_ps(x, mask, y), 16,
                [&](int i) { return mask >> i & 1 ? fb(i) : fa(i); });
  const auto to_int = [](float v) {
    return std::fabs(v) < 2147483648.0f ? static_cast<std::int32_t>(std::nearbyint(v)) : INT32_MIN;
  };
  expect<std::int32_t>("cvtps_epi32", _mm512_cvtps_epi32(x), 16, [&](int i) { return to_int(fa(i)); });
  expect<float>("cvtepi32_ps", _mm512_cvtepi32_ps(a.as<__m512i>()), 16,
                [&](int i) { return static_cast<float>(a.get<std::int32_t>(i)); });
  expect<std::uint16_t>("cvtneps_pbh", _mm512_cvtneps_pbh(x), 16, [&](int i) { return to_bf16(fa(i)); });
  expect<std::uint16_t>("cvtne2ps_pbh", _mm512_cvtne2ps_pbh(x, y), 32,
                        [&](int i) { return i < 16 ? to_bf16(fb(i)) : to_bf16(fa(i - 16)); });
  expect<float>("unpacklo_ps", _mm512_unpacklo_ps(x, y), 16,
                [&](int i) { return (i & 1 ? b : a).get<float>(i / 4 * 4 + i % 4 / 2); });
  expect<float>("unpackhi_ps", _mm512_unpackhi_ps(x, y), 16,
                [&](int i) { return (i & 1 ? b : a).get<float>(i / 4 * 4 + 2 + i % 4 / 2); });
  expect<float>("shuffle_f32x4", _mm512_shuffle_f32x4(x, y, 0x88), 16,
                [&](int i) { return (i < 8 ? a : b).get<float>(i / 4 % 2 * 8 + i % 4); });
}

// Pairs of bf16: their products and sums leave no rounding to guess, or one each.
void check_dpbf16(const Bits& a, const Bits& b, const Bits& sums) {
  expect<float>("dpbf16_ps",
                _mm512_dpbf16_ps(sums.as<__m512>(), a.as<__m512bh>(), b.as<__m512bh>()), 16, [&](int i) {
                  float sum = flushed(sums.get<float>(i));
                  for (int k : {2 * i + 1, 2 * i}) {
                    const float x = flushed(from_bf16(a.get<std::uint16_t>(k)));
                    const float y = flushed(from_bf16(b.get<std::uint16_t>(k)));
                    sum = flushed(std::fma(x, y, sum));
                  }
                  return sum;
                });
}

template <class T>
T unpacked(const Bits& a, const Bits& b, int i, bool is_high) {
  constexpr int kBlock = 16 / sizeof(T);
  const int from = i / kBlock * kBlock + i % kBlock / 2 + (is_high ? kBlock / 2 : 0);
  return (i & 1 ? b : a).get<T>(from);
}

template <class T>
T picked(const Bits& a, const Bits& index, const Bits& b, int i) {
  constexpr int kCount = 64 / sizeof(T);
  const int from = static_cast<int>(index.get<T>(i) % (2 * kCount));
  return from < kCount ? a.get<T>(from) : b.get<T>(from - kCount);
}

void check_integers(const Bits& a, const Bits& b, const Bits& c) {
  using S8 = std::int8_t;
  using S16 = std::int16_t;
  using S32 = std::int32_t;
  using U8 = std::uint8_t;
  using U16 = std::uint16_t;
  using U32 = std::uint32_t;
  const __m512i x = a.as<__m512i>(), y = b.as<__m512i>(), z = c.as<__m512i>();
  const __m256i half = a.as<__m256i>();
  const __m128i quarter = a.as<__m128i>();
  expect<U32>("dpbusd_epi32", _mm512_dpbusd_epi32(x, y, z), 16, [&](int i) {
    U32 sum = a.get<U32>(i);
    for (int k = 4 * i; k < 4 * i + 4; ++k) sum += static_cast<U32>(b.get<U8>(k) * c.get<S8>(k));
    return sum;
  });
  expect<U32>("madd_epi16", _mm512_madd_epi16(x, y), 16, [&](int i) {
    const auto product = [&](int k) { return static_cast<U32>(a.get<S16>(k) * b.get<S16>(k)); };
    return product(2 * i) + product(2 * i + 1);
  });
  expect<U32>("add_epi32", _mm512_add_epi32(x, y), 16, [&](int i) { return a.get<U32>(i) + b.get<U32>(i); });
  expect<U32>("mullo_epi32", _mm512_mullo_epi32(x, y), 16, [&](int i) { return a.get<U32>(i) * b.get<U32>(i); });
  expect<U32>("slli_epi32", _mm512_slli_epi32(x, 16), 16, [&](int i) { return a.get<U32>(i) << 16; });
  expect<U32>("srli_epi32", _mm512_srli_epi32(x, 16), 16, [&](int i) { return a.get<U32>(i) >> 16; });
  expect<U8>("unpacklo_epi8", _mm512_unpacklo_epi8(x, y), 64, [&](int i) { return unpacked<U8>(a, b, i, false); });
  expect<U8>("unpackhi_epi8", _mm512_unpackhi_epi8(x, y), 64, [&](int i) { return unpacked<U8>(a, b, i, true); });
  expect<U16>("unpacklo_epi16", _mm512_unpacklo_epi16(x, y), 32,
              [&](int i) { return unpacked<U16>(a, b, i, false); });
  expect<U16>("unpackhi_epi16", _mm512_unpackhi_epi16(x, y), 32,
              [&](int i) { return unpacked<U16>(a, b, i, true); });
  expect<U32>("unpacklo_epi32", _mm512_unpacklo_epi32(x, y), 16,
              [&](int i) { return unpacked<U32>(a, b, i, false); });
  expect<U32>("unpackhi_epi32", _mm512_unpackhi_epi32(x, y), 16,
              [&](int i) { return unpacked<U32>(a, b, i, true); });
  expect<U8>("permutex2var_epi8", _mm512_permutex2var_epi8(x, y, z), 64,
             [&](int i) { return picked<U8>(a, b, c, i); });
  expect<U16>("permutex2var_epi16", _mm512_permutex2var_epi16(x, y, z), 32,
              [&](int i) { return picked<U16>(a, b, c, i); });
  expect<U32>("permutex2var_epi32", _mm512_permutex2var_epi32(x, y, z), 16,
              [&](int i) { return picked<U32>(a, b, c, i); });
  expect<U32>("permutexvar_epi32", _mm512_permutexvar_epi32(x, y), 16,
              [&](int i) { return b.get<U32>(a.get<U32>(i) % 16); });
  expect<U16>("permutexvar_epi16", _mm512_permutexvar_epi16(x, y), 32,
              [&](int i) { return b.get<U16>(a.get<U16>(i) % 32); });
  expect<U8>("permutexvar_epi8", _mm512_permutexvar_epi8(x, y), 64,
             [&](int i) { return b.get<U8>(a.get<U8>(i) % 64); });
  expect<U32>("ternarylogic_epi32 xor", _mm512_ternarylogic_epi32(x, y, z, 0x96), 16,
              [&](int i) { return a.get<U32>(i) ^ b.get<U32>(i) ^ c.get<U32>(i); });
  expect<U32>("ternarylogic_epi32 choose", _mm512_ternarylogic_epi32(x, y, z, 0xca), 16, [&](int i) {
    return (a.get<U32>(i) & b.get<U32>(i)) | (~a.get<U32>(i) & c.get<U32>(i));
  });
  expect<U32>("ternarylogic_epi32 and-or", _mm512_ternarylogic_epi32(x, y, z, 0xf8), 16,
              [&](int i) { return a.get<U32>(i) | (b.get<U32>(i) & c.get<U32>(i)); });
  expect<S16>("cvtepi8_epi16", _mm512_cvtepi8_epi16(half), 32, [&](int i) { return a.get<S8>(i); });
  expect<U16>("cvtepu8_epi16", _mm512_cvtepu8_epi16(half), 32, [&](int i) { return a.get<U8>(i); });
  expect<S32>("cvtepi8_epi32", _mm512_cvtepi8_epi32(quarter), 16, [&](int i) { return a.get<S8>(i); });
  expect<U32>("cvtepu8_epi32", _mm512_cvtepu8_epi32(quarter), 16, [&](int i) { return a.get<U8>(i); });
  expect<U32>("cvtepu16_epi32", _mm512_cvtepu16_epi32(half), 16, [&](int i) { return a.get<U16>(i); });
  expect<S32>("cvtepi16_epi32", _mm512_cvtepi16_epi32(half), 16, [&](int i) { return a.get<S16>(i); });
  expect<U16>("cvtepi32_epi16", _mm512_cvtepi32_epi16(x), 16, [&](int i) { return a.get<U32>(i) & 0xffff; });
  expect<U8>("cvtepi32_epi8", _mm512_cvtepi32_epi8(x), 16, [&](int i) { return a.get<U32>(i) & 0xff; });
  expect<S8>("cvtsepi32_epi8", _mm512_cvtsepi32_epi8(x), 16, [&](int i) {
    const S32 v = a.get<S32>(i);
    return v < -128 ? -128 : v > 127 ? 127 : v;
  });

  const std::uint64_t mask = random_word() | static_cast<std::uint64_t>(random_word()) << 32;
  expect<U8>("maskz_loadu_epi8", _mm512_maskz_loadu_epi8(mask, b.bytes), 64,
             [&](int i) { return mask >> i & 1 ? b.get<U8>(i) : 0; });
  expect<U16>("maskz_loadu_epi16", _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), b.bytes), 32,
              [&](int i) { return mask >> i & 1 ? b.get<U16>(i) : 0; });
  expect<U32>("maskz_loadu_epi32", _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), b.bytes), 16,
              [&](int i) { return mask >> i & 1 ? b.get<U32>(i) : 0; });
  expect<float>("maskz_loadu_ps", _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), b.bytes), 16,
                [&](int i) { return mask >> i & 1 ? b.get<float>(i) : 0; });
  Bits kept = a;
  _mm512_mask_storeu_epi8(kept.bytes, mask, y);
  expect<U8>("mask_storeu_epi8", kept, 64, [&](int i) { return (mask >> i & 1 ? b : a).get<U8>(i); });
  kept = a;
  _mm512_mask_storeu_ps(kept.bytes, static_cast<__mmask16>(mask), b.as<__m512>());
  expect<U32>("mask_storeu_ps", kept, 16, [&](int i) { return (mask >> i & 1 ? b : a).get<U32>(i); });
}

}  // namespace

int main() {
  for (int round = 0; round < 2000 && failures == 0; ++round) {
    check_floats(random_floats(), random_floats(), random_floats());
    check_dpbf16(random_floats(), random_floats(), random_floats());
    check_dpbf16(random_bits(), random_bits(), random_floats());
    check_integers(random_bits(), random_bits(), random_bits());
  }
  std::printf("%s\n", failures == 0 ? "every intrinsic does what the manual says" : "FAILED");
  return failures == 0 ? 0 : 1;
}
