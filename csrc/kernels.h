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

// GE_INT8: of a KV cache only.
enum GeDtype { GE_FLOAT32 = 0, GE_BFLOAT16 = 1, GE_INT8 = 2, GE_NUM_DTYPES = 3 };

// How a matrix is stored: in the model's dtype; int8 with a scale for every kGroup of a row; int8 with a scale
// for every row, multiplied with activations that are rounded to int8 too.
enum GeFormat { GE_FULL = 0, GE_INT8_WEIGHTS = 1, GE_W8A8 = 2, GE_NUM_FORMATS = 3 };

constexpr int kPanel = 32;      // columns of a packed weight matrix that lie together
constexpr int kGroup = 128;     // weights of a row that share a scale; the last group may be shorter
constexpr int kKeyGroup = 16;   // tokens that a tiled KV cache keeps together
constexpr int kKeyTile = 64;    // keys that attention takes at a time, aligned at position 0
constexpr int kHeadRows = 64;   // query rows (row x head of a group) that share a key tile, unless a group is larger
constexpr int kMaxGroup = 256, kMaxHeadDim = 512, kMaxInner = 1 << 16;  // what callers check

enum Epilogue {
  kStore,        // out = x wᵀ, rounded to the model's dtype
  kStoreFloat,   // out (float) = x wᵀ
  kAddResidual,  // out += x wᵀ, both the product and the sum rounded
  kSiluMul,      // out = silu(gate) * up: gate and up (each rounded) are the halves of every panel
};

struct LinearTask {
  const void* x;  // [M, K] activations; for GE_W8A8 what quantize_row wrote
  std::size_t ldx;
  const float* x_scales;  // [M], for GE_W8A8
  const void* weight;     // packed by `pack_panel`, panel after panel
  int K, N;
  Epilogue epilogue;
  void* out;  // [M, N] activations (or float; [M, N / 2] for kSiluMul)
  std::size_t ldo;
};

// Of k_cache and v_cache, counted in values: slot = block * block_size + offset.
struct HeadShape {
  int num_heads, num_kv_heads, head_dim;  // head_dim a multiple of 32
  int block_size;
  // Tiled: a head's kKeyGroup tokens lie together as the kernels multiply them (block_size is a multiple of
  // kKeyGroup then, token_stride unused). Else a token's values lie together: any strides, any block size.
  bool is_tiled;
  std::int64_t block_stride, token_stride, head_stride;
  std::int64_t scale_block_stride, scale_head_stride;  // of an int8 cache's scales: one a token and head
};

struct KVCache {
  void *keys, *values;
  float *key_scales, *value_scales;  // null unless int8
};

struct StoreTask {
  HeadShape shape;
  const float *q_norm, *k_norm;  // [D]
  const float* cos_sin;          // [positions, D]
  float eps;
  KVCache cache;
};

struct AttentionTask {
  HeadShape shape;
  float softmax_scale;
  KVCache cache;
  const void* q;  // [rows, H * D] activations, row `rows[t]` (or t) for output row t
  std::size_t ldq;
  const std::int64_t* rows;  // null: row t
  const std::int64_t* positions;
  void* out;  // [T, H * D]
  std::size_t ldo;
};

// Rows [first_row, last_row) of one stream, in ascending order of position.
struct Segment {
  const std::int32_t* block_table;
  int first_row, last_row;
};

// Rows that attention takes in one call: of one stream, or of several whose first `shared_keys` keys (a
// multiple of kKeyTile, seen by every one of the rows) lie in the same blocks and are read once for all.
struct RowTile {
  const Segment* segments;
  int num_segments, num_rows, shared_keys;
};

struct ModelKernels {
  std::size_t act_bytes;
  std::size_t quantized_bytes;  // of one of the values that quantize_row writes
  // Rows of n stored values to activations, the padding up to the stride zeroed, and back.
  void (*widen)(const void* from, int n, void* to, std::size_t stride);
  void (*narrow)(const void* from, int n, void* to);
  // out = x / sqrt(mean(x²) + eps) * weight over n values; x is zero from there to the next multiple of 32.
  void (*rms_norm)(const void* x, const float* weight, float eps, int n, void* out);
  void (*silu_mul)(const void* gate, const void* up, int n, void* out);
  // Round a row of activations to int8 for GE_W8A8; returns its scale.
  float (*quantize_row)(const void* x, int n, void* out);
  // By GeFormat: bytes of a panel of K weights, and packing one from kPanel rows of K stored values (null: zeros).
  std::size_t (*panel_bytes[GE_NUM_FORMATS])(int K);
  void (*pack_panel[GE_NUM_FORMATS])(const void* const* rows, int K, char* to);
  // By GeFormat: columns [32 * first_panel, 32 * last_panel) of rows [first_row, last_row); next_panel is what
  // comes afterwards.
  void (*linear[GE_NUM_FORMATS])(const LinearTask& task, int first_row, int last_row, int first_panel,
                                 int last_panel, int next_panel);
  // By GeDtype of the KV cache:
  // norm and rotate one key head and its query heads in the row qkv, in place, and store key and value in the
  // cache
  void (*store_kv[GE_NUM_DTYPES])(const StoreTask& task, void* qkv, std::int64_t position, std::int64_t slot, int kv_head);
  // the rows of one tile for the query heads of one key head
  void (*attention[GE_NUM_DTYPES])(const AttentionTask& task, const RowTile& tile, int kv_head, float* scratch);
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

// Tokens of a stream that share a call of attention, at most.
static inline int attention_rows(const HeadShape& shape) {
  const int group = shape.num_heads / shape.num_kv_heads;
  return group >= kHeadRows ? 1 : kHeadRows / group;
}

// Floats of scratch memory, at a cache line, that a call of attention needs.
static inline std::size_t attention_scratch(const HeadShape& shape) {
  const std::size_t rows = static_cast<std::size_t>(attention_rows(shape)) * (shape.num_heads / shape.num_kv_heads);
  const std::size_t head_dim = static_cast<std::size_t>(shape.head_dim);
  // Queries and sums, scores and weights, three numbers a row; two copied tiles with their scales.
  const std::size_t count = rows * (2 * head_dim + 2 * kKeyTile + 3) + 2 * kKeyTile * (head_dim + 1);
  return (count + 63) / 64 * 64 + 64 * 8;  // every thread's part, and each array in it, begins at a cache line
}
