#include "probe.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define GE_X86 1
#define GE_TARGET(isa) __attribute__((target(isa)))
#else
#define GE_X86 0
#endif

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kRounds = 4;

// Results go here, so that no loop below can be optimised away.
std::atomic<std::uint64_t> sink{0};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// From the first thread's start to the last one's end: threads that ran one after another are not added up.
double elapsed(const std::vector<double>& starts, const std::vector<double>& ends) {
  return *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end());
}

// Whether the CPU and the operating system have an instruction set. Initialised by hand: not every compiler's
// run-time library does it for shared libraries.
#if GE_X86
#define GE_SUPPORTS(isa) (__builtin_cpu_init(), __builtin_cpu_supports(isa) != 0)
#endif

// ---- threads ------------------------------------------------------------------------------------------------

// All `num_threads` arrive before any goes on. Waiting threads give up their core: there may be fewer cores.
class Barrier {
 public:
  explicit Barrier(int num_threads) : num_threads_(num_threads) {}

  void wait() {
    const int round = round_.load();
    if (arrived_.fetch_add(1) + 1 == num_threads_) {
      arrived_.store(0);
      round_.store(round + 1);
      return;
    }
    while (round_.load() == round) std::this_thread::yield();
  }

 private:
  const int num_threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

// Runs body(0) .. body(num_threads - 1) at the same time. False when the threads cannot be started; then none ran.
template <class Body>
bool run_threads(int num_threads, const Body& body) {
  enum { kWaiting, kGo, kAbort };
  std::atomic<int> signal{kWaiting};
  std::vector<std::thread> threads;
  try {
    threads.reserve(num_threads);
    for (int t = 0; t < num_threads; ++t) {
      threads.emplace_back([&signal, &body, t] {
        while (signal.load() == kWaiting) std::this_thread::yield();
        if (signal.load() == kGo) body(t);
      });
    }
    signal.store(kGo);
  } catch (const std::exception&) {
    signal.store(kAbort);
  }
  for (std::thread& thread : threads) thread.join();
  return signal.load() == kGo;
}

// ---- reading ------------------------------------------------------------------------------------------------
// Sums up [data, data + num_bytes): 64-byte aligned, a multiple of 512 bytes.

using ReadFunction = std::uint64_t (*)(const std::uint8_t*, std::size_t);

std::uint64_t read_portable(const std::uint8_t* data, std::size_t num_bytes) {
  std::uint64_t sums[8] = {};
  const std::uint64_t* words = reinterpret_cast<const std::uint64_t*>(data);
  for (std::size_t i = 0; i < num_bytes / 8; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += words[i + j];
  }
  std::uint64_t total = 0;
  for (std::uint64_t sum : sums) total += sum;
  return total;
}

#if GE_X86
GE_TARGET("avx512f")
std::uint64_t read_avx512(const std::uint8_t* data, std::size_t num_bytes) {
  __m512i s0 = _mm512_setzero_si512(), s1 = s0, s2 = s0, s3 = s0;
  for (std::size_t i = 0; i < num_bytes; i += 256) {
    s0 = _mm512_add_epi64(s0, _mm512_load_si512(data + i));
    s1 = _mm512_add_epi64(s1, _mm512_load_si512(data + i + 64));
    s2 = _mm512_add_epi64(s2, _mm512_load_si512(data + i + 128));
    s3 = _mm512_add_epi64(s3, _mm512_load_si512(data + i + 192));
  }
  alignas(64) std::uint64_t sums[8];
  _mm512_store_si512(sums, _mm512_add_epi64(_mm512_add_epi64(s0, s1), _mm512_add_epi64(s2, s3)));
  std::uint64_t total = 0;
  for (std::uint64_t sum : sums) total += sum;
  return total;
}
#endif

ReadFunction choose_read() {
#if GE_X86
  if (GE_SUPPORTS("avx512f")) return read_avx512;
#endif
  return read_portable;
}

// ---- arithmetic ---------------------------------------------------------------------------------------------

// From outside the loops, so that nothing is known at compile time; values stay ordinary (no denormals, no infinities).
struct Operands {
  float factor = 0.75f, addend = 0.25f;
  std::uint32_t bf16_pair = 0x3f803f80u;  // 1.0, 1.0
  std::uint32_t int8_quad = 0x01020304u;
};

using PeakFunction = std::uint64_t (*)(const Operands&, int steps);

struct Peak {
  PeakFunction function;
  double ops_per_step;
};

// Independent accumulators: more than latency x ports of any CPU in sight (4 x 2; 5 x 2 for dpbf16 on Zen 4), and few
// enough for the registers.
constexpr int kChains = 12;

// A function that takes `steps` steps of every accumulator `a`, number n. A macro, because an instruction set is the
// attribute of a function and no parameter of a template, and these are not the sets that there are kernels for. `a` is
// a copy: g++ keeps an array that assembly refers to in memory.
#define GE_PEAK(name, attribute, Vector, operand, start, ...)                   \
  attribute std::uint64_t name(const Operands& operands, int steps) {           \
    const auto x = operand;                                                     \
    Vector chains[kChains];                                                     \
    for (int n = 0; n < kChains; ++n) chains[n] = start;                        \
    for (int i = 0; i < steps; ++i) {                                           \
      _Pragma("GCC unroll 12") for (int n = 0; n < kChains; ++n) {              \
        Vector a = chains[n];                                                   \
        __VA_ARGS__;                                                            \
        chains[n] = a;                                                          \
      }                                                                         \
    }                                                                           \
    Vector total = chains[0];                                                   \
    for (int n = 1; n < kChains; ++n) total += chains[n];                       \
    std::uint64_t bits;                                                         \
    std::memcpy(&bits, &total, sizeof bits);                                    \
    return bits;                                                                \
  }

// Of 16 bytes, which every CPU in sight has registers for.
using Portable = float __attribute__((vector_size(16)));
GE_PEAK(fp32_portable, , Portable, operands.factor, Portable{} + operands.factor * n, a = a * x + operands.addend)

#if GE_X86
GE_PEAK(fp32_avx2, GE_TARGET("avx2,fma"), __m256, _mm256_set1_ps(operands.factor),
        _mm256_set1_ps(operands.factor * n), a = _mm256_fmadd_ps(a, x, _mm256_set1_ps(operands.addend)))
GE_PEAK(fp32_avx512, GE_TARGET("avx512f"), __m512, _mm512_set1_ps(operands.factor),
        _mm512_set1_ps(operands.factor * n), a = _mm512_fmadd_ps(a, x, _mm512_set1_ps(operands.addend)))
// C-style casts: __m512bh is a vector of short in older compilers and of __bf16 in newer ones.
GE_PEAK(bf16_avx512, GE_TARGET("avx512f,avx512bw,avx512vl,avx512bf16"), __m512,
        (__m512bh)_mm512_set1_epi32(static_cast<int>(operands.bf16_pair)), _mm512_set1_ps(operands.factor * n),
        a = _mm512_dpbf16_ps(a, x, x))
// Integers in assembly: from the intrinsics, g++ 12 makes two register moves around every instruction.
GE_PEAK(int8_avx512, GE_TARGET("avx512f,avx512vnni"), __m512i,
        _mm512_set1_epi32(static_cast<int>(operands.int8_quad)), _mm512_set1_epi32(n),
        asm("vpdpbusd %1, %1, %0" : "+v"(a) : "v"(x)))
GE_PEAK(int8_avx2, GE_TARGET("avx2,avxvnni"), __m256i, _mm256_set1_epi32(static_cast<int>(operands.int8_quad)),
        _mm256_set1_epi32(n), asm("%{vex%} vpdpbusd %1, %1, %0" : "+x"(a) : "x"(x)))
// Where there is no dot product of int8: pairs of int16, which int8 are widened to.
GE_PEAK(int16_avx2, GE_TARGET("avx2"), __m256i, _mm256_set1_epi32(static_cast<int>(operands.int8_quad)),
        _mm256_set1_epi32(n), __m256i products;
        asm volatile("vpmaddwd %2, %2, %1; vpaddd %1, %0, %0" : "+x"(a), "=&x"(products) : "x"(x)))
#endif

// The widest implementation on this CPU; function is null when there is none.
Peak choose_peak(int kind) {
#if GE_X86
  const bool has_avx512 = GE_SUPPORTS("avx512f");
  if (kind == GE_PEAK_FP32 && has_avx512) return {fp32_avx512, kChains * 16 * 2};
  if (kind == GE_PEAK_FP32 && GE_SUPPORTS("avx2") && GE_SUPPORTS("fma")) {
    return {fp32_avx2, kChains * 8 * 2};
  }
  if (kind == GE_PEAK_BF16 && GE_SUPPORTS("avx512bw") && GE_SUPPORTS("avx512vl") &&
      GE_SUPPORTS("avx512bf16")) {
    return {bf16_avx512, kChains * 32 * 2};
  }
  if (kind == GE_PEAK_INT8 && has_avx512 && GE_SUPPORTS("avx512vnni")) {
    return {int8_avx512, kChains * 64 * 2};
  }
  if (kind == GE_PEAK_INT8 && GE_SUPPORTS("avxvnni")) return {int8_avx2, kChains * 32 * 2};
  // Without either, AVX-512's pairs of int16 are not probed: what AVX2's do is less than the CPU can.
  if (kind == GE_PEAK_INT8 && !has_avx512 && GE_SUPPORTS("avx2")) return {int16_avx2, kChains * 16 * 2};
#endif
  if (kind == GE_PEAK_FP32) return {fp32_portable, kChains * 4 * 2};
  return {nullptr, 0};
}

std::string find_isa() {
#if GE_X86
  std::string found = "x86-64";
#define GE_FIND(name, shown) \
  if (GE_SUPPORTS(name)) found += " " shown;
  GE_FIND("avx2", "avx2")
  GE_FIND("fma", "fma")
  GE_FIND("avxvnni", "avx_vnni")
  GE_FIND("avx512f", "avx512f")
  GE_FIND("avx512bw", "avx512bw")
  GE_FIND("avx512vl", "avx512vl")
  GE_FIND("avx512bf16", "avx512_bf16")
  GE_FIND("avx512vnni", "avx512_vnni")
#undef GE_FIND
  return found;
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "portable";
#endif
}

}  // namespace

