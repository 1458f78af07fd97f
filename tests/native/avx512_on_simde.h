// Stands in for <immintrin.h>: AVX-512 intrinsics as plain and AVX2 code, for checking the AVX-512 kernels on a
// CPU that lacks the instructions. SIMDe has most of them; here is what it lacks or does otherwise than hardware.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>

// The lanes of registers as arrays. Callers' flags decide what becomes of the loops.
namespace emulated {

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T, int kCount>
struct Lanes {
  T lane[kCount];
};

struct Halves {
  __m256i lane[2];
};

// A denormal becomes a zero of its sign.
inline float flushed(float value) {
  const auto bits = as<std::uint32_t>(value);
  return (bits & 0x7f800000u) == 0 ? as<float>(bits & 0x80000000u) : value;
}

// VCVTNEPS2BF16: to nearest, ties to even; denormals become zeros; a NaN keeps its upper bits and becomes quiet.
inline std::uint16_t narrowed(float value) {
  const auto bits = as<std::uint32_t>(flushed(value));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline __m256 flushed(__m256i bits) {
  const __m256i exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x7f800000));
  const __m256i is_small = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
  return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_srli_epi32(is_small, 1), bits));
}

// VDPBF16PS: two fused multiply-adds a lane, the odd pair first, denormals zero on the way in and out. SIMDe adds
// the even pair first and keeps denormals.
inline __m512 dpbf16(__m512 sums, __m512bh x, __m512bh y) {
  auto out = as<Halves>(sums);
  const auto a = as<Halves>(x), b = as<Halves>(y);
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int i = 0; i < 2; ++i) {
    __m256 sum = flushed(out.lane[i]);
    sum = _mm256_fmadd_ps(flushed(_mm256_and_si256(a.lane[i], odd)),
                          flushed(_mm256_and_si256(b.lane[i], odd)), sum);
    sum = flushed(_mm256_castps_si256(sum));
    sum = _mm256_fmadd_ps(flushed(_mm256_slli_epi32(a.lane[i], 16)),
                          flushed(_mm256_slli_epi32(b.lane[i], 16)), sum);
    out.lane[i] = _mm256_castps_si256(flushed(_mm256_castps_si256(sum)));
  }
  return as<__m512>(out);
}

inline __m256bh cvtneps_pbh(__m512 x) {
  const auto from = as<Lanes<float, 16>>(x);
  Lanes<std::uint16_t, 16> to;
  for (int i = 0; i < 16; ++i) to.lane[i] = narrowed(from.lane[i]);
  return as<__m256bh>(to);
}

// The second operand's lanes come first.
inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  const auto first = as<Lanes<float, 16>>(low), second = as<Lanes<float, 16>>(high);
  Lanes<std::uint16_t, 32> to;
  for (int i = 0; i < 16; ++i) {
    to.lane[i] = narrowed(first.lane[i]);
    to.lane[16 + i] = narrowed(second.lane[i]);
  }
  return as<__m512bh>(to);
}

// VSCALEFPS for finite n: one rounding, denormals kept. SIMDe's takes 2^n as a float, which leaves its range
// before the product does, drops denormals, and calls exp2f for each lane.
inline __m512 scalef(__m512 x, __m512 n) {
  auto out = as<Lanes<float, 16>>(x);
  const auto power = as<Lanes<float, 16>>(_mm512_floor_ps(n));
  for (int i = 0; i < 16; ++i) {
    const float within = power.lane[i] < -400 ? -400 : power.lane[i] > 400 ? 400 : power.lane[i];
    const auto exponent = static_cast<std::uint64_t>(static_cast<std::int64_t>(within) + 1023) << 52;
    out.lane[i] = static_cast<float>(static_cast<double>(out.lane[i]) * as<double>(exponent));
  }
  return as<__m512>(out);
}

// Lane by lane, as a conversion of integers: widening, or keeping the lower bits.
template <class From, class To, int kCount, class Out, class In>
inline Out converted(const In& x) {
  const auto from = as<Lanes<From, kCount>>(x);
  Lanes<To, kCount> to;
  for (int i = 0; i < kCount; ++i) to.lane[i] = static_cast<To>(from.lane[i]);
  return as<Out>(to);
}

// Lanes that the mask leaves out are not touched in memory, as in hardware. SIMDe loads all of them first, and its
// masked stores overwrite what they should leave with zeros.
template <class T, int kCount>
inline __m512i masked_load(std::uint64_t mask, const void* from) {
  Lanes<T, kCount> out = {};
  for (int i = 0; i < kCount; ++i) {
    if (mask >> i & 1) __builtin_memcpy(&out.lane[i], static_cast<const T*>(from) + i, sizeof(T));
  }
  return as<__m512i>(out);
}

template <class T, int kCount>
inline void masked_store(void* to, std::uint64_t mask, __m512i x) {
  const auto lanes = as<Lanes<T, kCount>>(x);
  for (int i = 0; i < kCount; ++i) {
    if (mask >> i & 1) __builtin_memcpy(static_cast<T*>(to) + i, &lanes.lane[i], sizeof(T));
  }
}

}  // namespace emulated

#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps(sums, x, y) emulated::dpbf16(sums, x, y)
#undef _mm512_scalef_ps
#define _mm512_scalef_ps(x, n) emulated::scalef(x, n)

// Not in SIMDe 0.8.2.
#define _mm512_cvtneps_pbh(x) emulated::cvtneps_pbh(x)
#define _mm512_cvtne2ps_pbh(high, low) emulated::cvtne2ps_pbh(high, low)
#define _mm512_cvtepi8_epi32(x) emulated::converted<std::int8_t, std::int32_t, 16, __m512i>(x)
#define _mm512_cvtepu8_epi32(x) emulated::converted<std::uint8_t, std::int32_t, 16, __m512i>(x)
#define _mm512_cvtepu8_epi16(x) emulated::converted<std::uint8_t, std::int16_t, 32, __m512i>(x)
#define _mm512_cvtepi32_epi16(x) emulated::converted<std::uint32_t, std::uint16_t, 16, __m256i>(x)
#define _mm512_cvtepi32_epi8(x) emulated::converted<std::uint32_t, std::uint8_t, 16, __m128i>(x)
#define _mm512_maskz_loadu_epi8(mask, from) emulated::masked_load<std::uint8_t, 64>(mask, from)
#define _mm512_maskz_loadu_epi32(mask, from) emulated::masked_load<std::uint32_t, 16>(mask, from)
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16(mask, from) emulated::masked_load<std::uint16_t, 32>(mask, from)
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps(mask, from) _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(mask, from))
#define _mm512_mask_storeu_epi8(to, mask, x) emulated::masked_store<std::uint8_t, 64>(to, mask, x)
#undef _mm512_mask_storeu_epi16
#define _mm512_mask_storeu_epi16(to, mask, x) emulated::masked_store<std::uint16_t, 32>(to, mask, x)
#undef _mm512_mask_storeu_epi32
#define _mm512_mask_storeu_epi32(to, mask, x) emulated::masked_store<std::uint32_t, 16>(to, mask, x)
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps(to, mask, x) _mm512_mask_storeu_epi32(to, mask, _mm512_castps_si512(x))
