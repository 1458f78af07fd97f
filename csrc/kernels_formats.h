// How matrices are laid out in memory, and one step of multiplying with them. A matrix here is anything that
// rows are multiplied with: a panel of weights (its columns are outputs), a group of cached keys (columns are
// tokens) or of cached values (columns are head dimensions).
//
// A format takes kStep values of a row at a time. `Column` is what it loads for kColumnVecs registers of
// columns, `Row` what it loads of the row; `add` adds their products to the sums `Acc`. `place` says where value
// k of a column lies in a matrix of `width` columns. Sums are in ascending order of k (those of integers are
// exact, so their order does not matter).
#pragma once

namespace {

// Products and sums in fp32.
struct Float32Format {
  using Value = float;
  using X = float;
  using Acc = Vec;
  using Column = Vec;
  using Row = Vec;
  static constexpr int kStep = 1, kColumnVecs = 1;
  static constexpr std::size_t kColumnBytes = 4 * kLanes;
  static std::size_t place(int k, int column, int width) { return static_cast<std::size_t>(k) * width + column; }
  static Column column(const char* from) { return load(reinterpret_cast<const float*>(from)); }
  static Row row(const X* x) { return set1(*x); }
  static void add(Acc* acc, const Column& w, const Row& x) { acc[0] = fma(x, w, acc[0]); }
};

// Two neighbouring k of a column lie together.
inline std::size_t place_of_pairs(int k, int column, int width) {
  return static_cast<std::size_t>(k / 2) * 2 * width + 2 * column + k % 2;
}

// bf16 widened in registers; products and sums in fp32.
struct BF16Format {
  using Value = BF16;
  using X = float;
  using Acc = Vec;
  struct Column {
    Vec first, second;
  };
  using Row = Column;
  static constexpr int kStep = 2, kColumnVecs = 1;
  static constexpr std::size_t kColumnBytes = 4 * kLanes;
  static std::size_t place(int k, int column, int width) { return place_of_pairs(k, column, width); }
  static Column column(const char* from) {
    Column out;
    load_pairs(reinterpret_cast<const BF16*>(from), out.first, out.second);
    return out;
  }
  static Row row(const X* x) { return {set1(x[0]), set1(x[1])}; }
  static void add(Acc* acc, const Column& w, const Row& x) {
    acc[0] = fma(x.second, w.second, fma(x.first, w.first, acc[0]));
  }
};

// int8 widened in registers; products and sums in fp32, to be scaled by the caller.
struct Int8Format {
  using Value = std::int8_t;
  using X = float;
  using Acc = Vec;
  using Column = Vec;
  using Row = Vec;
  static constexpr int kStep = 1, kColumnVecs = 1;
  static constexpr std::size_t kColumnBytes = kLanes;
  static std::size_t place(int k, int column, int width) { return static_cast<std::size_t>(k) * width + column; }
  static std::int8_t encode(std::int8_t value) { return value; }
  static Column column(const char* from) { return load(reinterpret_cast<const std::int8_t*>(from)); }
  static Row row(const X* x) { return set1(*x); }
  static void add(Acc* acc, const Column& w, const Row& x) { acc[0] = fma(x, w, acc[0]); }
};

// int8 times int8, both widened to int16.
struct Int8PairFormat {
  using Value = std::int8_t;
  using X = std::int16_t;
  using Acc = IVec;
  using Column = PairVec;
  using Row = PairVec;
  static constexpr int kStep = 2, kColumnVecs = 1;
  static constexpr std::size_t kColumnBytes = 2 * kLanes;
  static constexpr int kZero = 0;  // what stands for an activation of 0
  static std::size_t place(int k, int column, int width) { return place_of_pairs(k, column, width); }
  static Column column(const char* from) { return load_int_pairs(reinterpret_cast<const std::int8_t*>(from)); }
  static Row row(const X* x) { return set1_pair(x); }
  static void add(Acc* acc, const Column& w, const Row& x) { acc[0] = add_pairs(acc[0], w, x); }
};

#if defined(GE_DOT)
// Four neighbouring bytes of a row, or two bf16, in all lanes.
inline __m512i set1_word(const void* from) {
  int word;
  __builtin_memcpy(&word, from, sizeof word);
  return _mm512_set1_epi32(word);
}

// acc + w[0] * x[0] + w[1] * x[1] of bf16 pairs in every lane.
// C-style casts: __m512bh is a vector of short in older compilers and of __bf16 in newer ones.
inline Vec dot_bf16(Vec acc, __m512i w, __m512i x) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }

