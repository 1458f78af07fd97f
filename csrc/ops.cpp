// The choice of kernels, and single operators for tests and measurements.

#include <cstring>
#include <new>
#include <string>
#include <system_error>
#include <vector>

#include "phases.h"
#include "step.h"

namespace {

#if defined(GE_EMULATE_AVX512)  // by tests/native: the sets that this CPU lacks are AVX2 code
#define GE_SUPPORTS(isa) (__builtin_cpu_init(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#elif defined(__x86_64__)
#define GE_SUPPORTS(isa) (__builtin_cpu_init(), __builtin_cpu_supports(isa) != 0)
#else
#define GE_SUPPORTS(isa) false
#endif

bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") != 0;
#else
  return false;
#endif
}

// In order of preference. Intel's bf16 dot product runs at a quarter of the rate of its fp32 multiply-add
// (measured on Sapphire Rapids: 1.4 against 5.6 instructions a nanosecond), so converting and multiplying in
// fp32 is twice as fast there, and more exact; AMD's runs at full rate.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> found;
  const bool has_avx512 = GE_SUPPORTS("avx512f") && GE_SUPPORTS("avx512bw") && GE_SUPPORTS("avx512vl");
  const bool has_dots = GE_SUPPORTS("avx512bf16") && GE_SUPPORTS("avx512vnni") && GE_SUPPORTS("avx512vbmi");
  const Kernels* dot = has_avx512 && has_dots ? kernels_avx512bf16() : nullptr;
  if (dot != nullptr && is_amd()) found.push_back(dot);
  if (has_avx512 && kernels_avx512() != nullptr) found.push_back(kernels_avx512());
  if (dot != nullptr && !is_amd()) found.push_back(dot);
  if (GE_SUPPORTS("avx2") && GE_SUPPORTS("fma") && kernels_avx2() != nullptr) found.push_back(kernels_avx2());
  found.push_back(kernels_portable());
  return found;
}

// Memory of one call, at cache lines. Small pages: clearing huge ones would take longer than most operators.
class Buffer {
 public:
  explicit Buffer(std::size_t num_bytes)
      : data_(static_cast<char*>(::operator new(num_bytes, std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return data_; }

 private:
  char* data_;
};

// Rows of stored values as activations.
struct Activations {
  Activations(const ModelKernels& kernels, int num_rows, int n)
      : stride(row_stride(n)),
        row_bytes(stride * kernels.act_bytes),
        memory(row_bytes * static_cast<std::size_t>(num_rows)) {}

  char* at(int row) const { return memory.data() + row * row_bytes; }

  std::size_t stride, row_bytes;
  Buffer memory;
};

std::size_t value_bytes(int dtype) { return dtype == GE_BFLOAT16 ? 2 : 4; }

const char* row_of(const void* values, int dtype, int row, int n) {
  return static_cast<const char*>(values) + static_cast<std::size_t>(row) * n * value_bytes(dtype);
}

char* row_of(void* values, int dtype, int row, int n) {
  return static_cast<char*>(values) + static_cast<std::size_t>(row) * n * value_bytes(dtype);
}

HeadShape shape_of(const GeCache& cache) {
  return {cache.num_heads,    cache.num_kv_heads,       cache.head_dim,         cache.block_size,
          cache.is_tiled != 0, cache.block_stride,       cache.token_stride,     cache.head_stride,
          cache.scale_block_stride, cache.scale_head_stride};
}

KVCache memory_of(const GeCache& cache) { return {cache.keys, cache.values, cache.key_scales, cache.value_scales}; }

// Runs body(workers, kernels, thread) on all threads.
template <class Body>
void on_all_threads(Workers& workers, const Body& body) {
  workers.team.run([](void* b, int thread) { (*static_cast<const Body*>(b))(thread); },
                   const_cast<void*>(static_cast<const void*>(&body)));
}

template <class Body>
int reporting_memory(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    return -2;
  }
}

}  // namespace

GE_API const char* ge_kernel_isas(void) {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* kernels : usable_kernels())
      joined += (joined.empty() ? "" : " ") + std::string(kernels->name);
    return joined;
  }();
  return names.c_str();
}

