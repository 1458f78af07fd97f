// Paged attention with an online softmax: out = softmax(q Kᵀ scale) V, row by row over tiles of kKeyTile keys.
//
// What a row does depends on its own position only: it takes the tiles from 0 on, and of the last one just the keys
// that it may see. Rows share the loads of keys and values, whatever streams they are of.
#pragma once

#include "kernels_cache.h"

namespace {

// The keys and values of one head in kKeyTile positions of a stream, as the formats multiply them.
struct Tile {
  static constexpr int kGroups = kKeyTile / kKeyGroup;
  const char* keys[kGroups];
  const char* values[kGroups];
  const float* key_scales[kGroups];
  const float* value_scales[kGroups];
};

// Scratch memory of one call, every array at a cache line.
struct Scratch {
  float* next;

  float* floats(std::size_t count) {
    float* start = next;
    next += (count + 15) / 16 * 16;
    return start;
  }
};

// Finds tiles; copies them where the cache is not tiled.
template <class Keys, class Values>
struct TileReader {
  using Cached = typename Keys::Value;
  const HeadShape& shape;
  const KVCache& cache;
  int kv_head;
  Cached *keys, *values;  // room for a copied tile
  float *key_scales, *value_scales;

  std::size_t group_values() const { return static_cast<std::size_t>(kKeyGroup) * shape.head_dim; }

  Tile read(const std::int32_t* block_table, int start, int num_keys) const {
    return shape.is_tiled ? find(block_table, start, num_keys) : copy(block_table, start, num_keys);
  }

  // Groups behind the last key repeat the first one's addresses: read, never used.
  Tile find(const std::int32_t* block_table, int start, int num_keys) const {
    Tile tile;
    for (int g = 0; g < Tile::kGroups; ++g) {
      const int key = g * kKeyGroup < num_keys ? start + g * kKeyGroup : start;
      const std::int64_t block = block_table[key / shape.block_size];
      const int offset = key % shape.block_size;
      const std::size_t skip = static_cast<std::size_t>(offset) * shape.head_dim;
      tile.keys[g] = reinterpret_cast<const char*>(head_at<Cached>(cache.keys, shape, block, kv_head) + skip);
      tile.values[g] = reinterpret_cast<const char*>(head_at<Cached>(cache.values, shape, block, kv_head) + skip);
      if constexpr (sizeof(Cached) == 1) {
        tile.key_scales[g] = scales_at(cache.key_scales, shape, block, kv_head) + offset;
        tile.value_scales[g] = scales_at(cache.value_scales, shape, block, kv_head) + offset;
      }
    }
    return tile;
  }

  Tile copy(const std::int32_t* block_table, int start, int num_keys) const {
    const int D = shape.head_dim;
    Tile tile;
    for (int g = 0; g < Tile::kGroups; ++g) {
      tile.keys[g] = reinterpret_cast<const char*>(keys + g * group_values());
      tile.values[g] = reinterpret_cast<const char*>(values + g * group_values());
      tile.key_scales[g] = key_scales + g * kKeyGroup;
      tile.value_scales[g] = value_scales + g * kKeyGroup;
    }
    for (int i = 0; i < num_keys; ++i) {
      const std::int64_t block = block_table[(start + i) / shape.block_size];
      const int offset = (start + i) % shape.block_size, token = i % kKeyGroup;
      const Cached* k = head_at<Cached>(cache.keys, shape, block, kv_head) + offset * shape.token_stride;
      const Cached* v = head_at<Cached>(cache.values, shape, block, kv_head) + offset * shape.token_stride;
      Cached* to_keys = keys + i / kKeyGroup * group_values();
      Cached* to_values = values + i / kKeyGroup * group_values();
      for (int j = 0; j < D; ++j) to_keys[Keys::place(j, token, kKeyGroup)] = encoded<Keys>(k[j]);
      for (int j = 0; j < D; ++j) to_values[Values::place(token, j, D)] = encoded<Values>(v[j]);
      if constexpr (sizeof(Cached) == 1) {
        key_scales[i] = scales_at(cache.key_scales, shape, block, kv_head)[offset];
        value_scales[i] = scales_at(cache.value_scales, shape, block, kv_head)[offset];
      }
    }
    return tile;
  }
};

// Fetches, beside every line that is read, the one at the same place of what is read next.
template <int kColumns>
struct TileAhead {
  const char* bases[kColumns];

  void operator()(std::size_t offset) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) prefetch(bases[c] + offset);
  }
};

template <int R, int C, class Acc>
inline void clear(Acc (&acc)[R][C]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  }
}

