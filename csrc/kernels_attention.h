// Paged attention with an online softmax: out = softmax(q Kᵀ scale) V, row by row over tiles of kKeyTile keys.
//
// A tile's keys, then its values, are copied out of the cache as floats (no rounding: bf16 fits), which serves all
// the rows of the call. What a row does depends on its own position only: it takes the tiles from 0 on, and of
// the last tile just the keys that it may see.
#pragma once

namespace {

template <class Cached>
inline void copy_tile(const AttentionTask& task, const Cached* cache, const std::int32_t* block_table, int first_key,
                      int num_keys, int kv_head, float* to) {
  const HeadShape& shape = task.shape;
  const int D = shape.head_dim;
  for (int i = 0; i < num_keys; ++i) {
    const int key = first_key + i;
    const Cached* from = cache + block_table[key / shape.block_size] * shape.block_stride +
                         key % shape.block_size * shape.token_stride + kv_head * shape.head_stride;
    for (int j = 0; j < D; j += kLanes) store(to + i * D + j, load(from + j));
  }
}

// scores [num_keys rounded up to kLanes] of one row.
inline void multiply_keys(const float* q, const float* keys, int num_keys, int D, float* scores) {
  for (int first = 0; first < num_keys; first += kLanes) {
    const float* k = keys + first * D;
    Vec acc[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) acc[i] = zero();
    for (int j = 0; j < D; j += kLanes) {
      const Vec a = load(q + j);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) acc[i] = fma(a, load(k + i * D + j), acc[i]);
    }
    store(scores + first, sum_each(acc));
  }
}

// One tile of one row's softmax: scores become weights relative to the new maximum. Returns what earlier sums shrink by.
inline float soften(float* scores, int num_keys, float& maximum, float& total) {
  Vec top = set1(maximum);
  for (int i = 0; i < num_keys; i += kLanes) {
    const Vec s = keep_first(load(scores + i), num_keys - i);
    store(scores + i, s);
    top = max(top, s);
  }
  const float new_maximum = largest(top);
  const Vec shift = set1(new_maximum);
  Vec sums = zero();
  for (int i = 0; i < num_keys; i += kLanes) {
    const Vec p = exp2(sub(load(scores + i), shift));
    store(scores + i, p);
    sums = add(sums, p);
  }
  alignas(64) float shrink[kLanes];
  store(shrink, exp2(set1(maximum - new_maximum)));
  maximum = new_maximum;
  total = total * shrink[0] + sum(sums);
  return shrink[0];
}

