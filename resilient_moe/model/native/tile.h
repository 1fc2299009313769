// What the kernels share: vectors, a tile of a matrix product, threads.
//
// An element of a product is one chain of fused multiply-adds over the depth,
// ascending. So its bits depend on nothing but its row and its matrix: not on
// how many rows there are, on their order, on blocks or on threads.

#ifndef RESILIENT_MOE_MODEL_NATIVE_TILE_H_
#define RESILIENT_MOE_MODEL_NATIVE_TILE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace rmoe {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6, kVectors = 4;  // of 32 registers
#else
constexpr int kLanes = 8, kRows = 4, kVectors = 2;  // of 16
#endif
constexpr int kPanel = kLanes * kVectors;

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(float))));

// Few rows: 8 rows of the matrix are read side by side, as memory likes it.
// Many: a block of the matrix is used by all rows before the next is read.
constexpr int64_t kFewDepth = 8, kManyDepth = 128;
constexpr int64_t kPackedRows = 128;  // from here on a copy of the block pays

inline Vector Load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void Store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// Lane i of the result is lane index[i] of a, then b.
inline Vector Shuffle(Vector a, Vector b, Ints index) {
#if defined(__clang__)
  Vector y;
  for (int i = 0; i < kLanes; ++i)
    y[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return y;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// e^x, to about 2 units in the last place; exactly 1 at 0, 0 below -87.
inline Vector Exp(Vector x) {
  const Ints tiny = x < -87.0f;
  x = tiny ? Vector{} : x;
  x = x > 88.0f ? Vector{} + 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds
  const Vector n = (x * 1.44269504f + magic) - magic;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;  // Cephes, expf
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints bits = (__builtin_convertvector(n, Ints) + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return tiny ? Vector{} : p * scale;
}

inline Vector Max(Vector a, Vector b) { return a > b ? a : b; }

// to[c][r] = from[r][c] for kLanes rows and columns: a perfect shuffle of the
// rows' halves, log2(kLanes) times, is a transposition.
inline void Transpose(const float* from, int64_t from_stride, float* to,
                      int64_t to_stride) {
  Ints low{}, high{};
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + (i % 2) * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  Vector v[kLanes], next[kLanes];
  for (int i = 0; i < kLanes; ++i) v[i] = Load(from + i * from_stride);
  for (int step = 1; step < kLanes; step *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = Shuffle(v[i], v[i + kLanes / 2], low);
      next[2 * i + 1] = Shuffle(v[i], v[i + kLanes / 2], high);
    }
    for (int i = 0; i < kLanes; ++i) v[i] = next[i];
  }
  for (int i = 0; i < kLanes; ++i) Store(to + i * to_stride, v[i]);
}

// Adds depths [k0, k1) to R rows of y, V vectors wide; from zero if `fresh`.
// `w` points to depth k0 of the first column.
template <int R, int V>
void Tile(const float* const* x, const float* w, int64_t stride, int64_t k0,
          int64_t k1, bool fresh, float* const* y, int64_t column) {
  Vector sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sum[r][v] = fresh ? Vector{} : Load(y[r] + column + v * kLanes);
  for (int64_t k = k0; k < k1; ++k) {
    const float* at = w + (k - k0) * stride;
    Vector row[V];
    for (int v = 0; v < V; ++v) {
      row[v] = Load(at + v * kLanes);
      __builtin_prefetch(at + kFewDepth * stride + v * kLanes);  // 1.3 times
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += x[r][k] * row[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) Store(y[r] + column + v * kLanes, sum[r][v]);
}

template <int V>
void Rows(int rows, const float* const* x, const float* w, int64_t stride,
          int64_t k0, int64_t k1, bool fresh, float* const* y,
          int64_t column) {
  switch (rows) {
    case 1: return Tile<1, V>(x, w, stride, k0, k1, fresh, y, column);
    case 2: return Tile<2, V>(x, w, stride, k0, k1, fresh, y, column);
    case 3: return Tile<3, V>(x, w, stride, k0, k1, fresh, y, column);
    case 4: return Tile<4, V>(x, w, stride, k0, k1, fresh, y, column);
#if defined(__AVX512F__)
    case 5: return Tile<5, V>(x, w, stride, k0, k1, fresh, y, column);
    case 6: return Tile<6, V>(x, w, stride, k0, k1, fresh, y, column);
#endif
  }
}

// The columns that don't fill a vector: the same order of additions.
inline void Rest(int rows, const float* const* x, const float* w,
                 int64_t stride, int64_t k0, int64_t k1, bool fresh,
                 float* const* y, int64_t column, int64_t end) {
  for (int r = 0; r < rows; ++r)
    for (int64_t c = column; c < end; ++c) {
      float sum = fresh ? 0.0f : y[r][c];
      for (int64_t k = k0; k < k1; ++k)
        sum = std::fma(x[r][k], w[k * stride + c], sum);
      y[r][c] = sum;
    }
}

// kPanel columns of some depths, next to each other for the first cache.
inline const float* Pack(const float* w, int64_t stride, int64_t depths) {
  alignas(64) static thread_local float packed[kManyDepth * kPanel];
  for (int64_t k = 0; k < depths; ++k)
    for (int v = 0; v < kVectors; ++v)
      Store(packed + k * kPanel + v * kLanes, Load(w + k * stride + v * kLanes));
  return packed;
}

// Columns [begin, end) of y[i] = x[i] @ w, or of y[i] += x[i] @ w unless
// `fresh`, for n rows. A row of w is `stride` floats.
inline void Multiply(int64_t n, const float* const* x, const float* w,
                     int64_t depth, int64_t stride, bool fresh,
                     float* const* y, int64_t begin, int64_t end) {
  const int64_t block = n <= kRows ? kFewDepth : kManyDepth;
  for (int64_t k0 = 0; k0 < depth; k0 += block) {
    const int64_t k1 = std::min(depth, k0 + block);
    const bool first = fresh && !k0;
    for (int64_t c = begin; c < end; c += kPanel) {
      const bool whole = end - c >= kPanel;
      const bool pack = whole && n >= kPackedRows && stride > kPanel;
      const float* from = w + k0 * stride + c;
      const float* panel = pack ? Pack(from, stride, k1 - k0) : from;
      const int64_t row = pack ? kPanel : stride;
      for (int64_t i = 0; i < n; i += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, n - i));
        if (whole) {
          Rows<kVectors>(rows, x + i, panel, row, k0, k1, first, y + i, c);
          continue;
        }
        int64_t at = c;
        for (; at + kLanes <= end; at += kLanes)
          Rows<1>(rows, x + i, from + at - c, stride, k0, k1, first, y + i,
                  at);
        Rest(rows, x + i, w, stride, k0, k1, first, y + i, at, end);
      }
    }
  }
}

// Columns that a piece of work takes, so that `groups` products of `width`
// columns make some pieces for each thread, and all end together.
inline int64_t Piece(int64_t width, int64_t groups, int64_t threads) {
  const int64_t panels = (width + kPanel - 1) / kPanel;
  const int64_t wanted = (4 * threads + groups - 1) / std::max<int64_t>(groups, 1);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(panels, 1));
  return (panels + parts - 1) / parts * kPanel;
}

}  // namespace rmoe

#endif  // RESILIENT_MOE_MODEL_NATIVE_TILE_H_