// scores [R][num_keys rounded up to a register tile] = q [R][D] · keys
template <class Keys, int R>
inline void multiply_keys(const typename Keys::X* q, const Tile& tile, int num_keys, int D, float* scores) {
  constexpr int kVecsOfGroup = kKeyGroup / kLanes;
  constexpr int C = R <= 2 ? kWideHeadTileVecs : kHeadTileVecs;
  constexpr std::size_t kStepBytes = kKeyGroup * Keys::kStep * sizeof(typename Keys::Value);
  for (int first = 0; first < num_keys; first += C * kLanes) {
    Vec acc[R][C];
    clear(acc);
    const char* columns[C];
    TileAhead<C> ahead;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const int vec = first / kLanes + c, group = vec / kVecsOfGroup;
      columns[c] = tile.keys[group] + vec % kVecsOfGroup * Keys::kColumnBytes;
      ahead.bases[c] = tile.values[group] + vec % kVecsOfGroup * Keys::kColumnBytes;
    }
    multiply<Keys, R, C>(q, D, columns, kStepBytes, D, ahead, acc);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) store(scores + r * kKeyTile + first + c * kLanes, acc[r][c]);
    }
  }
}

// Two values of a format that lie together, and the bits of the first.
template <std::size_t kValueBytes>
struct PairBits {
  using Type __attribute__((may_alias)) = std::uint64_t;
  static constexpr Type kFirst = 0xffffffff;
};

template <>
struct PairBits<2> {
  using Type __attribute__((may_alias)) = std::uint32_t;
  static constexpr Type kFirst = 0xffff;
};

template <>
struct PairBits<1> {
  using Type __attribute__((may_alias)) = std::uint16_t;
  static constexpr Type kFirst = 0xff;
};

// Where values are multiplied two keys at a time: the last of an odd number of keys, with zeros instead of the key
// behind it, which the rows must not see.
template <class Values>
struct OddValues {
  alignas(64) typename Values::Value pairs[2 * kMaxHeadDim];

  void copy(const Tile& tile, int num_keys, int D) {
    using Pair = typename PairBits<sizeof(typename Values::Value)>::Type;
    const int key = num_keys - 1;
    const auto* from = reinterpret_cast<const Pair*>(tile.values[key / kKeyGroup]) + key % kKeyGroup / 2 * D;
    auto* to = reinterpret_cast<Pair*>(pairs);
    for (int j = 0; j < D; ++j) to[j] = from[j] & PairBits<sizeof(typename Values::Value)>::kFirst;
  }
};

// sums [R][C registers of D, from column j on] = sums * shrink[r] + weights [R][num_keys] · values
template <class Values, int R, int C>
inline void add_columns(const typename Values::X* weights, const float* shrink, const Tile& tile,
                        const Tile& later, const OddValues<Values>& odd, int num_keys, int D, int j, float* sums) {
  constexpr int kColumns = C / Values::kColumnVecs;
  const std::size_t step_bytes = static_cast<std::size_t>(D) * Values::kStep * sizeof(typename Values::Value);
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = mul(load(sums + r * D + j + c * kLanes), set1(shrink[r]));
  }
  const int whole = num_keys / Values::kStep * Values::kStep;
  for (int first = 0; first < whole; first += kKeyGroup) {
    const int count = whole - first < kKeyGroup ? whole - first : kKeyGroup;
    const char* columns[kColumns];
    TileAhead<kColumns> ahead;
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const std::size_t skip = (j / (kLanes * Values::kColumnVecs) + c) * Values::kColumnBytes;
      columns[c] = tile.values[first / kKeyGroup] + skip;
      ahead.bases[c] = later.keys[first / kKeyGroup] + skip;
    }
    multiply<Values, R, C>(weights + first, kKeyTile, columns, step_bytes, count, ahead, acc);
  }
  if (whole < num_keys) {
    const char* columns[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      columns[c] = reinterpret_cast<const char*>(odd.pairs) +
                   (j / (kLanes * Values::kColumnVecs) + c) * Values::kColumnBytes;
    }
    NoAhead ahead;
    multiply<Values, R, C>(weights + whole, kKeyTile, columns, step_bytes, Values::kStep, ahead, acc);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(sums + r * D + j + c * kLanes, acc[r][c]);
  }
}

template <class Values, int R>
inline void add_values(const typename Values::X* weights, const float* shrink, const Tile& tile,
                       const Tile& later, const OddValues<Values>& odd, int num_keys, int D, float* sums) {
  constexpr int kWide = R <= 2 ? kWideHeadTileVecs : kHeadTileVecs;
  constexpr int kNarrow = 32 / kLanes < kWide ? 32 / kLanes : kWide;  // divides any D
  int j = 0;
  for (; j + kWide * kLanes <= D; j += kWide * kLanes)
    add_columns<Values, R, kWide>(weights, shrink, tile, later, odd, num_keys, D, j, sums);
  for (; j < D; j += kNarrow * kLanes)
    add_columns<Values, R, kNarrow>(weights, shrink, tile, later, odd, num_keys, D, j, sums);
}