// sums [R][C * kLanes of D] = sums * shrink[r] + weights [R][num_keys] · values [num_keys]
template <int R, int C>
inline void add_values(const float* weights, const float* shrink, const float* values, int num_keys, int D, float* sums) {
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = mul(load(sums + r * D + c * kLanes), set1(shrink[r]));
  }
  for (int i = 0; i < num_keys; ++i) {
    Vec v[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) v[c] = load(values + i * D + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec w = set1(weights[r * kKeyTile + i]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = fma(w, v[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(sums + r * D + c * kLanes, acc[r][c]);
  }
}

template <int R>
inline void add_values(const float* weights, const float* shrink, const float* values, int num_keys, int D, float* sums) {
  constexpr int kVecs = kLanes == 16 ? 4 : 2;  // 6 x 4 or 4 x 2 accumulators
  int j = 0;
  for (; j + kVecs * kLanes <= D; j += kVecs * kLanes) {
    add_values<R, kVecs>(weights, shrink, values + j, num_keys, D, sums + j);
  }
  for (; j < D; j += kLanes) add_values<R, 1>(weights, shrink, values + j, num_keys, D, sums + j);
}

template <class Model, class Cached>
void attention(const AttentionTask& task, const std::int32_t* block_table, int first_row, int last_row, int kv_head,
               float* scratch) {
  using Act = typename Model::Act;
  constexpr int kRows = kLanes == 16 ? 6 : 4;  // that share a load of the values
  const HeadShape& shape = task.shape;
  const int D = shape.head_dim, group = shape.num_heads / shape.num_kv_heads;
  const int num_rows = (last_row - first_row) * group;
  float* q = scratch;                   // [num_rows][D], scaled
  float* sums = q + num_rows * D;       // [num_rows][D]
  float* tile = sums + num_rows * D;    // [kKeyTile][D]
  float* weights = tile + kKeyTile * D;  // [num_rows][kKeyTile]
  float* maximum = weights + num_rows * kKeyTile;
  float* total = maximum + num_rows;
  float shrink[kRows];
  int visible[kHeadRows];  // keys of the tile that each row may see

  // 2^x instead of e^x: the factor goes into the scale.
  const Vec scale = set1(task.softmax_scale * kLog2E);
  for (int i = 0; i < num_rows; ++i) {
    const int row = first_row + i / group;
    const Act* from = static_cast<const Act*>(task.q) + (task.rows ? task.rows[row] : row) * task.ldq +
                      (kv_head * group + i % group) * D;
    for (int j = 0; j < D; j += kLanes) {
      store(q + i * D + j, mul(load(from + j), scale));
      store(sums + i * D + j, zero());
    }
    maximum[i] = -__builtin_inff();
    total[i] = 0;
  }

  const int num_keys = static_cast<int>(task.positions[last_row - 1]) + 1;
  const auto* k_cache = static_cast<const Cached*>(task.k_cache);
  const auto* v_cache = static_cast<const Cached*>(task.v_cache);
  int first = 0;  // rows before it have seen all their keys
  for (int start = 0; start < num_keys; start += kKeyTile) {
    const int in_tile = num_keys - start < kKeyTile ? num_keys - start : kKeyTile;
    while (task.positions[first_row + first / group] < start) first += group;
    for (int i = first; i < num_rows; i += group) {
      const std::int64_t count = task.positions[first_row + i / group] + 1 - start;
      visible[i / group] = count < kKeyTile ? static_cast<int>(count) : kKeyTile;
    }
    copy_tile(task, k_cache, block_table, start, in_tile, kv_head, tile);
    for (int i = first; i < num_rows; ++i) multiply_keys(q + i * D, tile, visible[i / group], D, weights + i * kKeyTile);
    copy_tile(task, v_cache, block_table, start, in_tile, kv_head, tile);
    for (int i = first; i < num_rows;) {
      // Rows that see equally many keys share the loads of the values; those that do not go one by one.
      const int count = visible[i / group];
      int rows = 0;
      while (rows < kRows && i + rows < num_rows && visible[(i + rows) / group] == count) {
        shrink[rows] = soften(weights + (i + rows) * kKeyTile, count, maximum[i + rows], total[i + rows]);
        ++rows;
      }
      const float* w = weights + i * kKeyTile;
      float* out = sums + i * D;
      switch (rows) {
        case 1: add_values<1>(w, shrink, tile, count, D, out); break;
        case 2: add_values<2>(w, shrink, tile, count, D, out); break;
        case 3: add_values<3>(w, shrink, tile, count, D, out); break;
        case 4: add_values<4>(w, shrink, tile, count, D, out); break;
#if GE_TILE_ROWS > 5
        case 5: add_values<5>(w, shrink, tile, count, D, out); break;
        case 6: add_values<6>(w, shrink, tile, count, D, out); break;
#endif
      }
      i += rows;
    }
  }
  for (int i = 0; i < num_rows; ++i) {
    Act* out = static_cast<Act*>(task.out) + (first_row + i / group) * task.ldo + (kv_head * group + i % group) * D;
    const Vec divisor = set1(total[i]);
    for (int j = 0; j < D; j += kLanes) put<Model::kRounds>(out + j, div(load(sums + i * D + j), divisor));
  }
}

}  // namespace