// bf16 times bf16, pairs of products added to fp32 in one instruction.
struct BF16DotFormat {
  using Value = BF16;
  using X = BF16;
  using Acc = Vec;
  using Column = __m512i;
  using Row = __m512i;
  static constexpr int kStep = 2, kColumnVecs = 1;
  static constexpr std::size_t kColumnBytes = 64;
  static std::size_t place(int k, int column, int width) { return place_of_pairs(k, column, width); }
  static Column column(const char* from) { return _mm512_loadu_si512(from); }
  static Row row(const X* x) { return set1_word(x); }
  static void add(Acc* acc, const Column& w, const Row& x) { acc[0] = dot_bf16(acc[0], w, x); }
};

// 64 int8 as bf16, exactly: a table by magnitude for either byte of the result. They are stored as sign and
// magnitude. Unpacking interleaves the bytes within quarters of a register: bytes 0 to 7 of each quarter give the
// quarters of `low`, bytes 8 to 15 those of `high`.
struct BF16Tables {
  alignas(64) std::uint8_t low[128], high[128];
};

constexpr BF16Tables bf16_tables() {
  BF16Tables out{};
  for (int magnitude = 1; magnitude < 128; ++magnitude) {
    int exponent = 0;
    while (magnitude >> (exponent + 1) != 0) ++exponent;
    const int mantissa = (magnitude << (7 - exponent)) & 0x7f, biased = exponent + 127;
    out.low[magnitude] = static_cast<std::uint8_t>((biased & 1) << 7 | mantissa);
    out.high[magnitude] = static_cast<std::uint8_t>(biased >> 1);
  }
  return out;
}

constexpr BF16Tables kBF16Tables = bf16_tables();

struct TwoVecs {
  __m512i low, high;
};

inline TwoVecs int8_to_bf16(const char* from) {
  const __m512i bytes = _mm512_loadu_si512(from);
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(kBF16Tables.low), bytes,
                                               _mm512_load_si512(kBF16Tables.low + 64));
  const __m512i magnitude = _mm512_permutex2var_epi8(_mm512_load_si512(kBF16Tables.high), bytes,
                                                     _mm512_load_si512(kBF16Tables.high + 64));
  // magnitude | (bytes & 0x80)
  const __m512i high = _mm512_ternarylogic_epi32(magnitude, bytes, _mm512_set1_epi8(-128), 0xf8);
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

inline std::int8_t sign_and_magnitude(std::int8_t value) {
  return static_cast<std::int8_t>(value < 0 ? 0x80 | -value : value);
}

// int8 as bf16 dot products: 32 columns by two k make a register of bytes.
struct Int8DotFormat {
  using Value = std::int8_t;
  using X = BF16;
  using Acc = Vec;
  using Column = TwoVecs;
  using Row = __m512i;
  static constexpr int kStep = 2, kColumnVecs = 2;
  static constexpr std::size_t kColumnBytes = 64;
  static std::size_t place(int k, int column, int width) {
    const int c = column % 32;
    return static_cast<std::size_t>(k / 2) * 2 * width + column / 32 * 64 + c % 16 / 4 * 16 + c / 16 * 8 + c % 4 * 2 +
           k % 2;
  }
  static std::int8_t encode(std::int8_t value) { return sign_and_magnitude(value); }
  static Column column(const char* from) { return int8_to_bf16(from); }
  static Row row(const X* x) { return set1_word(x); }
  static void add(Acc* acc, const Column& w, const Row& x) {
    acc[0] = dot_bf16(acc[0], w.low, x);
    acc[1] = dot_bf16(acc[1], w.high, x);
  }
};