// One tile of one row's softmax: scores become weights relative to the new maximum, those from num_keys on 0.
// Returns what earlier sums shrink by.
template <bool kHasScales, class X>
inline float soften(float* scores, const Tile& tile, int num_keys, float scale, X* weights, float& maximum,
                    float& total) {
  Vec top = set1(maximum);
  const Vec factor = set1(scale);
  for (int i = 0; i < num_keys; i += kLanes) {
    Vec s = mul(load(scores + i), factor);
    if constexpr (kHasScales) s = mul(s, load(tile.key_scales[i / kKeyGroup] + i % kKeyGroup));
    s = keep_first(s, num_keys - i);
    store(scores + i, s);
    top = max(top, s);
  }
  const float new_maximum = largest(top);
  const Vec shift = set1(new_maximum);
  Vec sums = zero();
  for (int i = 0; i < num_keys; i += kLanes) {
    Vec p = exp2(sub(load(scores + i), shift));
    sums = add(sums, p);
    if constexpr (kHasScales) {
      const Vec value_scales = load(tile.value_scales[i / kKeyGroup] + i % kKeyGroup);
      p = mul(p, first_or_zero(value_scales, num_keys - i));
    }
    store(weights + i, p);
  }
  alignas(64) float shrink[kLanes];
  store(shrink, exp2(set1(maximum - new_maximum)));
  maximum = new_maximum;
  total = total * shrink[0] + sum(sums);
  return shrink[0];
}

// Some rows' queries and what they have summed up so far. Rows stand in order of segments and positions.
template <class Keys, class Values>
struct HeadRows {
  using X = typename Values::X;
  const X* q;      // [rows][D]
  float* sums;     // [rows][D]
  float* scores;   // [rows][kKeyTile]
  X* weights;      // [rows][kKeyTile]
  float* maximum;  // [rows]
  float* total;    // [rows]
  float* shrink;   // [rows]
  int D;
  float scale;

  // Rows [first, last) take `tile`; visible[i - first] keys of it are row i's, ascending. What follows the tile is
  // fetched meanwhile: its values, then `later`'s keys.
  void attend(int first, int last, const int* visible, const Tile& tile, const Tile& later) {
    int row = first;
    if constexpr (kHeadTileRows >= 8) row = score<8>(row, last, first, visible, tile);
    if constexpr (kHeadTileRows >= 4) row = score<4>(row, last, first, visible, tile);
    row = score<2>(row, last, first, visible, tile);
    score<1>(row, last, first, visible, tile);
    for (row = first; row < last; ++row) {
      shrink[row] = soften<sizeof(typename Keys::Value) == 1>(scores + row * kKeyTile, tile, visible[row - first], scale,
                                                              weights + row * kKeyTile, maximum[row], total[row]);
    }
    OddValues<Values> odd;
    for (row = first; row < last;) {  // rows that see equally many keys at a time
      const int count = visible[row - first];
      int end = row + 1;
      while (end < last && visible[end - first] == count) ++end;
      if (count % Values::kStep != 0) odd.copy(tile, count, D);
      if constexpr (kHeadTileRows >= 8) row = sum_up<8>(row, end, tile, later, odd, count);
      if constexpr (kHeadTileRows >= 4) row = sum_up<4>(row, end, tile, later, odd, count);
      row = sum_up<2>(row, end, tile, later, odd, count);
      row = sum_up<1>(row, end, tile, later, odd, count);
    }
  }

 private:
  template <int R>
  int score(int row, int last, int first, const int* visible, const Tile& tile) {
    for (; row + R <= last; row += R)
      multiply_keys<Keys, R>(q + row * D, tile, visible[row + R - 1 - first], D, scores + row * kKeyTile);
    return row;
  }

  template <int R>
  int sum_up(int row, int last, const Tile& tile, const Tile& later, const OddValues<Values>& odd, int num_keys) {
    for (; row + R <= last; row += R) {
      add_values<Values, R>(weights + row * kKeyTile, shrink + row, tile, later, odd, num_keys, D, sums + row * D);
    }
    return row;
  }
};