GE_API const char* ge_isa(void) {
  static const std::string isa = find_isa();
  return isa.c_str();
}

GE_API int ge_probe_read(int num_threads, std::size_t num_bytes, int repeats, double* best, double* median) {
  constexpr std::size_t kPiece = 4096;
  if (num_threads < 1 || num_threads > kMaxThreads || repeats < 1 || repeats > 1000 || !best || !median) {
    return GE_BAD_ARGUMENT;
  }
  const std::size_t slice = num_bytes / num_threads / kPiece * kPiece;
  if (slice == 0) return GE_BAD_ARGUMENT;
  const std::size_t total = slice * num_threads;
  void* memory = mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return GE_NO_MEMORY;
#ifdef MADV_HUGEPAGE
  madvise(memory, total, MADV_HUGEPAGE);  // only makes the start faster; refused on some kernels
#endif
  std::uint8_t* data = static_cast<std::uint8_t*>(memory);
  const ReadFunction read = choose_read();
  std::vector<double> starts(num_threads), ends(num_threads), rates;
  Barrier barrier(num_threads);
  const bool ran = run_threads(num_threads, [&](int t) {
    std::uint8_t* mine = data + t * slice;
    std::memset(mine, t + 1, slice);  // untouched pages are all one page of zeros
    for (int r = 0; r < repeats; ++r) {
      barrier.wait();
      starts[t] = now();
      sink += read(mine, slice);
      ends[t] = now();
      barrier.wait();
      if (t == 0) {
        rates.push_back(static_cast<double>(total) / elapsed(starts, ends));
      }
    }
  });
  munmap(memory, total);
  if (!ran) return GE_NO_THREADS;
  std::sort(rates.begin(), rates.end());
  *best = rates.back();
  *median = rates[rates.size() / 2];
  return GE_OK;
}

