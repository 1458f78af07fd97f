// What a KV cache's values look like in memory, and storing one token's.
//
// Tiled (block_size a multiple of kKeyGroup): every kKeyGroup tokens of a head are one matrix for keys, [D] by
// tokens, and one for values, tokens by [D], laid out by their formats, so that attention multiplies with the
// cache in place. Otherwise a token's values lie one after another, and attention copies tiles into that layout.
#pragma once

#include "kernels_formats.h"
#include "kernels_rows.h"

namespace {

// How a model multiplies with cached keys and values, by the activation and the cache's dtype.
template <class Act, class Cached>
struct CacheFormats;

template <class Act>
struct CacheFormats<Act, float> {
  using Keys = Float32Format;
  using Values = Float32Format;
};

template <>
struct CacheFormats<float, BF16> {
  using Keys = BF16Format;
  using Values = BF16Format;
};

template <>
struct CacheFormats<float, std::int8_t> {
  using Keys = Int8Format;
  using Values = Int8Format;
};

#if defined(GE_DOT)
template <>
struct CacheFormats<BF16, BF16> {
  using Keys = BF16DotFormat;
  using Values = BF16DotFormat;
};

template <>
struct CacheFormats<BF16, std::int8_t> {
  using Keys = Int8KeysDotFormat;
  using Values = Int8DotFormat;
};
#endif

template <class F>
inline float encoded(float value) {
  return value;
}

template <class F>
inline BF16 encoded(BF16 value) {
  return value;
}

template <class F>
inline std::int8_t encoded(std::int8_t value) {
  return F::encode(value);
}

// Where a key head's tokens lie.
template <class Cached>
inline Cached* head_at(void* cache, const HeadShape& shape, std::int64_t block, int kv_head) {
  return static_cast<Cached*>(cache) + block * shape.block_stride + kv_head * shape.head_stride;
}

inline float* scales_at(float* scales, const HeadShape& shape, std::int64_t block, int kv_head) {
  return scales + block * shape.scale_block_stride + kv_head * shape.scale_head_stride;
}

// Norm one head, then rotate pair (j, j + D/2) by its angle. No lambda takes a Vec in these files: g++
// compiles lambdas without the file's target.
template <bool kRounds, class Act, class Out>
inline void norm_and_rotate(const Act* head, const float* weight, const float* cos_sin, float eps, int D,
                            Out* out) {
  const Vec scale = set1(scale_of_norm(head, eps, D));
  const int half = D / 2;
  for (int j = 0; j < half; j += kLanes) {
    const Vec a = mul(mul(load(head + j), scale), load(weight + j));
    const Vec b = mul(mul(load(head + half + j), scale), load(weight + half + j));
    const Vec cos = load(cos_sin + j), sin = load(cos_sin + half + j);
    put<kRounds>(out + j, sub(mul(a, cos), mul(b, sin)));
    put<kRounds>(out + half + j, add(mul(b, cos), mul(a, sin)));
  }
}

// Store D values as the cache's dtype; returns the scale of int8 ones.
template <class Cached>
inline float convert(const float* from, int D, Cached* to) {
  for (int j = 0; j < D; j += kLanes) store(to + j, load(from + j));
  return 1;
}

inline float convert(const float* from, int D, std::int8_t* to) { return quantize(from, D, to); }

template <class Model, class Cached>
void store_kv(const StoreTask& task, void* qkv, std::int64_t position, std::int64_t slot, int kv_head) {
  using Keys = typename CacheFormats<typename Model::Act, Cached>::Keys;
  using Values = typename CacheFormats<typename Model::Act, Cached>::Values;
  const HeadShape& shape = task.shape;
  const int D = shape.head_dim, group = shape.num_heads / shape.num_kv_heads;
  const float* cos_sin = task.cos_sin + position * D;
  auto* row = static_cast<typename Model::Act*>(qkv);
  for (int h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    auto* head = row + h * D;
    norm_and_rotate<Model::kRounds>(head, task.q_norm, cos_sin, task.eps, D, head);
  }
  const auto* key = row + (shape.num_heads + kv_head) * D;
  const auto* value = key + shape.num_kv_heads * D;
  const std::int64_t block = slot / shape.block_size;
  const int offset = static_cast<int>(slot % shape.block_size);
  Cached* k = head_at<Cached>(task.cache.keys, shape, block, kv_head);
  Cached* v = head_at<Cached>(task.cache.values, shape, block, kv_head);

  alignas(64) float exact[2][kMaxHeadDim];
  alignas(64) Cached keys[kMaxHeadDim], values[kMaxHeadDim];
  norm_and_rotate<false>(key, task.k_norm, cos_sin, task.eps, D, exact[0]);
  for (int j = 0; j < D; j += kLanes) store(exact[1] + j, load(value + j));
  const float key_scale = convert(exact[0], D, keys), value_scale = convert(exact[1], D, values);
  if constexpr (sizeof(Cached) == 1) {
    scales_at(task.cache.key_scales, shape, block, kv_head)[offset] = key_scale;
    scales_at(task.cache.value_scales, shape, block, kv_head)[offset] = value_scale;
  }
  if (!shape.is_tiled) {
    for (int j = 0; j < D; ++j) k[offset * shape.token_stride + j] = keys[j];
    for (int j = 0; j < D; ++j) v[offset * shape.token_stride + j] = values[j];
    return;
  }
  const std::ptrdiff_t group_start = static_cast<std::ptrdiff_t>(offset / kKeyGroup) * kKeyGroup * D;
  const int token = offset % kKeyGroup;
  for (int j = 0; j < D; ++j) k[group_start + Keys::place(j, token, kKeyGroup)] = encoded<Keys>(keys[j]);
  for (int j = 0; j < D; ++j) v[group_start + Values::place(token, j, D)] = encoded<Values>(values[j]);
}

}  // namespace