template <class Model, class Cached>
void attention(const AttentionTask& task, const RowTile& rows, int kv_head, float* scratch) {
  using Act = typename Model::Act;
  using Keys = typename CacheFormats<Act, Cached>::Keys;
  using Values = typename CacheFormats<Act, Cached>::Values;
  using X = typename Values::X;
  const HeadShape& shape = task.shape;
  const int D = shape.head_dim, group = shape.num_heads / shape.num_kv_heads, num_rows = rows.num_rows * group;
  const std::size_t row_values = static_cast<std::size_t>(num_rows) * D;

  Scratch memory{scratch};
  X* q = reinterpret_cast<X*>(memory.floats(row_values));
  HeadRows<Keys, Values> heads;
  heads.q = q;
  heads.sums = memory.floats(row_values);
  heads.scores = memory.floats(static_cast<std::size_t>(num_rows) * kKeyTile);
  heads.weights = reinterpret_cast<X*>(memory.floats(static_cast<std::size_t>(num_rows) * kKeyTile));
  heads.maximum = memory.floats(num_rows);
  heads.total = memory.floats(num_rows);
  heads.shrink = memory.floats(num_rows);
  heads.D = D;
  heads.scale = task.softmax_scale * kLog2E;  // 2^x instead of e^x
  TileReader<Keys, Values> reader{shape, task.cache, kv_head, nullptr, nullptr, nullptr, nullptr};
  if (!shape.is_tiled) {
    const std::size_t tile_values = static_cast<std::size_t>(kKeyTile) * D;
    reader.keys = reinterpret_cast<Cached*>(memory.floats(tile_values));
    reader.values = reinterpret_cast<Cached*>(memory.floats(tile_values));
    reader.key_scales = memory.floats(kKeyTile);
    reader.value_scales = memory.floats(kKeyTile);
  }

  int i = 0;
  for (int s = 0; s < rows.num_segments; ++s) {
    for (int row = rows.segments[s].first_row; row < rows.segments[s].last_row; ++row) {
      const Act* from =
          static_cast<const Act*>(task.q) + (task.rows ? task.rows[row] : row) * task.ldq + kv_head * group * D;
      for (int j = 0; j < group * D; j += kLanes) store(q + i * D + j, load(from + j));
      i += group;
    }
  }
  for (std::size_t j = 0; j < row_values; j += kLanes) store(heads.sums + j, zero());
  for (int row = 0; row < num_rows; ++row) {
    heads.maximum[row] = -__builtin_inff();
    heads.total[row] = 0;
  }

  int visible[kMaxGroup > kHeadRows ? kMaxGroup : kHeadRows];  // of the tile, by each row
  for (int row = 0; row < num_rows; ++row) visible[row] = kKeyTile;
  for (int start = 0; start < rows.shared_keys; start += kKeyTile) {
    const Tile tile = reader.read(rows.segments[0].block_table, start, kKeyTile);
    const bool is_last = start + kKeyTile == rows.shared_keys;
    const Tile later = is_last || !shape.is_tiled
                           ? tile
                           : reader.find(rows.segments[0].block_table, start + kKeyTile, kKeyTile);
    heads.attend(0, num_rows, visible, tile, later);
  }
  int end = 0;  // of the segment's rows
  for (int s = 0; s < rows.num_segments; ++s) {
    const Segment& segment = rows.segments[s];
    int first = end;  // rows before it have seen all their keys
    const int begin = end, num_keys = static_cast<int>(task.positions[segment.last_row - 1]) + 1;
    end += (segment.last_row - segment.first_row) * group;
    for (int start = rows.shared_keys; start < num_keys; start += kKeyTile) {
      const int in_tile = num_keys - start < kKeyTile ? num_keys - start : kKeyTile;
      while (task.positions[segment.first_row + (first - begin) / group] < start) first += group;
      for (int row = first; row < end; ++row) {
        const std::int64_t count = task.positions[segment.first_row + (row - begin) / group] + 1 - start;
        visible[row - first] = count < kKeyTile ? static_cast<int>(count) : kKeyTile;
      }
      const Tile tile = reader.read(segment.block_table, start, in_tile);
      const int rest = num_keys - start - kKeyTile;
      const Tile later = rest <= 0 || !shape.is_tiled
                             ? tile
                             : reader.find(segment.block_table, start + kKeyTile, rest < kKeyTile ? rest : kKeyTile);
      heads.attend(first, end, visible, tile, later);
    }
  }

  i = 0;
  for (int s = 0; s < rows.num_segments; ++s) {
    for (int row = rows.segments[s].first_row; row < rows.segments[s].last_row; ++row) {
      Act* out = static_cast<Act*>(task.out) + row * task.ldo + kv_head * group * D;
      for (int h = 0; h < group; ++h, ++i) {
        const Vec divisor = set1(heads.total[i]);
        for (int j = 0; j < D; j += kLanes)
          put<Model::kRounds>(out + h * D + j, div(load(heads.sums + i * D + j), divisor));
      }
    }
  }
}

}  // namespace