// The same for groups of 16 keys: 16 columns by four k make a register of bytes.
struct Int8KeysDotFormat {
  using Value = std::int8_t;
  using X = BF16;
  using Acc = Vec;
  using Column = TwoVecs;
  using Row = TwoVecs;
  static constexpr int kStep = 4, kColumnVecs = 1;
  static constexpr std::size_t kColumnBytes = 64;
  static std::size_t place(int k, int column, int) {
    return static_cast<std::size_t>(k / 4) * 64 + column / 4 * 16 + k % 4 / 2 * 8 + column % 4 * 2 + k % 2;
  }
  static std::int8_t encode(std::int8_t value) { return sign_and_magnitude(value); }
  static Column column(const char* from) { return int8_to_bf16(from); }
  static Row row(const X* x) { return {set1_word(x), set1_word(x + 2)}; }
  static void add(Acc* acc, const Column& w, const Row& x) {
    acc[0] = dot_bf16(dot_bf16(acc[0], w.low, x.low), w.high, x.high);
  }
};

// acc + the four products of uint8 x and int8 w in every lane. In assembly: from the intrinsic, g++ 12 moves every sum
// through a second register and, out of them, through memory.
inline __m512i dot_int8(__m512i acc, __m512i x, __m512i w) {
#if defined(GE_EMULATE_AVX512)
  return _mm512_dpbusd_epi32(acc, x, w);
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
  return acc;
#endif
}

// uint8 (an int8 activation plus kZero) times int8, four products at a time.
struct VnniFormat {
  using Value = std::int8_t;
  using X = std::uint8_t;
  using Acc = IVec;
  using Column = __m512i;
  using Row = __m512i;
  static constexpr int kStep = 4, kColumnVecs = 1;
  static constexpr std::size_t kColumnBytes = 64;
  static constexpr int kZero = 128;
  static std::size_t place(int k, int column, int width) {
    return static_cast<std::size_t>(k / 4) * 4 * width + 4 * column + k % 4;
  }
  static Column column(const char* from) { return _mm512_loadu_si512(from); }
  static Row row(const X* x) { return set1_word(x); }
  static void add(Acc* acc, const Column& w, const Row& x) { acc[0] = dot_int8(acc[0], x, w); }
};
#endif

inline Vec zero_like(const Vec*) { return zero(); }
inline IVec zero_like(const IVec*) { return int_zero(); }

// Fetches nothing.
struct NoAhead {
  void operator()(std::size_t) {}
};

// acc [R][C] += x [R][K] · a matrix of C registers of columns. `columns` are the addresses of the first step's
// columns, the next step's lie `step_bytes` further. `ahead` is called with the offset of every step.
template <class Format, int R, int C, class Ahead>
inline void multiply(const typename Format::X* x, std::size_t ldx, const char* const (&columns)[C / Format::kColumnVecs],
                     std::size_t step_bytes, int K, Ahead& ahead, typename Format::Acc (&acc)[R][C]) {
  constexpr int kVecs = Format::kColumnVecs, kColumns = C / kVecs;
  std::size_t offset = 0;
  for (int k = 0; k < K; k += Format::kStep, offset += step_bytes) {
    ahead(offset);
    if constexpr (R <= 2) {  // few rows: keep those in registers
      typename Format::Row rows[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) rows[r] = Format::row(x + r * ldx + k);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const typename Format::Column column = Format::column(columns[c] + offset);
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) Format::add(&acc[r][c * kVecs], column, rows[r]);
      }
    } else {
      typename Format::Column loaded[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) loaded[c] = Format::column(columns[c] + offset);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename Format::Row row = Format::row(x + r * ldx + k);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) Format::add(&acc[r][c * kVecs], loaded[c], row);
      }
    }
  }
}

}  // namespace
