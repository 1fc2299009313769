// Attention of new tokens over cached ones, with a running softmax (Dao et
// al., FlashAttention, 2022, algorithm 1) over fixed blocks of positions.
//
// Keys of a block are turned, so that lanes are keys: a score is one chain of
// multiply-adds over the head's width, in decode as in prefill. A block or a
// key that a query doesn't see leaves its bits as they were.

#ifndef RESILIENT_MOE_MODEL_NATIVE_ATTENTION_H_
#define RESILIENT_MOE_MODEL_NATIVE_ATTENTION_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "tile.h"

namespace rmoe {

struct Attention {
  int64_t queries, heads, width;  // Q, H, w of the queries
  int64_t cached_heads, kv_heads;  // what a token has cached; K
  bool latent;  // a value is the start of its own key
  int64_t value;  // width of a value
  int64_t room;  // T, positions of a cache row
  int64_t block;  // positions of a block
  int64_t window;  // positions seen; 0: all before
  const float* sinks;  // [H], or null
};

struct Sequence {
  const float* q;  // [Q, H, w]
  const float* fresh;  // [Q, cached_heads, w], of the same tokens
  const float* cache;  // [cached_heads, T, w], or null
  int64_t start, length;  // the first query's position; queries that count
  float* out;  // [Q, H, value]
};

// Queries whose heads share a turned block of keys.
inline int64_t QueriesPerTile(const Attention& a) {
  return std::max<int64_t>(1, 64 / (a.heads / a.kv_heads));
}

// A head's cached tokens, each `stride` floats after the one before.
struct Tokens {
  const float* first;
  int64_t stride;
};

// Positions [from, from + count) of a head: where they lie if they lie
// together, or else copied to `room`, the cached ones before the new.
inline Tokens Find(const Attention& a, const Sequence& s, int64_t head,
                   int64_t from, int64_t count, std::vector<float>& room) {
  const int64_t stride = a.cached_heads * a.width;
  const float* fresh = s.fresh + head * a.width + (from - s.start) * stride;
  if (from >= s.start || !s.cache) return {fresh, stride};
  const float* old = s.cache + (head * a.room + from) * a.width;
  const int64_t n = std::min(count, s.start - from);
  if (n == count) return {old, a.width};
  room.resize(count * a.width);
  std::copy_n(old, n * a.width, room.data());
  for (int64_t t = n; t < count; ++t)
    std::copy_n(fresh + t * stride, a.width, &room[t * a.width]);
  return {room.data(), a.width};
}

// Keys [count, w] with lanes as keys, [w, block].
inline void Turn(const Tokens& keys, int64_t count, int64_t width, float* to,
                 int64_t block) {
  for (int64_t t = 0; t < count; t += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      const float* from = keys.first + t * keys.stride + d;
      if (t + kLanes <= count && d + kLanes <= width) {
        Transpose(from, keys.stride, to + d * block + t, block);
        continue;
      }
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - t); ++i)
        for (int64_t c = 0; c < std::min<int64_t>(kLanes, width - d); ++c)
          to[(d + c) * block + t + i] = from[i * keys.stride + c];
    }
}

// One block of keys for n rows: scores, then the running softmax's update.
class Softmax {
 public:
  Softmax(const Attention& a, int64_t n)
      : block_((a.block + kLanes - 1) / kLanes * kLanes),
        scores_(n * block_), top_(n, std::numeric_limits<float>::lowest()),
        total_(n, 0.0f) {
    for (int64_t r = 0; r < n; ++r) rows_.push_back(&scores_[r * block_]);
  }

  void Sink(int64_t row, float logit) { top_[row] = logit, total_[row] = 1; }
  int64_t block() const { return block_; }
  float* const* scores() { return rows_.data(); }
  const float* const* weights() const { return rows_.data(); }
  float total(int64_t row) const { return std::max(total_[row], 1e-30f); }

