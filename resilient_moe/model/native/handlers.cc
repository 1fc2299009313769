// The kernels as XLA sees them; shapes are in `kernels.py`.

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "attention.h"
#include "threads.h"
#include "tile.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
using Result = ffi::ResultBuffer<ffi::F32>;

int64_t Count(const Integers& x) { return x.element_count(); }

template <typename T>
int64_t Size(const std::vector<T>& x) {
  return x.size();
}

// The rows of one matrix.
struct Group {
  int64_t slot;
  std::vector<int64_t> row;  // of the result
  std::vector<const float*> x;
  std::vector<float*> y;
};

// Rows by slot, slots ascending; none of those whose slot isn't held.
std::vector<Group> BySlot(const Integers& slot, int64_t slots) {
  std::vector<Group> all(slots), used;
  for (int64_t i = 0; i < Count(slot); ++i) {
    const int64_t s = slot.typed_data()[i];
    if (s >= 0 && s < slots) all[s].row.push_back(i);
  }
  for (int64_t s = 0; s < slots; ++s)
    if (!all[s].row.empty()) {
      all[s].slot = s;
      used.push_back(std::move(all[s]));
    }
  return used;
}

// What `rows` times matrices of `size` take, in multiply-adds: reading an
// element of a matrix takes as long as some four.
int64_t Cost(int64_t rows, int64_t matrices, int64_t size) {
  return (rows + 4 * matrices) * size;
}

// Runs work(group, begin, end) for pieces of the columns of every group.
template <typename Work>
void ByColumns(ffi::ThreadPool& pool, int64_t cost, int64_t groups,
               int64_t width, const Work& work) {
  const int64_t piece = rmoe::Piece(width, groups, pool.num_threads());
  const int64_t pieces = (width + piece - 1) / piece;
  rmoe::Parallel(pool, cost, groups * pieces, [&](int64_t i) {
    const int64_t begin = i % pieces * piece;
    work(i / pieces, begin, std::min(width, begin + piece));
  });
}

// y[i] = x[i] @ w[slot[i]]; zero where there is no such slot.
ffi::Error GroupedMatmul(ffi::ThreadPool pool, Floats x, Floats w,
                         Integers slot, Result y) {
  const auto shape = w.dimensions();
  const int64_t depth = shape[1], width = shape[2], size = depth * width;
  std::vector<Group> groups = BySlot(slot, shape[0]);
  int64_t given = 0;
  for (Group& g : groups)
    for (int64_t i : g.row) {
      g.x.push_back(x.typed_data() + i * depth);
      g.y.push_back(y->typed_data() + i * width);
      ++given;
    }
  if (given < Count(slot))
    std::fill_n(y->typed_data(), y->element_count(), 0.0f);
  const auto multiply = [&](int64_t i, int64_t begin, int64_t end) {
    const Group& g = groups[i];
    rmoe::Multiply(g.x.size(), g.x.data(), w.typed_data() + g.slot * size,
                   depth, width, true, g.y.data(), begin, end);
  };
  ByColumns(pool, Cost(given, groups.size(), size), groups.size(), width,
            multiply);
  return ffi::Error::Success();
}

// The gated activation: SwiGLU, or gpt-oss's clamped one if there is a limit.
rmoe::Vector Gated(rmoe::Vector gate, rmoe::Vector up, float limit,
                   float alpha) {
  using rmoe::Vector;
  if (limit > 0) {  // its up projection is biased by one
    gate = gate > limit ? Vector{} + limit : gate;
    up = up > limit ? Vector{} + limit : up;
    up = (up < -limit ? Vector{} - limit : up) + 1.0f;
  }
  return up * (gate / (1.0f + rmoe::Exp(gate * -alpha)));
}

void Activate(const float* gate, const float* up, float* out, int64_t n,
              float limit, float alpha) {
  int64_t i = 0;
  for (; i + rmoe::kLanes <= n; i += rmoe::kLanes)
    rmoe::Store(out + i, Gated(rmoe::Load(gate + i), rmoe::Load(up + i), limit,
                               alpha));
  if (i == n) return;
  rmoe::Vector g{}, u{};
  std::memcpy(&g, gate + i, (n - i) * sizeof(float));
  std::memcpy(&u, up + i, (n - i) * sizeof(float));
  const rmoe::Vector y = Gated(g, u, limit, alpha);
  std::memcpy(out + i, &y, (n - i) * sizeof(float));
}

void AddBias(const std::vector<float*>& rows, const float* bias,
             int64_t begin, int64_t end) {
  for (float* y : rows)
    for (int64_t c = begin; c < end; ++c) y[c] += bias[c];
}

// XLA's own code would take the last one that there is; here memory behind it
// would be read.
ffi::Error Outside(const char* what, int64_t value, int64_t most) {
  return ffi::Error(ffi::ErrorCode::kOutOfRange,
                    std::string(what) + "=" + std::to_string(value) +
                        ": from 0 to " + std::to_string(most));
}

