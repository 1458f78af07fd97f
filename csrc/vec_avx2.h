// Eight floats in a register (AVX2 and FMA). The same functions as in vec_avx512.h and vec_portable.h.
#pragma once

namespace {

constexpr int kLanes = 8;
// A linear's register tile: rows (of weights that come in pairs, and of others) by columns in registers, and the
// columns of a tile of one or two rows.
constexpr int kTileRows = 6, kPairTileRows = 5, kTileVecs = 2, kWideTileVecs = 4;
// The same of attention.
constexpr int kHeadTileRows = 4, kHeadTileVecs = 2, kWideHeadTileVecs = 4;

using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float value) { return _mm256_set1_ps(value); }
inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vec a) { _mm256_storeu_ps(to, a); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }  // a * b + c
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }              // b where either is NaN
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }              // b where either is NaN
inline Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Vec pow2(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// n whole, within +-250: in two factors, because 2^n itself may be out of range.
inline Vec times_pow2(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return _mm256_mul_ps(_mm256_mul_ps(a, pow2(half)), pow2(_mm256_sub_epi32(whole, half)));
}

inline Vec load(const BF16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// The bits of each lane rounded to bf16, in the upper halves.
inline __m256i bf16_bits(Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
}

inline void store(BF16* to, Vec a) {
  const __m256i words = _mm256_srli_epi32(bf16_bits(a), 16);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}

inline Vec round_to_bf16(Vec a) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(bf16_bits(a), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// kLanes pairs of bf16: their first and their second values.
inline void load_pairs(const BF16* from, Vec& first, Vec& second) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  first = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  second = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline Vec load(const std::int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

// Eight 32-bit integers.
using IVec = __m256i;

inline IVec int_zero() { return _mm256_setzero_si256(); }
inline IVec load_int(const std::int32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline IVec sub(IVec a, IVec b) { return _mm256_sub_epi32(a, b); }
inline Vec int_to_float(IVec a) { return _mm256_cvtepi32_ps(a); }
inline IVec to_int(Vec a) { return _mm256_cvtps_epi32(a); }  // nearest, ties to even
inline void store(std::int16_t* to, IVec a) {
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
}
inline void store(std::int8_t* to, IVec a) {
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(halves, halves));
}
using PairVec = IVec;  // of int16

// kLanes pairs of int8, as int16.
inline PairVec load_int_pairs(const std::int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline PairVec set1_pair(const std::int16_t* from) {
  int pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return _mm256_set1_epi32(pair);
}
// sum + a[0] * b[0] + a[1] * b[1] in every lane
inline IVec add_pairs(IVec sum, PairVec a, PairVec b) {
  const IVec products = _mm256_madd_epi16(a, b);
  // In place: g++ otherwise gives every sum of a tile two registers, runs out of them, and loses half the speed.
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
  return sum;
}

// All bits of the lanes before `count`.
inline Vec first_lanes(int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}

// Lanes from `count` on become zero.
inline Vec first_or_zero(Vec a, int count) { return _mm256_and_ps(a, first_lanes(count)); }

// Lanes from `count` on become -infinity.
inline Vec keep_first(Vec a, int count) {
  return _mm256_blendv_ps(_mm256_set1_ps(-__builtin_inff()), a, first_lanes(count));
}

inline float sum(Vec a) {
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}

inline float largest(Vec a) {
  const __m128 c = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps(d, d, 1)));
}

inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }
// Into the first level, from where it moves on: hints for the second one are slower on the Zen 3 that was measured.
inline void prefetch_second_level(const void* address) { prefetch(address); }

}  // namespace
