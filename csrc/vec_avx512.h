// Sixteen floats in a register (AVX-512F). The same functions as in vec_avx2.h and vec_portable.h.
#pragma once

namespace {

constexpr int kLanes = 16;
// A linear's register tile: rows (of weights that come in pairs, and of others) by columns in registers, and the
// columns of a tile of one or two rows.
constexpr int kTileRows = 12, kPairTileRows = 12, kTileVecs = 2, kWideTileVecs = 2;
// The same of attention.
constexpr int kHeadTileRows = 8, kHeadTileVecs = 2, kWideHeadTileVecs = 4;

using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vec a) { _mm512_storeu_ps(to, a); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }              // b where either is NaN
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }              // b where either is NaN
inline Vec nearest(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_pow2(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }  // n whole, within +-250

inline Vec load(const BF16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// The bits of each lane rounded to bf16, in the upper halves.
inline __m512i bf16_bits(Vec a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
}

inline void store(BF16* to, Vec a) {
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(a), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}

inline Vec round_to_bf16(Vec a) {
  return _mm512_castsi512_ps(
      _mm512_and_si512(bf16_bits(a), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// kLanes pairs of bf16: their first and their second values.
inline void load_pairs(const BF16* from, Vec& first, Vec& second) {
  const __m512i bits = _mm512_loadu_si512(from);
  first = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  second = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

inline Vec load(const std::int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

// Sixteen 32-bit integers.
using IVec = __m512i;

inline IVec int_zero() { return _mm512_setzero_si512(); }
inline IVec load_int(const std::int32_t* from) { return _mm512_loadu_si512(from); }
inline IVec sub(IVec a, IVec b) { return _mm512_sub_epi32(a, b); }
inline Vec int_to_float(IVec a) { return _mm512_cvtepi32_ps(a); }
inline IVec to_int(Vec a) { return _mm512_cvtps_epi32(a); }  // nearest, ties to even
inline void store(std::int8_t* to, IVec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(a));
}
inline void store(std::int16_t* to, IVec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(a));
}
using PairVec = IVec;  // of int16

// kLanes pairs of int8, as int16.
inline PairVec load_int_pairs(const std::int8_t* from) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline PairVec set1_pair(const std::int16_t* from) {
  int pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return _mm512_set1_epi32(pair);
}
// sum + a[0] * b[0] + a[1] * b[1] in every lane
inline IVec add_pairs(IVec sum, PairVec a, PairVec b) {
  const IVec products = _mm512_madd_epi16(a, b);
#if defined(GE_EMULATE_AVX512)
  return _mm512_add_epi32(sum, products);
#else
  // In place: g++ 12 otherwise gives every sum of a tile two registers, and runs out of them.
  asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(products));
  return sum;
#endif
}

// Lanes from `count` on become zero.
inline Vec first_or_zero(Vec a, int count) {
  const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  return _mm512_maskz_mov_ps(mask, a);
}

// Lanes from `count` on become -infinity.
inline Vec keep_first(Vec a, int count) {
  const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), mask, a);
}

inline float sum(Vec a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}

inline float largest(Vec a) {
  const __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
  const __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps(d, d, 1)));
}

inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }
inline void prefetch_second_level(const void* address) {
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1);
}

}  // namespace