GE_API int ge_probe_peak(int kind, int num_threads, double seconds, double* ops_per_s) {
  if (kind < GE_PEAK_FP32 || kind >= GE_NUM_PEAKS || num_threads < 1 || num_threads > kMaxThreads ||
      !(seconds > 0 && seconds <= 10) || !ops_per_s) {
    return GE_BAD_ARGUMENT;
  }
  *ops_per_s = 0;
  const Peak peak = choose_peak(kind);
  if (peak.function == nullptr) return GE_OK;
  constexpr int kSteps = 2000;  // several microseconds: the clock is read between
  const Operands operands;
  std::vector<double> steps(num_threads), starts(num_threads), ends(num_threads);
  double fastest = 0;
  Barrier barrier(num_threads);
  const bool ran = run_threads(num_threads, [&](int t) {
    for (int r = 0; r < kRounds; ++r) {
      barrier.wait();
      double mine = 0, end = 0;
      std::uint64_t result = 0;
      const double start = now();
      do {
        result += peak.function(operands, kSteps);
        mine += kSteps;
        end = now();
      } while (end - start < seconds / kRounds);
      sink += result;
      steps[t] = mine;
      starts[t] = start;
      ends[t] = end;
      barrier.wait();
      if (t == 0) {
        double total = 0;
        for (double done : steps) total += done;
        fastest = std::max(fastest, total * peak.ops_per_step / elapsed(starts, ends));
      }
    }
  });
  if (!ran) return GE_NO_THREADS;
  *ops_per_s = fastest;
  return GE_OK;
}
