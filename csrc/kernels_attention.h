// Paged attention with an online softmax: out = softmax(q Kᵀ scale) V, row by row over tiles of kKeyTile
// keys.
//
// A tile's keys, then its values, are copied out of the cache as floats (no rounding: bf16 fits), which
// serves all the rows of the call. What a row does depends on its own position only: it takes the tiles from
// 0 on, and of the last tile just the keys that it may see.
#pragma once

#include "kernels_rows.h"

namespace {

// One key head's keys (or values) of one stream.
template <class Cached>
struct PagedRows {
  const Cached* cache;
  const std::int32_t* block_table;
  const HeadShape& shape;

  // The row of `key`, for walking on from there: block by block, without a division for every key.
  struct Place {
    int block, offset;
  };

  Place place(int key) const { return {key / shape.block_size, key % shape.block_size}; }

  const Cached* at(Place p) const {
    return cache + block_table[p.block] * shape.block_stride + p.offset * shape.token_stride;
  }

  Place after(Place p) const {
    return p.offset + 1 < shape.block_size ? Place{p.block, p.offset + 1} : Place{p.block + 1, 0};
  }
};

// Copies rows [first_key, first_key + num_keys), and fetches `num_later` rows of `later` from first_later on
// into the cache: memory then works while the copied tile is computed with.
template <class Cached>
inline void copy_tile(const PagedRows<Cached>& rows, int first_key, int num_keys,
                      const PagedRows<Cached>& later, int first_later, int num_later, float* to) {
  const int D = rows.shape.head_dim, kLine = 64 / sizeof(Cached);
  auto from = rows.place(first_key), next = later.place(first_later);
  for (int i = 0; i < num_keys; ++i) {
    const Cached* row = rows.at(from);
    for (int j = 0; j < D; j += kLanes) store(to + i * D + j, load(row + j));
    from = rows.after(from);
    if (i < num_later) {
      const Cached* soon = later.at(next);
      for (int j = 0; j < D; j += kLine) prefetch_second_level(soon + j);
      next = later.after(next);
    }
  }
}

// scores [Q][num_keys rounded up to kLanes]: kLanes sums at a time, Q rows by kLanes / Q keys. The more rows,
// the fewer loads; a sum's order of addition is the same for every Q.
template <int Q>
inline void multiply_keys(const float* q, const float* keys, int num_keys, int D, float* scores) {
  constexpr int kKeys = kLanes / Q;
  for (int first = 0; first < num_keys; first += kKeys) {
    const float* k = keys + first * D;
    Vec acc[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) acc[i] = zero();
    for (int j = 0; j < D; j += kLanes) {
      Vec a[Q];
#pragma GCC unroll 4
      for (int r = 0; r < Q; ++r) a[r] = load(q + r * D + j);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec b = load(k + i * D + j);
#pragma GCC unroll 4
        for (int r = 0; r < Q; ++r) acc[r * kKeys + i] = fma(a[r], b, acc[r * kKeys + i]);
      }
    }
    alignas(64) float sums[kLanes];
    store(sums, sum_each(acc));
    for (int r = 0; r < Q; ++r)
      __builtin_memcpy(scores + r * kKeyTile + first, sums + r * kKeys, sizeof(float) * kKeys);
  }
}

// One tile of one row's softmax: scores become weights relative to the new maximum. Returns what earlier sums
// shrink by.
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
inline void add_values(const float* weights, const float* shrink, const float* values, int num_keys, int D,
                       float* sums) {
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
inline void add_values(const float* weights, const float* shrink, const float* values, int num_keys, int D,
                       float* sums) {
  constexpr int kVecs = kLanes == 16 ? 4 : 2;  // 6 x 4 or 4 x 2 accumulators
  int j = 0;
  for (; j + kVecs * kLanes <= D; j += kVecs * kLanes) {
    add_values<R, kVecs>(weights, shrink, values + j, num_keys, D, sums + j);
  }
  for (; j < D; j += kLanes) add_values<R, 1>(weights, shrink, values + j, num_keys, D, sums + j);
}

template <class Model, class Cached>
void attention(const AttentionTask& task, const std::int32_t* block_table, int first_row, int last_row,
               int kv_head, float* scratch) {
  using Act = typename Model::Act;
  constexpr int kRows = kLanes == 16 ? 6 : 4;  // that share a load of the values
  const HeadShape& shape = task.shape;
  const int D = shape.head_dim, group = shape.num_heads / shape.num_kv_heads;
  const int num_rows = (last_row - first_row) * group;
  float* q = scratch;                    // [num_rows][D], scaled
  float* sums = q + num_rows * D;        // [num_rows][D]
  float* tile = sums + num_rows * D;     // [kKeyTile][D]
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
  const std::int64_t head = kv_head * shape.head_stride;
  const PagedRows<Cached> keys{static_cast<const Cached*>(task.k_cache) + head, block_table, shape};
  const PagedRows<Cached> values{static_cast<const Cached*>(task.v_cache) + head, block_table, shape};
  int first = 0;  // rows before it have seen all their keys
  for (int start = 0; start < num_keys; start += kKeyTile) {
    const int in_tile = num_keys - start < kKeyTile ? num_keys - start : kKeyTile;
    while (task.positions[first_row + first / group] < start) first += group;
    for (int i = first; i < num_rows; i += group) {
      const std::int64_t count = task.positions[first_row + i / group] + 1 - start;
      visible[i / group] = count < kKeyTile ? static_cast<int>(count) : kKeyTile;
    }
    copy_tile(keys, start, in_tile, values, start, in_tile, tile);
    int row = first;
    // Rows stand in ascending order: the last of several sees the most. What the others must not see is cut
    // off later.
    for (; row + 4 <= num_rows; row += 4) {
      multiply_keys<4>(q + row * D, tile, visible[(row + 3) / group], D, weights + row * kKeyTile);
    }
    for (; row + 2 <= num_rows; row += 2) {
      multiply_keys<2>(q + row * D, tile, visible[(row + 1) / group], D, weights + row * kKeyTile);
    }
    for (; row < num_rows; ++row)
      multiply_keys<1>(q + row * D, tile, visible[row / group], D, weights + row * kKeyTile);
    const int later = start + kKeyTile < num_keys ? start + kKeyTile : 0, rest = num_keys - later;
    copy_tile(values, start, in_tile, keys, later, later == 0 ? 0 : rest < kKeyTile ? rest : kKeyTile, tile);
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
        case 1:
          add_values<1>(w, shrink, tile, count, D, out);
          break;
        case 2:
          add_values<2>(w, shrink, tile, count, D, out);
          break;
        case 3:
          add_values<3>(w, shrink, tile, count, D, out);
          break;
        case 4:
          add_values<4>(w, shrink, tile, count, D, out);
          break;
#if GE_TILE_ROWS > 5
        case 5:
          add_values<5>(w, shrink, tile, count, D, out);
          break;
        case 6:
          add_values<6>(w, shrink, tile, count, D, out);
          break;
#endif
      }
      i += rows;
    }
  }
  for (int i = 0; i < num_rows; ++i) {
    Act* out =
        static_cast<Act*>(task.out) + (first_row + i / group) * task.ldo + (kv_head * group + i % group) * D;
    const Vec divisor = set1(total[i]);
    for (int j = 0; j < D; j += kLanes) put<Model::kRounds>(out + j, div(load(sums + i * D + j), divisor));
  }
}

}  // namespace
