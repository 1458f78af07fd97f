#include "step.h"

#include <algorithm>
#include <new>
#include <vector>

#include "memory.h"
#include "phases.h"

namespace {

constexpr std::size_t kAlignment = 4096;

std::size_t aligned(std::size_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct Matrix {
  int N = 0, K = 0, format = GE_FULL;
  char* data = nullptr;
};

// Rows of activations.
struct Rows {
  char* data = nullptr;
  std::size_t stride = 0;  // in activations
  std::size_t act_bytes = 0;

  void* at(std::int64_t row) const { return data + row * stride * act_bytes; }
};

// Rows that a matrix is multiplied with. Made by what computes the rows, so that they cannot be mistaken for the
// quantized rows of another input.
struct Input {
  Rows rows;
  Rows quantized;                 // for GE_W8A8, else none
  const float* scales = nullptr;  // of each quantized row
};

class Model {
 public:
  Model(Workers& workers, const GeModelConfig& config);

  void pack_matrix(int matrix, int layer, const Unpacked& rows);
  void step(const GeBatch& batch);

 private:
  struct Norms {
    const float *input, *post, *query, *key;
  };

  const Matrix& matrix(int which, int layer) const {
    return matrices_[which < GE_PRE ? layer * GE_PRE + which : heads_ + which];
  }
  Norms norms(int layer) const;
  std::size_t stored_bytes() const { return config_.dtype == GE_BFLOAT16 ? 2 : 4; }  // of the model's dtype
  KVCache cache_of(const GeBatch& batch, int layer) const;
  void reserve(int num_rows);
  void step_thread(const GeBatch& batch, int thread);
  void run_layer(const GeBatch& batch, int layer, int thread);
  void classify(const GeBatch& batch);
  Input norm_rows(const Rows& from, int offset, const float* weight, int n, const Rows& to, int num_rows,
                  bool feeds_layer);
  Input quantize_rows(const Rows& from, int n, int num_rows);
  void multiply(const Input& x, const Matrix& weight, Epilogue epilogue, const Rows& out, int num_rows);

  Workers& workers_;
  const GeModelConfig config_;
  const ModelKernels& kernels_;
  HeadShape shape_;
  int heads_;  // where the guard heads' matrices begin, less GE_PRE
  std::vector<Matrix> matrices_;
  Memory weights_, scratch_;
  int capacity_ = 0;  // rows
  Rows residual_, labelled_, normed_, qkv_, attended_, inner_;
  Rows quantized_;  // of the one Input in use, for GE_W8A8, and each row's scale
  float* row_scales_ = nullptr;
  std::size_t attention_scratch_;  // floats a thread
  Memory attention_memory_;
  RowTiles tiles_, label_tiles_;
};

Model::Model(Workers& workers, const GeModelConfig& config)
    : workers_(workers), config_(config), kernels_(workers.kernels->model[config.dtype]) {
  const std::int64_t token_stride = config.head_dim, head_stride = token_stride * config.block_size;
  const std::int64_t heads_of_block = std::int64_t{2} * config.num_kv_heads * config.num_layers;
  shape_ = {config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.block_size,
            config.block_size % kKeyGroup == 0,
            head_stride * heads_of_block,
            token_stride,
            head_stride,
            config.block_size * heads_of_block,
            config.block_size};
  const int q_width = config.num_heads * config.head_dim, kv_width = config.num_kv_heads * config.head_dim;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    matrices_.push_back({q_width + 2 * kv_width, config.hidden, config.format});
    matrices_.push_back({config.hidden, q_width, config.format});
    matrices_.push_back({2 * config.intermediate, config.hidden, config.format});
    matrices_.push_back({config.hidden, config.intermediate, config.format});
  }
  heads_ = static_cast<int>(matrices_.size()) - GE_PRE;
  matrices_.push_back({2 * config.guard_inner, config.hidden});
  matrices_.push_back({config.response_logits, config.guard_inner});
  matrices_.push_back({config.query_logits, config.guard_inner});
  std::size_t total = 0;
  for (const Matrix& m : matrices_) total += aligned(packed_bytes(kernels_, m.format, m.N, m.K));
  weights_ = Memory(total);
  char* place = weights_.data();
  for (Matrix& m : matrices_) {
    m.data = place;
    place += aligned(packed_bytes(kernels_, m.format, m.N, m.K));
  }
  attention_scratch_ = attention_scratch(shape_);
  attention_memory_ = Memory(attention_scratch_ * sizeof(float) * workers.team.size());
  reserve(64);
}

void Model::pack_matrix(int which, int layer, const Unpacked& rows) {
  const Matrix& target = matrix(which, layer);
  pack(workers_, config_.dtype, target.format,
       {rows.sources, rows.num_rows, rows.num_sources, target.K, which == GE_GATE_UP}, target.data);
}

// The keys and values of one layer: [N, layers, 2, Hkv, S * D] values, [N, layers, 2, Hkv, S] scales.
KVCache Model::cache_of(const GeBatch& batch, int layer) const {
  static constexpr std::size_t kValueBytes[] = {4, 2, 1};  // by GeDtype
  const std::size_t plane = shape_.head_stride * config_.num_kv_heads * kValueBytes[config_.kv_dtype];
  const std::size_t scales_plane = shape_.scale_head_stride * config_.num_kv_heads;
  char* keys = static_cast<char*>(batch.kv_cache) + 2 * plane * layer;
  float* scales = batch.kv_scales == nullptr ? nullptr : batch.kv_scales + 2 * scales_plane * layer;
  return {keys, keys + plane, scales, scales == nullptr ? nullptr : scales + scales_plane};
}

Model::Norms Model::norms(int layer) const {
  const std::size_t E = config_.hidden, D = config_.head_dim;
  const float* start = config_.layer_norms + layer * (2 * E + 2 * D);
  return {start, start + E, start + 2 * E, start + 2 * E + D};
}

// Room for the activations of `num_rows` rows.
void Model::reserve(int num_rows) {
  if (num_rows <= capacity_) return;
  const int qkv = (config_.num_heads + 2 * config_.num_kv_heads) * config_.head_dim;
  const int widths[] = {config_.hidden,
                        config_.hidden,
                        std::max(config_.hidden, 2 * config_.guard_inner),
                        std::max(qkv, 2 * config_.guard_inner),
                        config_.num_heads * config_.head_dim,
                        config_.intermediate};
  Rows* const buffers[] = {&residual_, &labelled_, &normed_, &qkv_, &attended_, &inner_};
  std::size_t total = 0;
  for (int width : widths) total += aligned(row_stride(width) * kernels_.act_bytes * num_rows);
  const int widest = std::max({config_.hidden, config_.num_heads * config_.head_dim, config_.intermediate});
  const std::size_t quantized =
      config_.format == GE_W8A8 ? aligned(row_stride(widest) * kernels_.quantized_bytes * num_rows) : 0;
  const std::size_t scales = config_.format == GE_W8A8 ? aligned(sizeof(float) * num_rows) : 0;
  scratch_ = Memory(total + quantized + scales);
  char* place = scratch_.data();
  for (int i = 0; i < 6; ++i) {
    *buffers[i] = {place, row_stride(widths[i]), kernels_.act_bytes};
    place += aligned(row_stride(widths[i]) * kernels_.act_bytes * num_rows);
  }
  quantized_ = {place, row_stride(widest), kernels_.quantized_bytes};
  row_scales_ = reinterpret_cast<float*>(place + quantized);
  capacity_ = num_rows;
}

void Model::step(const GeBatch& batch) {
  reserve(batch.num_tokens);
  tiles_ = row_tiles(shape_, {batch.cu_seqlens, batch.positions, batch.num_streams, batch.block_tables,
                              batch.blocks_per_table});
  label_tiles_ = row_tiles(shape_, {batch.label_cu_seqlens, batch.label_positions, batch.num_streams,
                                    batch.block_tables, batch.blocks_per_table});
  struct Call {
    Model* model;
    const GeBatch* batch;
  } call{this, &batch};
  workers_.team.run(
      [](void* argument, int thread) {
        const Call& c = *static_cast<Call*>(argument);
        c.model->step_thread(*c.batch, thread);
      },
      &call);
}

// Everything from here to the end of the class runs on all threads at once.

void Model::step_thread(const GeBatch& batch, int thread) {
  for_rows(workers_.team, batch.num_tokens, [&](int row) {
    const char* embedding =
        static_cast<const char*>(config_.embed) + batch.input_ids[row] * config_.hidden * stored_bytes();
    kernels_.widen(embedding, config_.hidden, residual_.at(row), residual_.stride);
  });
  for (int layer = 0; layer < config_.num_layers; ++layer) run_layer(batch, layer, thread);
  if (batch.num_labels > 0) classify(batch);
}

void Model::run_layer(const GeBatch& batch, int layer, int thread) {
  const bool is_last = layer == config_.num_layers - 1;
  const Norms weights = norms(layer);
  const Input x = norm_rows(residual_, 0, weights.input, config_.hidden, normed_, batch.num_tokens, true);
  multiply(x, matrix(GE_QKV, layer), kStore, qkv_, batch.num_tokens);

  const KVCache cache = cache_of(batch, layer);
  const StoreTask store{shape_, weights.query, weights.key, config_.cos_sin, config_.eps, cache};
  for_rows(workers_.team, batch.num_tokens * config_.num_kv_heads, [&](int item) {
    const int row = item / config_.num_kv_heads;
    kernels_.store_kv[config_.kv_dtype](store, qkv_.at(row), batch.positions[row], batch.slot_mapping[row],
                                        item % config_.num_kv_heads);
  });

  // Past the last layer's keys and values only the labelled rows matter.
  if (is_last && batch.num_labels == 0) return;
  const Rows& residual = is_last ? labelled_ : residual_;
  const int num_rows = is_last ? batch.num_labels : batch.num_tokens;
  if (is_last) {
    for_rows(workers_.team, num_rows, [&](int row) {
      __builtin_memcpy(residual.at(row), residual_.at(batch.label_index[row]),
                       residual.stride * residual.act_bytes);
    });
  }
  const AttentionTask attention{shape_,
                                1.0f / __builtin_sqrtf(static_cast<float>(config_.head_dim)),
                                cache,
                                qkv_.data,
                                qkv_.stride,
                                is_last ? batch.label_index : nullptr,
                                is_last ? batch.label_positions : batch.positions,
                                attended_.data,
                                attended_.stride};
  run_attention(workers_, kernels_, config_.kv_dtype, attention, is_last ? label_tiles_ : tiles_,
                reinterpret_cast<float*>(attention_memory_.data()) + attention_scratch_ * thread);
  const Input attended = quantize_rows(attended_, config_.num_heads * config_.head_dim, num_rows);
  multiply(attended, matrix(GE_O, layer), kAddResidual, residual, num_rows);
  const Input post = norm_rows(residual, 0, weights.post, config_.hidden, normed_, num_rows, true);
  multiply(post, matrix(GE_GATE_UP, layer), kSiluMul, inner_, num_rows);
  const Input inner = quantize_rows(inner_, config_.intermediate, num_rows);
  multiply(inner, matrix(GE_DOWN, layer), kAddResidual, residual, num_rows);
}

void Model::classify(const GeBatch& batch) {
  const int W = batch.num_labels, G = config_.guard_inner;
  const Input x = norm_rows(labelled_, 0, config_.final_norm, config_.hidden, normed_, W, false);
  if (G == 0) {
    const std::size_t row_bytes = config_.hidden * stored_bytes();
    for_rows(workers_.team, W, [&](int row) {
      kernels_.narrow(normed_.at(row), config_.hidden, static_cast<char*>(batch.out) + row * row_bytes);
    });
    return;
  }
  multiply(x, matrix(GE_PRE, 0), kStore, qkv_, W);
  norm_rows(qkv_, 0, config_.guard_norms, G, normed_, W, false);
  norm_rows(qkv_, G, config_.guard_norms + G, G, normed_, W, false);
  float* logits = static_cast<float*>(batch.out);
  const std::size_t num_logits = config_.response_logits + config_.query_logits;
  const Matrix &response = matrix(GE_RESPONSE, 0), &query = matrix(GE_QUERY, 0);
  run_linear(
      workers_, kernels_, GE_FULL,
      {normed_.data, normed_.stride, nullptr, response.data, G, response.N, kStoreFloat, logits, num_logits}, W);
  run_linear(workers_, kernels_, GE_FULL,
             {static_cast<char*>(normed_.data) + G * kernels_.act_bytes, normed_.stride, nullptr, query.data, G,
              query.N, kStoreFloat, logits + config_.response_logits, num_logits},
             W);
}

// Values [offset, offset + n) of each row. `feeds_layer`: as the input of one of the layers' matrices, otherwise of one
// in the model's dtype.
Input Model::norm_rows(const Rows& from, int offset, const float* weight, int n, const Rows& to, int num_rows,
                       bool feeds_layer) {
  const std::size_t skip = offset * kernels_.act_bytes;
  const bool quantizes = feeds_layer && config_.format == GE_W8A8;
  for_rows(workers_.team, num_rows, [&](int row) {
    kernels_.rms_norm(static_cast<char*>(from.at(row)) + skip, weight, config_.eps, n,
                      static_cast<char*>(to.at(row)) + skip);
    if (quantizes) row_scales_[row] = kernels_.quantize_row(to.at(row), n, quantized_.at(row));
  });
  if (!quantizes) return {to, {}, nullptr};
  return {to, quantized_, row_scales_};
}

// Rows as the input of one of the layers' matrices, rounded where that takes other numbers than the activations.
Input Model::quantize_rows(const Rows& from, int n, int num_rows) {
  if (config_.format != GE_W8A8) return {from, {}, nullptr};
  for_rows(workers_.team, num_rows,
           [&](int row) { row_scales_[row] = kernels_.quantize_row(from.at(row), n, quantized_.at(row)); });
  return {from, quantized_, row_scales_};
}

void Model::multiply(const Input& x, const Matrix& weight, Epilogue epilogue, const Rows& out, int num_rows) {
  const Rows& rows = weight.format == GE_W8A8 ? x.quantized : x.rows;
  run_linear(workers_, kernels_, weight.format,
             {rows.data, rows.stride, x.scales, weight.data, weight.K, weight.N, epilogue, out.data, out.stride},
             num_rows);
}

}  // namespace

GE_API void* ge_model_create(void* workers, const GeModelConfig* config) {
  try {
    return new Model(*static_cast<Workers*>(workers), *config);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

GE_API void ge_model_destroy(void* model) { delete static_cast<Model*>(model); }

GE_API void ge_model_pack(void* model, int matrix, int layer, const void* const* sources,
                          const std::int64_t* num_rows, int num_sources) {
  static_cast<Model*>(model)->pack_matrix(matrix, layer, {sources, num_rows, num_sources, 0, false});
}

GE_API int ge_step(void* model, const GeBatch* batch) {
  try {
    static_cast<Model*>(model)->step(*batch);
    return 0;
  } catch (const std::bad_alloc&) {
    return -2;
  }
}