// Gated MLPs of the experts: gate and up projection, activation, down.
ffi::Error Experts(ffi::ThreadPool pool, Floats x, Integers token,
                   Integers slot, Integers layer, Floats gate_up, Floats down,
                   Floats gate_up_bias, Floats down_bias, float limit,
                   float alpha, Result y) {
  const auto shape = down.dimensions();  // [L, S, F, D]
  const int64_t slots = shape[1], f = shape[2], d = shape[3];
  const int64_t tokens = x.dimensions()[0];
  const int64_t number = layer.typed_data()[0];
  if (number < 0 || number >= shape[0])
    return Outside("layer", number, shape[0] - 1);
  const int64_t first = number * slots;
  const bool biased = gate_up_bias.element_count() > 0;
  std::vector<Group> groups = BySlot(slot, slots);
  int64_t rows = 0;
  for (const Group& g : groups) rows += g.row.size();
  // Kept from call to call: fresh memory would be cleared page by page.
  static thread_local std::vector<float> scratch;
  if (Size(scratch) < rows * 3 * f) scratch.resize(rows * 3 * f);
  float* const hidden = scratch.data();
  float* const active = hidden + rows * 2 * f;
  std::vector<std::vector<float*>> to(groups.size()), from(groups.size());
  int64_t at = 0;
  for (size_t i = 0; i < groups.size(); ++i)
    for (int64_t row : groups[i].row) {
      const int64_t t =
          std::clamp<int64_t>(token.typed_data()[row], 0, tokens - 1);
      groups[i].x.push_back(x.typed_data() + t * d);
      groups[i].y.push_back(hidden + at * 2 * f);
      from[i].push_back(active + at * f);
      to[i].push_back(y->typed_data() + row * d);
      ++at;
    }
  if (rows < Count(slot))
    std::fill_n(y->typed_data(), y->element_count(), 0.0f);

  const int64_t cost = Cost(rows, groups.size(), f * d);
  const auto up = [&](int64_t i, int64_t begin, int64_t end) {
    const Group& g = groups[i];
    const float* w = gate_up.typed_data() + (first + g.slot) * d * 2 * f;
    const int64_t starts[] = {begin, f + begin};
    for (int64_t start : starts) {
      const int64_t stop = start + end - begin;
      rmoe::Multiply(g.x.size(), g.x.data(), w, d, 2 * f, true, g.y.data(),
                     start, stop);
      if (biased)
        AddBias(g.y, gate_up_bias.typed_data() + (first + g.slot) * 2 * f,
                start, stop);
    }
    for (size_t r = 0; r < g.y.size(); ++r)
      Activate(g.y[r] + begin, g.y[r] + f + begin, from[i][r] + begin,
               end - begin, limit, alpha);
  };
  ByColumns(pool, 2 * cost, groups.size(), f, up);

  const auto back = [&](int64_t i, int64_t begin, int64_t end) {
    const int64_t slot = first + groups[i].slot;
    rmoe::Multiply(to[i].size(), from[i].data(),
                   down.typed_data() + slot * f * d, f, d, true, to[i].data(),
                   begin, end);
    if (biased)
      AddBias(to[i], down_bias.typed_data() + slot * d, begin, end);
  };
  ByColumns(pool, cost, groups.size(), d, back);
  return ffi::Error::Success();
}

ffi::Error Attend(ffi::ThreadPool pool, Floats q, Floats fresh, Floats cache,
                  Integers layer, Integers first_row, Integers start,
                  Integers length, Floats sinks, Integers window,
                  int64_t latent, int64_t block, Result y) {
  const auto shape = q.dimensions();  // [G, Q, H, w]
  rmoe::Attention a;
  a.queries = shape[1], a.heads = shape[2], a.width = shape[3];
  a.cached_heads = fresh.dimensions()[2];
  a.kv_heads = latent ? 1 : a.cached_heads / 2;
  a.latent = latent > 0, a.value = latent ? latent : a.width;
  a.room = cache.dimensions()[3];
  a.block = block;
  a.window = window.typed_data()[0];
  a.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  const int64_t row_size = a.cached_heads * a.room * a.width;
  const int64_t rows = cache.dimensions()[1];
  const int64_t layers = cache.dimensions()[0], number = layer.typed_data()[0];
  if (rows && (number < 0 || number >= layers))
    return Outside("layer", number, layers - 1);
  for (int64_t g = 0; rows && g < shape[0]; ++g) {
    const int64_t before = start.typed_data()[g];
    if (length.typed_data()[g] > 0 && (before < 0 || before > a.room))
      return Outside("start", before, a.room);
  }
  const int64_t tile = rmoe::QueriesPerTile(a);
  const int64_t tiles = (a.queries + tile - 1) / tile;
  int64_t pairs = 0;  // of a query and a position
  for (int64_t g = 0; g < shape[0]; ++g) {
    const int64_t n = std::max<int64_t>(length.typed_data()[g], 0);
    if (n) pairs += n * (start.typed_data()[g] + n);
  }
  const int64_t cost = pairs * a.heads * (a.width + a.value);
  rmoe::Parallel(pool, cost, shape[0] * a.kv_heads * tiles, [&](int64_t i) {
    const int64_t head = i % a.kv_heads, g = i / a.kv_heads % shape[0];
    // Later queries see more: they go first, so that all threads end together.
    const int64_t t = tiles - 1 - i / a.kv_heads / shape[0];
    rmoe::Sequence s;
    s.q = q.typed_data() + g * a.queries * a.heads * a.width;
    s.fresh = fresh.typed_data() + g * a.queries * a.cached_heads * a.width;
    s.cache = nullptr;
    if (rows) {
      const int64_t row =
          std::clamp<int64_t>(first_row.typed_data()[0] + g, 0, rows - 1);
      s.cache = cache.typed_data() +
                (number * rows + row) * row_size;
    }
    s.start = start.typed_data()[g], s.length = length.typed_data()[g];
    s.out = y->typed_data() + g * a.queries * a.heads * a.value;
    rmoe::AttendTile(a, s, head, t * tile,
                     std::min(a.queries, (t + 1) * tile));
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rmoe_grouped_matmul, GroupedMatmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(rmoe_experts, Experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Attr<float>("limit")
                                  .Attr<float>("alpha")
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(rmoe_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Arg<Integers>()
                                  .Attr<int64_t>("latent")
                                  .Attr<int64_t>("block")
                                  .Ret<Floats>());
