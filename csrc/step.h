// The model on the CPU: packed weights and one call for a whole step. A plain C ABI, used through ctypes.
//
// Nothing here checks its arguments: the Python side does. A model and its workers belong to one thread at a
// time. Sizes follow the dimension key of guardengine.kernels; dtypes are GeDtype (0 float32, 1 bfloat16).
#pragma once

#include "bf16.h"

// What the Python side mirrors, as "name=number" separated by spaces: bytes of structs, values of enums, limits. A
// library whose numbers are others than Python's own is refused (guardengine.kernels.abi).
GE_API const char* ge_abi(void);

// Threads and the kernels of one instruction set, "avx512bf16", "avx512", "avx2" or "portable". Null when the
// threads cannot be started, or for a set that this CPU or build lacks.
// cpus: null, or num_threads CPUs that the threads stay on (thread 0 is the caller and stays where it is).
GE_API void* ge_workers_create(const char* isa, int num_threads, const int* cpus);
GE_API void ge_workers_destroy(void* workers);

// The names that ge_workers_create takes on this CPU, separated by spaces, the one to prefer first.
GE_API const char* ge_kernel_isas(void);

struct GeModelConfig {
  std::int32_t num_layers, hidden, num_heads, num_kv_heads, head_dim, intermediate;
  std::int32_t guard_inner, response_logits, query_logits;  // all 0 without guard heads: a step ends with the norm
  std::int32_t dtype, kv_dtype, block_size;
  std::int32_t format;  // GeFormat of the layers' matrices
  float eps;
  // Owned by the caller, who keeps them while the model lives.
  const void* embed;         // [V, E], in the model's dtype
  const float* layer_norms;  // [layers, 2 E + 2 D]: input, post-attention, query, key
  const float* final_norm;   // [E]
  const float* guard_norms;  // [2, G]: response, query
  const float* cos_sin;      // [positions, D]
};

enum GeMatrix { GE_QKV, GE_O, GE_GATE_UP, GE_DOWN, GE_PRE, GE_RESPONSE, GE_QUERY, GE_NUM_MATRICES };

// Room for a model's matrices, to be filled by ge_model_pack before the first step. Null when memory runs
// out.
GE_API void* ge_model_create(void* workers, const GeModelConfig* config);
GE_API void ge_model_destroy(void* model);

// Pack one matrix (GeMatrix; `layer` is ignored for the guard heads') from row-major sources in the model's
// dtype, which stand one after another; gate and up are two sources.
GE_API void ge_model_pack(void* model, int matrix, int layer, const void* const* sources,
                          const std::int64_t* num_rows, int num_sources);

struct GeBatch {
  std::int32_t num_tokens, num_streams, blocks_per_table, num_labels;
  const std::int64_t* input_ids;     // [T]
  const std::int64_t* positions;     // [T]
  const std::int32_t* cu_seqlens;    // [B + 1]
  const std::int64_t* slot_mapping;  // [T]
  const std::int32_t* block_tables;  // [B, M]
  const std::int64_t* label_index;   // [W]
  const std::int64_t* label_positions;
  const std::int32_t* label_cu_seqlens;
  void* kv_cache;    // [N, layers, 2, Hkv, S * D]: keys, values; within S * D see HeadShape::is_tiled
  float* kv_scales;  // [N, layers, 2, Hkv, S], null unless the cache is int8
  void* out;  // [W, C] float logits; without guard heads [W, E] normed rows in the model's dtype
};

// Run one batch: guardengine.runners.model.forward and guard_logits, or final_rows. 0, or -2 when there is no memory for
// its rows (then nothing was changed).
GE_API int ge_step(void* model, const GeBatch* batch);

// Single operators with the contracts of guardengine.kernels.reference, on contiguous tensors of `dtype`;
// norms' weights are float; `packed` has ge_packed_bytes. 0, or -2 when memory runs out.
GE_API std::int64_t ge_packed_bytes(void* workers, int dtype, int format, int N, int K);
GE_API void ge_pack(void* workers, int dtype, int format, const void* weight, int N, int K, void* packed);
GE_API int ge_linear(void* workers, int dtype, int format, const void* x, int T, int K, const void* packed, int N,
                     void* out, int is_float_out);
GE_API int ge_rms_norm(void* workers, int dtype, const void* x, const float* weight, float eps, int T, int n,
                       void* out);
GE_API int ge_silu_and_mul(void* workers, int dtype, const void* gate_up, int T, int F, void* out);

// A KV cache of one layer: HeadShape, KVCache.
struct GeCache {
  std::int32_t num_heads, num_kv_heads, head_dim, block_size, kv_dtype, is_tiled;
  std::int64_t block_stride, token_stride, head_stride;  // of both caches, in values
  std::int64_t scale_block_stride, scale_head_stride;
  void *keys, *values;
  float *key_scales, *value_scales;
};

GE_API int ge_qk_norm_rope_store_kv(void* workers, int dtype, const GeCache* cache, const void* qkv, int T,
                                    const float* q_norm, const float* k_norm, const float* cos_sin,
                                    const std::int64_t* positions, const std::int64_t* slot_mapping, float eps,
                                    void* q);
GE_API int ge_paged_attention(void* workers, int dtype, const GeCache* cache, const void* q, int T,
                              const std::int32_t* block_tables, int blocks_per_table,
                              const std::int32_t* cu_seqlens, int B, const std::int64_t* positions,
                              float softmax_scale, void* out);
