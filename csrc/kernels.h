// The kernels of one instruction set, as a table of functions. Written once, in kernels_*.h, and compiled
// once for each instruction set; which one runs is chosen when a model is made.
//
// An activation is stored as `act_bytes` bytes: a float, or a bf16 where the instruction set multiplies bf16
// directly. In a bf16 model it always holds a bf16 value. Rows of activations have strides counted in
// activations, a multiple of 32 and at least the row's length rounded up to 32.
//
// Every output depends on its own row only, computed by the same operations in the same order whatever rows
// stand beside it and whatever thread computes it. Sizes follow the dimension key of guardengine.kernels.
#pragma once

#include "bf16.h"

enum GeDtype { GE_FLOAT32 = 0, GE_BFLOAT16 = 1 };

constexpr int kPanel = 32;    // columns of a packed weight matrix that lie together
constexpr int kKeyTile = 64;  // keys that attention takes at a time, aligned at position 0
constexpr int kHeadRows =
    32;  // query rows (row x head of a group) that share a key tile at most, unless a group is larger

enum Epilogue {
  kStore,        // out = x wᵀ, rounded to the model's dtype
  kStoreFloat,   // out (float) = x wᵀ
  kAddResidual,  // out += x wᵀ, both the product and the sum rounded
  kSiluMul,      // out = silu(gate) * up: gate and up (each rounded) are the halves of every panel
};

struct LinearTask {
  const void* x;  // [M, K] activations
  std::size_t ldx;
  const void* weight;  // packed [ceil(N / 32)][K / 2][32][2] bf16, or [ceil(N / 32)][K][32] float; K is even
  int K, N;
  Epilogue epilogue;
  void* out;  // [M, N] activations (or float; [M, N / 2] for kSiluMul)
  std::size_t ldo;
};

struct HeadShape {
  int num_heads, num_kv_heads, head_dim;  // head_dim a multiple of 32
  int block_size;
  // Of k_cache and v_cache, counted in values: slot = block * block_size + offset.
  std::int64_t block_stride, token_stride, head_stride;
};

struct StoreTask {
  HeadShape shape;
  const float *q_norm, *k_norm;  // [D]
  const float* cos_sin;          // [positions, D]
  float eps;
  void *k_cache, *v_cache;
};

struct AttentionTask {
  HeadShape shape;
  float softmax_scale;
  const void *k_cache, *v_cache;
  const void* q;  // [rows, H * D] activations, row `rows[t]` (or t) for output row t
  std::size_t ldq;
  const std::int64_t* rows;  // null: row t
  const std::int64_t* positions;
  void* out;  // [T, H * D]
  std::size_t ldo;
};

struct ModelKernels {
  std::size_t act_bytes;
  // Rows of n stored values to activations, the padding up to the stride zeroed, and back.
  void (*widen)(const void* from, int n, void* to, std::size_t stride);
  void (*narrow)(const void* from, int n, void* to);
  // out = x / sqrt(mean(x²) + eps) * weight over n values; x is zero from there to the next multiple of 32.
  void (*rms_norm)(const void* x, const float* weight, float eps, int n, void* out);
  void (*silu_mul)(const void* gate, const void* up, int n, void* out);
  // Columns [32 * first_panel, 32 * last_panel) of rows [first_row, last_row); next_panel is what comes
  // afterwards.
  void (*linear)(const LinearTask& task, int first_row, int last_row, int first_panel, int last_panel,
                 int next_panel);
  // For each dtype of the KV cache:
  // norm and rotate one key head and its query heads in the row qkv, in place, and store key and value in the
  // cache
  void (*store_kv[2])(const StoreTask& task, void* qkv, std::int64_t position, std::int64_t slot,
                      int kv_head);
  // out rows [first_row, last_row), all of one stream, for the query heads of one key head
  void (*attention[2])(const AttentionTask& task, const std::int32_t* block_table, int first_row,
                       int last_row, int kv_head, float* scratch);
};

struct Kernels {
  const char* name;
  ModelKernels model[2];  // by GeDtype of the model
};

// Null where the build has none. Whether the CPU has the instructions is the caller's business.
const Kernels* kernels_avx512bf16();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

// Query rows of one attention call, at most, and the floats of scratch memory, at a cache line, that it
// needs.
static inline int attention_rows(const HeadShape& shape) {
  const int group = shape.num_heads / shape.num_kv_heads;
  return group >= kHeadRows ? 1 : kHeadRows / group;
}

static inline std::size_t attention_scratch(const HeadShape& shape) {
  const int rows = attention_rows(shape) * (shape.num_heads / shape.num_kv_heads);
  const std::size_t head_dim = static_cast<std::size_t>(shape.head_dim);
  const std::size_t count =
      (2 * rows + kKeyTile) * head_dim + static_cast<std::size_t>(rows) * (kKeyTile + 2);
  return (count + 63) / 64 * 64;  // every thread's part begins at a cache line
}