GE_API void* ge_workers_create(const char* isa, int num_threads, const int* cpus) {
  for (const Kernels* kernels : usable_kernels()) {
    if (std::strcmp(kernels->name, isa) != 0) continue;
    try {
      return new Workers{kernels, Team(num_threads, cpus)};
    } catch (const std::system_error&) {
      return nullptr;
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }
  return nullptr;
}

GE_API void ge_workers_destroy(void* workers) { delete static_cast<Workers*>(workers); }

GE_API std::int64_t ge_packed_bytes(void* workers, int dtype, int format, int N, int K) {
  return static_cast<std::int64_t>(
      packed_bytes(static_cast<Workers*>(workers)->kernels->model[dtype], format, N, K));
}

GE_API void ge_pack(void* workers, int dtype, int format, const void* weight, int N, int K, void* packed) {
  const std::int64_t num_rows = N;
  pack(*static_cast<Workers*>(workers), dtype, format, {&weight, &num_rows, 1, K, false},
       static_cast<char*>(packed));
}

GE_API int ge_linear(void* workers, int dtype, int format, const void* x, int T, int K, const void* packed, int N,
                     void* out, int is_float_out) {
  return reporting_memory([&] {
    Workers& w = *static_cast<Workers*>(workers);
    const ModelKernels& kernels = w.kernels->model[dtype];
    const Activations from(kernels, T, K), to(kernels, T, N);
    const std::size_t quantized_row = from.stride * kernels.quantized_bytes;
    const Buffer quantized(quantized_row * T);
    std::vector<float> scales(T);
    LinearTask task{from.at(0), from.stride, scales.data(), packed, K, N, kStore, to.at(0), to.stride};
    if (format == GE_W8A8) task.x = quantized.data();
    if (is_float_out) {
      task.epilogue = kStoreFloat;
      task.out = out;
      task.ldo = N;
    }
    on_all_threads(w, [&](int) {
      for_rows(w.team, T, [&](int row) {
        kernels.widen(row_of(x, dtype, row, K), K, from.at(row), from.stride);
        if (format == GE_W8A8)
          scales[row] = kernels.quantize_row(from.at(row), K, quantized.data() + row * quantized_row);
      });
      run_linear(w, kernels, format, task, T);
      if (is_float_out) return;
      for_rows(w.team, T, [&](int row) { kernels.narrow(to.at(row), N, row_of(out, dtype, row, N)); });
    });
  });
}

GE_API int ge_rms_norm(void* workers, int dtype, const void* x, const float* weight, float eps, int T, int n,
                       void* out) {
  return reporting_memory([&] {
    Workers& w = *static_cast<Workers*>(workers);
    const ModelKernels& kernels = w.kernels->model[dtype];
    const Activations rows(kernels, T, n);
    on_all_threads(w, [&](int) {
      for_rows(w.team, T, [&](int row) {
        kernels.widen(row_of(x, dtype, row, n), n, rows.at(row), rows.stride);
        kernels.rms_norm(rows.at(row), weight, eps, n, rows.at(row));
        kernels.narrow(rows.at(row), n, row_of(out, dtype, row, n));
      });
    });
  });
}

GE_API int ge_silu_and_mul(void* workers, int dtype, const void* gate_up, int T, int F, void* out) {
  return reporting_memory([&] {
    Workers& w = *static_cast<Workers*>(workers);
    const ModelKernels& kernels = w.kernels->model[dtype];
    const Activations gate(kernels, T, F), up(kernels, T, F);
    on_all_threads(w, [&](int) {
      for_rows(w.team, T, [&](int row) {
        kernels.widen(row_of(gate_up, dtype, 2 * row, F), F, gate.at(row), gate.stride);
        kernels.widen(row_of(gate_up, dtype, 2 * row + 1, F), F, up.at(row), up.stride);
        kernels.silu_mul(gate.at(row), up.at(row), F, gate.at(row));
        kernels.narrow(gate.at(row), F, row_of(out, dtype, row, F));
      });
    });
  });
}

GE_API int ge_qk_norm_rope_store_kv(void* workers, int dtype, const GeCache* cache, const void* qkv, int T,
                                    const float* q_norm, const float* k_norm, const float* cos_sin,
                                    const std::int64_t* positions, const std::int64_t* slot_mapping, float eps,
                                    void* q) {
  return reporting_memory([&] {
    Workers& w = *static_cast<Workers*>(workers);
    const ModelKernels& kernels = w.kernels->model[dtype];
    const HeadShape shape = shape_of(*cache);
    const int q_width = shape.num_heads * shape.head_dim,
              width = q_width + 2 * shape.num_kv_heads * shape.head_dim;
    const Activations rows(kernels, T, width);
    const StoreTask task{shape, q_norm, k_norm, cos_sin, eps, memory_of(*cache)};
    on_all_threads(w, [&](int) {
      for_rows(w.team, T, [&](int row) {
        kernels.widen(row_of(qkv, dtype, row, width), width, rows.at(row), rows.stride);
        for (int head = 0; head < shape.num_kv_heads; ++head) {
          kernels.store_kv[cache->kv_dtype](task, rows.at(row), positions[row], slot_mapping[row], head);
        }
        kernels.narrow(rows.at(row), q_width, row_of(q, dtype, row, q_width));
      });
    });
  });
}

GE_API int ge_paged_attention(void* workers, int dtype, const GeCache* cache, const void* q, int T,
                              const std::int32_t* block_tables, int blocks_per_table,
                              const std::int32_t* cu_seqlens, int B, const std::int64_t* positions,
                              float softmax_scale, void* out) {
  return reporting_memory([&] {
    Workers& w = *static_cast<Workers*>(workers);
    const ModelKernels& kernels = w.kernels->model[dtype];
    const HeadShape shape = shape_of(*cache);
    const int width = shape.num_heads * shape.head_dim;
    const Activations from(kernels, T, width), to(kernels, T, width);
    const RowTiles tiles = row_tiles(shape, {cu_seqlens, positions, B, block_tables, blocks_per_table});
    const std::size_t scratch_size = attention_scratch(shape);
    const Buffer scratch(scratch_size * sizeof(float) * w.team.size());
    const AttentionTask task{shape,   softmax_scale, memory_of(*cache), from.at(0), from.stride,
                             nullptr, positions,     to.at(0),          to.stride};
    on_all_threads(w, [&](int thread) {
      for_rows(w.team, T, [&](int row) {
        kernels.widen(row_of(q, dtype, row, width), width, from.at(row), from.stride);
      });
      run_attention(w, kernels, cache->kv_dtype, task, tiles,
                    reinterpret_cast<float*>(scratch.data()) + scratch_size * thread);
      for_rows(w.team, T,
               [&](int row) { kernels.narrow(to.at(row), width, row_of(out, dtype, row, width)); });
    });
  });
}