  // Lanes [from, to) are seen. Turns a row's scores into weights; returns
  // what the row's sums so far are to be multiplied by.
  float Update(int64_t row, int64_t from, int64_t to) {
    float* s = rows_[row];
    const float none = -std::numeric_limits<float>::infinity();
    std::fill(s, s + from, none);
    std::fill(s + to, s + block_, none);
    Vector most = Vector{} + top_[row], sum{};
    for (int64_t i = 0; i < block_; i += kLanes) most = Max(most, Load(s + i));
    float top = most[0];
    for (int i = 1; i < kLanes; ++i) top = std::max(top, most[i]);
    for (int64_t i = 0; i < block_; i += kLanes) {
      const Vector p = Exp(Load(s + i) - top);
      Store(s + i, p);
      sum += p;
    }
    float parts[kLanes];
    Store(parts, sum);
    for (int n = kLanes / 2; n; n /= 2)
      for (int i = 0; i < n; ++i) parts[i] += parts[i + n];
    const float keep = Exp(Vector{} + (top_[row] - top))[0];
    total_[row] = total_[row] * keep + parts[0];
    top_[row] = top;
    return keep;
  }

 private:
  const int64_t block_;
  std::vector<float> scores_, top_, total_;
  std::vector<float*> rows_;
};

// Queries [begin, end) of a sequence, and the heads that share one KV head.
inline void AttendTile(const Attention& a, const Sequence& s, int64_t head,
                       int64_t begin, int64_t end) {
  const int64_t group = a.heads / a.kv_heads, v = a.value;
  const int64_t live = std::min(end, s.length);
  for (int64_t i = std::max(begin, live); i < end; ++i)
    std::fill_n(s.out + (i * a.heads + head * group) * v, group * v, 0.0f);
  const int64_t n = (live - begin) * group;
  if (n <= 0) return;
  Softmax softmax(a, n);
  std::vector<const float*> q(n);
  std::vector<float*> out(n);
  for (int64_t r = 0; r < n; ++r) {
    const int64_t h = head * group + r % group;
    const int64_t at = (begin + r / group) * a.heads + h;
    q[r] = s.q + at * a.width, out[r] = s.out + at * v;
    std::fill_n(out[r], v, 0.0f);
    if (a.sinks) softmax.Sink(r, a.sinks[h]);
  }
  const int64_t stride = softmax.block();
  std::vector<float> turned(a.width * stride, 0.0f), key_room, value_room;
  const int64_t last = s.start + live - 1;  // position
  const int64_t seen = a.window ? s.start + begin - a.window + 1 : 0;
  int64_t j = std::max<int64_t>(seen, 0) / a.block;
  for (; j * a.block <= last; ++j) {
    const int64_t from = j * a.block;
    const int64_t count = std::min(a.block, last + 1 - from);
    const Tokens keys = Find(a, s, head, from, count, key_room);
    Turn(keys, count, a.width, turned.data(), stride);
    // A latent is its own value; otherwise values lie behind the keys.
    const Tokens values =
        a.latent ? keys
                 : Find(a, s, a.kv_heads + head, from, count, value_room);
    Multiply(n, q.data(), turned.data(), a.width, stride, true,
             softmax.scores(), 0, stride);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t at = s.start + begin + r / group;
      const int64_t first = a.window ? at - a.window + 1 - from : 0;
      const float keep = softmax.Update(
          r, std::clamp<int64_t>(first, 0, count),
          std::clamp<int64_t>(at + 1 - from, 0, count));
      for (int64_t c = 0; c < v; ++c) out[r][c] *= keep;
    }
    Multiply(n, softmax.weights(), values.first, count, values.stride, false,
             out.data(), 0, v);
  }
  for (int64_t r = 0; r < n; ++r)
    for (int64_t c = 0; c < v; ++c) out[r][c] /= softmax.total(r);
}

}  // namespace rmoe

#endif  // RESILIENT_MOE_MODEL_NATIVE_ATTENTION_H_
