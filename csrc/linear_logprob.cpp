// Log-probs of target tokens from hidden states and the head's weight, on CPUs; logits exist only as tiles in cache.
//
// hidden X (R, D), weight W (V, D), target t (R,). A tile is kVocab tokens by kRows rows, tokens outermost: a vector
// holds 16 rows of one token, and the row pass needs no horizontal sums.
//
//   z[v,r]  = softcap(scale * (W X^T + bias))                              product 1, in float32
//   e[v,r]  = exp(z[v,r] - ref[r]), 0 for v = t[r]        ref[r] = z[t[r],r], computed beforehand
//   s[r]    = sum_v e[v,r]                                logp[r] = -log(1 + s[r])
//   E[v,r]  = e * dz                                      rounded to the input dtype; dz the slope of softcap and scale
//   dX[r]   = g[r] * (q[r] W[t[r]] - f[r] (E^T W)[r])                      product 2;  f = 1 / (1 + s), q = s f dz[t]
//   dW[v]   = E[v] (-g f X) + sum over the rows r with t[r] = v of g q X   product 3
//
// The target's own logit as reference lets the sum run in any order with nothing to rescale, and 1 - p = s f has no
// cancellation. What depends on a row is a factor, so E can be kept whatever the upstream gradient g is. Where a logit
// exceeds its row's reference by more than kHeadroom, references are raised to the maximum and the sweep runs again.
//
// forward: in parallel the tasks, each a range of tiles that stays in cache and a group of row blocks, which share W as
// packed for product 2. Block after block, and tile after tile, product 1 and the row pass, after each chunk of tiles
// product 2; then, in the order of ranges, the block's sums are added to those of its rows. It keeps E in the memory
// that will be dW, whose rows hold D rows of E, and in `extra`. backward: in parallel the tiles of tokens, product 3
// with E as kept or recomputed; a slice of dW is written once, over the E that it came from. Every sum has one order,
// so results do not depend on the number of threads.
//
// Memory: dW (V, D); extra (V, extra_rows); X packed; dX / g (R, D) in float32; for each thread a chunk of E, a range
// of W packed and the sums of a block (rows, D), in cache. Bytes moved: W once for each row block, mostly from cache, E
// once. FLOPs: 2RDV a product: 3 for a full backward and 1 for each row of E that was not kept, 2 for a frozen head, 1
// for log-probs.
#include <Python.h>

#include <ATen/Parallel.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <numeric>
#include <tuple>
#include <vector>

#include "head.h"

namespace {

using namespace stepdpo;

constexpr int64_t kRange = 6;  // tiles of a task of forward: W as it is and packed, 3 MB for D = 896 in bfloat16
constexpr int64_t kChunk = 2;  // tiles between products 1 and 2
constexpr int64_t kGroup = 8;  // row blocks of a task, at most: they share W as packed
constexpr int64_t kBlocks = 4;  // row blocks whose E is at hand in backward
constexpr float kHeadroom = 40.f;  // e^40, its sum over a vocabulary and the inverse are far inside float32

// f(take) on every thread of torch's pool; take() returns the next of 0..n-1, then n, so that nobody waits for a slow
// thread but at the end.
template <typename Function>
void for_each_task(int64_t n, const Function& f) {
  std::atomic<int64_t> next{0};
  const auto take = [&] { return std::min(n, next.fetch_add(1)); };
  at::parallel_for(0, std::min<int64_t>(n, at::get_num_threads()), 1, [&](int64_t, int64_t) { f(take); });
}

// Lets the ranges of the vocabulary add to the sums of a block of rows one after the other, whoever computes them.
// Tasks are taken in order, so the range that is waited for is done or in work.
struct Turns {
  std::vector<int64_t> next;  // range, for each block
  bool failed = false;
  std::mutex mutex;
  std::condition_variable moved;

  // False where another thread has failed: it will say why.
  bool wait(int64_t block, int64_t range) {
    std::unique_lock<std::mutex> lock(mutex);
    moved.wait(lock, [&] { return failed || next[block] == range; });
    return !failed;
  }
  void pass(int64_t block) {
    const std::lock_guard<std::mutex> lock(mutex);
    next[block]++;
    moved.notify_all();
  }
  void fail() {
    const std::lock_guard<std::mutex> lock(mutex);
    failed = true;
    moved.notify_all();
  }
};

// Some blocks of rows over the whole vocabulary. A task is a group of blocks and a range of tiles.
template <typename T>
struct Sweep {
  const Head<T>& h;
  const std::vector<int64_t>& blocks;
  double* sum;  // (R,) of the row pass
  float* top;  // (R,) maxima of z - ref
  T *dw, *extra;  // where E is kept, or null
  int64_t extra_rows;
  float* product;  // (R, D) E^T W, or null

  const int64_t ranges = ceil_div(h.tiles, kRange), count = blocks.size();
  // Fewer where threads would be idle.
  const int64_t group = std::clamp<int64_t>(count * ranges / (4 * at::get_num_threads()), 1, kGroup);
  const int64_t groups = ceil_div(count, group), packed_tiles = group > 1 ? kRange : kChunk;
  Turns turns{std::vector<int64_t>(h.row_blocks)};

  void run() {
    for_each_task(ranges * groups, [&](const auto& take) {
      try {
        work(take);
      } catch (...) {
        turns.fail();
        throw;
      }
      h.products_done();
    });
  }

  template <typename Take>
  void work(const Take& take) {
    const int64_t w_size = h.all_columns * kVocab, e_size = kRows * kVocab;
    const Tensor floats = buffer<float>(h.scratch + 3 * kRows + (product ? kRows * h.ld : 0));
    const Tensor operands = buffer<T>(e_size + (product ? kChunk * e_size + packed_tiles * w_size : 0));
    float *z = floats.data_ptr<float>(), *part = z + h.scratch, *part_top = part + kRows;
    float *tops = part_top + kRows, *acc = tops + kRows;  // acc: E^T W of a block and the range, (rows, ld)
    T *not_kept = operands.data_ptr<T>(), *by_row = not_kept + e_size, *packed = by_row + kChunk * e_size;
    std::vector<double> sums(kRows);
    for (int64_t id = take(); id < ranges * groups; id = take()) {
      const int64_t range = id / groups, begin = id % groups * group;
      const int64_t last = std::min((range + 1) * kRange, h.tiles);
      for (int64_t member = begin; member < std::min(begin + group, count); member++) {
        const int64_t block = blocks[member], first_row = block * kRows, rows = h.rows_of(block);
        std::fill(sums.begin(), sums.end(), 0.);
        std::fill_n(tops, rows, -kInfinity);
        for (int64_t first = range * kRange; first < last; first += kChunk) {
          const int64_t n = std::min(kChunk, last - first);
          T* w = packed + (group > 1 ? first - range * kRange : 0) * w_size;
          for (int64_t i = 0; i < n; i++) {
            T *keep = h.kept(dw, extra, extra_rows, first + i, block), *e = keep ? keep : not_kept;
            h.tile(first + i, block, z, part, part_top, e, product ? by_row + i * e_size : nullptr);
            for (int64_t r = 0; r < rows; r++) {
              sums[r] += part[r];
              tops[r] = std::max(tops[r], part_top[r]);
            }
            if (product && member == begin) h.pack_weight(first + i, w + i * w_size);
          }
          for (int64_t column = 0; product && column < h.D; column += h.columns)
            for (int64_t i = 0; i < n; i++) {
              h.product(rows, std::min(h.columns, h.D - column), round_up(h.tokens_of(first + i), h.pair),
                        by_row + i * e_size, kVocab, w + i * w_size + column * kVocab, h.columns, acc + column, h.ld,
                        first + i > range * kRange);
            }
        }
        if (!turns.wait(block, range)) return;
        for (int64_t r = 0; r < std::min(rows, h.R - first_row); r++) {
          const int64_t to = first_row + r;
          sum[to] = sums[r] + (range ? sum[to] : 0.);
          top[to] = std::max(tops[r], range ? top[to] : -kInfinity);
          if (!product) continue;
          if (range) {
            add_to(acc + r * h.ld, h.D, product + to * h.D);
          } else {
            std::copy_n(acc + r * h.ld, h.D, product + to * h.D);
          }
        }
        turns.pass(block);
      }
    }
  }
};

// -> logp (R,), row (3, R): ref, f and q, dX / g (R, D). Keeps E in `kept` (V, D), the memory of dW, unless null, and
// more of E in `extra` (V * extra_rows,).
template <typename T>
std::tuple<Tensor, Tensor, Tensor> forward(Head<T> h, bool need_hidden, T* kept, T* extra, int64_t extra_rows) {
  const auto options = h.hidden.options().dtype(at::kFloat);
  const Tensor logp = at::empty({h.R}, options), row = at::empty({3, h.R}, options);
  const Tensor d_hidden = at::empty({need_hidden ? h.R : 0, h.D}, options);
  std::vector<std::pair<double, double>> hit(h.R);
  at::parallel_for(0, h.R, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      hit[r] = h.target_logit(r);
      h.ref[r] = std::isfinite(hit[r].first) ? hit[r].first : 0.;
    }
  });
  std::vector<double> sum(h.R);
  std::vector<float> top(h.R);
  float* dx = need_hidden ? d_hidden.data_ptr<float>() : nullptr;
  std::vector<int64_t> blocks(h.row_blocks);
  std::iota(blocks.begin(), blocks.end(), 0);
  const auto run = [&] {
    Sweep<T>{h, blocks, sum.data(), top.data(), kept, extra, extra_rows, dx}.run();
  };
  run();
  blocks.clear();  // those with a row whose reference was too low
  for (int64_t r = 0; r < h.R; r++) {
    if (!(top[r] > kHeadroom)) continue;
    h.ref[r] += top[r];
    if (blocks.empty() || blocks.back() != r / kRows) blocks.push_back(r / kRows);
  }
  if (!blocks.empty()) run();
  float *p = logp.data_ptr<float>(), *ref = row.data_ptr<float>(), *f = ref + h.R, *q = f + h.R;
  at::parallel_for(0, h.R, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const double z = hit[r].first - h.ref[r], total = std::exp(z) + sum[r];
      p[r] = z > -500. ? -std::log1p(sum[r] * std::exp(-z)) : z - std::log(sum[r]);
      ref[r] = h.ref[r];
      f[r] = 1. / total;
      q[r] = sum[r] / total * hit[r].second;
      const T* own = h.w + h.target[r] * h.D;
      for (int64_t d = 0; dx && d < h.D; d++) {
        dx[r * h.D + d] = q[r] * static_cast<float>(own[d]) - f[r] * dx[r * h.D + d];
      }
    }
  });
  return {logp, row, d_hidden};
}

// What becomes of dW: rounded into `dw` (V, D), which may lie over `kept`, with `sums` (V, D) added to it, unless null;
// or without a dw written into sums, or added to them. All null: nobody wants it.
template <typename T>
struct Destination {
  T* dw;
  float* sums;
  bool add;

  bool wanted() const { return dw || sums; }
  void take(float* acc, int64_t at, int64_t n) const {
    if (!dw) {
      if (add) {
        add_to(acc, n, sums + at);
      } else {
        std::copy_n(acc, n, sums + at);
      }
      return;
    }
    if (sums) add_to(sums + at, n, acc);
    round_to(acc, n, dw + at);
  }
};

// `kept` is null if nothing was; -> dbias (V,) or empty.
template <typename T>
Tensor backward(Head<T> h, const float* grad, const float* row, Destination<T> to, T* kept, T* extra,
                int64_t extra_rows, bool need_bias) {
  const bool dw = to.wanted();
  const float *ref = row, *f = ref + h.R, *q = f + h.R;
  std::copy_n(ref, h.R, h.ref.begin());
  std::vector<float> factor(h.padded_rows, 0.f);  // of E
  for (int64_t r = 0; r < h.R; r++) factor[r] = -grad[r] * f[r];
  std::vector<int64_t> by_target(h.R);
  std::iota(by_target.begin(), by_target.end(), 0);
  std::stable_sort(by_target.begin(), by_target.end(), [&](int64_t a, int64_t b) { return h.target[a] < h.target[b]; });
  // factor * X: for each row block and block of columns a right operand (rows, columns).
  const Tensor scaled_x = buffer<T>(dw ? h.padded_rows * h.all_columns : 0);
  T* scaled = scaled_x.data_ptr<T>();
  at::parallel_for(0, dw ? h.row_blocks : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin * kRows; r < std::min(end * kRows, h.padded_rows); r++) {
      const int64_t first = r / kRows * kRows, rows = h.rows_of(r / kRows);
      for (int64_t d = 0; d < h.D; d++) {
        T* right = scaled + first * h.all_columns + d / h.columns * h.columns * rows;
        right[h.at_right(r - first, d % h.columns, h.columns)] = r < h.R ? factor[r] * h.x[r * h.D + d] : 0.f;
      }
    }
  });
  const Tensor d_bias = at::empty({need_bias ? h.V : 0}, h.hidden.options().dtype(at::kFloat));
  for_each_task(h.tiles, [&](const auto& take) {
    const Tensor floats = buffer<float>(h.scratch + kVocab * h.ld + 2 * kRows);
    const Tensor es = buffer<T>(kBlocks * kVocab * kRows);
    float *z = floats.data_ptr<float>(), *acc = z + h.scratch, *ignored = acc + kVocab * h.ld;  // acc: dW, (kVocab, ld)
    std::vector<double> db(kVocab);
    T* e[kBlocks];
    for (int64_t tile = take(); tile < h.tiles; tile = take()) {
      const int64_t tokens = h.tokens_of(tile), first = tile * kVocab;
      std::fill(db.begin(), db.end(), 0.);
      if (!h.R) std::fill_n(acc, kVocab * h.ld, 0.f);
      for (int64_t block = 0; block < h.row_blocks; block += kBlocks) {
        const int64_t blocks = std::min(kBlocks, h.row_blocks - block);
        for (int64_t i = 0; i < blocks; i++) {
          e[i] = h.kept(kept, extra, extra_rows, tile, block + i);
          if (e[i]) continue;
          e[i] = es.data_ptr<T>() + i * kVocab * kRows;
          h.tile(tile, block + i, z, ignored, ignored + kRows, e[i], nullptr);
        }
        for (int64_t b = 0; dw && b < h.column_blocks; b++)
          for (int64_t i = 0; i < blocks; i++) {
            const int64_t rows = h.rows_of(block + i), column = b * h.columns;
            h.product(tokens, h.columns_of(b), rows, e[i], rows,
                      scaled + (block + i) * kRows * h.all_columns + column * rows, h.columns, acc + column, h.ld,
                      block + i > 0);
          }
        for (int64_t i = 0; need_bias && i < blocks; i++)
          for (int64_t v = 0; v < tokens; v++) {
            const int64_t rows = h.rows_of(block + i);
            float sums[kLanes] = {};
            for (int64_t r = 0; r < rows; r++) {
              sums[r % kLanes] += factor[(block + i) * kRows + r] * static_cast<float>(e[i][v * rows + r]);
            }
            db[v] += std::accumulate(sums, sums + kLanes, 0.f);
          }
      }
      auto hit = std::lower_bound(by_target.begin(), by_target.end(), first,
                                  [&](int64_t r, int64_t v) { return h.target[r] < v; });
      for (; hit != by_target.end() && h.target[*hit] < first + tokens; hit++) {
        const int64_t v = h.target[*hit] - first;
        const float own = grad[*hit] * q[*hit];
        db[v] += own;
        for (int64_t d = 0; dw && d < h.D; d++) acc[v * h.ld + d] += own * static_cast<float>(h.x[*hit * h.D + d]);
      }
      for (int64_t v = 0; dw && v < tokens; v++) to.take(acc + v * h.ld, (first + v) * h.D, h.D);
      if (need_bias) std::copy_n(db.begin(), tokens, d_bias.data_ptr<float>() + first);
    }
    h.products_done();
  });
  return d_bias;
}

void check(const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
           int64_t extra_rows) {
  const auto type = hidden.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "hidden must be float32 or bfloat16, got ", type);
  TORCH_CHECK(weight.scalar_type() == type, "weight is ", weight.scalar_type(), " and hidden is ", type);
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && hidden.size(1) > 0,
              "hidden must be (R, D) and weight (V, D), got ", hidden.sizes(), " and ", weight.sizes());
  const int64_t rows = hidden.size(0), vocabulary = weight.size(0);
  TORCH_CHECK(vocabulary <= std::numeric_limits<int32_t>::max(), "the vocabulary has more than 2^31 - 1 tokens");
  TORCH_CHECK(target.dim() == 1 && target.size(0) == rows && target.scalar_type() == at::kLong, "target must be (",
              rows, ",) int64, got ", target.sizes(), " ", target.scalar_type());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == vocabulary), "bias must be (", vocabulary, ",)");
  TORCH_CHECK(extra_rows >= 0 && extra_rows <= round_up(rows, kLanes), "extra_rows is ", extra_rows);
  if (!rows) return;
  const auto [low, high] = target.aminmax();
  TORCH_CHECK(low.item<int64_t>() >= 0 && high.item<int64_t>() < vocabulary, "target holds ", low.item<int64_t>(), "..",
              high.item<int64_t>(), ", outside the vocabulary 0..", vocabulary - 1);
}

void check_kept(const Tensor& hidden, const Tensor& weight, std::initializer_list<Tensor> tensors) {
  for (const Tensor& t : tensors) {
    TORCH_CHECK(t.scalar_type() == hidden.scalar_type() && t.is_contiguous() &&
                    (t.dim() == 1 || !t.numel() || t.sizes() == weight.sizes()),
                "kept and extra must be what forward returned");
  }
}

int64_t rows_of_extra(const Tensor& extra, const Tensor& weight) {
  return weight.size(0) ? extra.numel() / weight.size(0) : 0;
}

std::tuple<Tensor, Tensor, Tensor> forward_into(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                                                const OptionalTensor& bias, std::optional<double> softcap,
                                                std::optional<double> scale, bool need_hidden, const Tensor& kept,
                                                const Tensor& extra) {
  const int64_t extra_rows = rows_of_extra(extra, weight);
  check(hidden, weight, target, bias, extra_rows);
  check_kept(hidden, weight, {kept, extra});
  const auto run = [&]<typename T>(const Head<T>& head) {
    return forward(head, need_hidden, kept.numel() ? kept.data_ptr<T>() : nullptr, extra.data_ptr<T>(), extra_rows);
  };
  if (hidden.scalar_type() == at::kFloat) return run(Head<float>(hidden, weight, target, bias, softcap, scale));
  return run(Head<BFloat16>(hidden, weight, target, bias, softcap, scale));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_op(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    std::optional<double> softcap, std::optional<double> scale, bool need_hidden, bool need_weight, int64_t extra_rows,
    bool /*overwrite: for the backward of autograd*/) {
  const Tensor kept = at::empty({need_weight ? weight.size(0) : 0, weight.size(1)}, weight.options());
  const Tensor extra = at::empty({weight.size(0) * extra_rows}, weight.options());
  const auto [logp, row, d_hidden] =
      forward_into(hidden, weight, target, bias, softcap, scale, need_hidden, kept, extra);
  return {logp, row, d_hidden, kept, extra};
}

Tensor backward_into(const Tensor& dw, const OptionalTensor& sums, bool add, const Tensor& grad, const Tensor& row,
                     const Tensor& kept, const Tensor& extra, const Tensor& hidden, const Tensor& weight,
                     const Tensor& target, const OptionalTensor& bias, std::optional<double> softcap,
                     std::optional<double> scale, bool need_bias) {
  const int64_t rows = hidden.size(0), extra_rows = rows_of_extra(extra, weight);
  check(hidden, weight, target, bias, extra_rows);
  TORCH_CHECK(!sums || (sums->sizes() == weight.sizes() && sums->scalar_type() == at::kFloat && sums->is_contiguous()),
              "sums must be float32 of the shape of weight");
  TORCH_CHECK(grad.dim() == 1 && grad.size(0) == rows && grad.scalar_type() == at::kFloat, "grad must be (", rows,
              ",) float32");
  TORCH_CHECK(row.numel() == 3 * rows && row.is_contiguous() && row.scalar_type() == at::kFloat, "row must be (3, ",
              rows, ") float32");
  check_kept(hidden, weight, {kept, extra, dw});
  const Tensor g = grad.contiguous();
  const auto run = [&]<typename T>(const Head<T>& head) {
    const Destination<T> to{dw.numel() ? dw.data_ptr<T>() : nullptr, sums ? sums->data_ptr<float>() : nullptr, add};
    return backward(head, g.const_data_ptr<float>(), row.const_data_ptr<float>(), to,
                    kept.numel() ? kept.data_ptr<T>() : nullptr, extra.data_ptr<T>(), extra_rows, need_bias);
  };
  if (hidden.scalar_type() == at::kFloat) return run(Head<float>(hidden, weight, target, bias, softcap, scale));
  return run(Head<BFloat16>(hidden, weight, target, bias, softcap, scale));
}

std::tuple<Tensor, Tensor> backward_op(
    const Tensor& grad, const Tensor& row, const Tensor& kept, const Tensor& extra, const Tensor& hidden,
    const Tensor& weight, const Tensor& target, const OptionalTensor& bias, std::optional<double> softcap,
    std::optional<double> scale, bool need_weight, bool need_bias) {
  const Tensor dw = at::empty({need_weight ? weight.size(0) : 0, weight.size(1)}, weight.options());
  const Tensor db = backward_into(dw, std::nullopt, false, grad, row, kept, extra, hidden, weight, target, bias,
                                  softcap, scale, need_bias);
  return {dw, db};
}

Tensor backward_in_place_op(
    const Tensor& grad, const Tensor& row, const Tensor& kept, const Tensor& extra, const Tensor& hidden,
    const Tensor& weight, const Tensor& target, const OptionalTensor& bias, std::optional<double> softcap,
    std::optional<double> scale, const OptionalTensor& sums, bool need_bias) {
  return backward_into(kept, sums, false, grad, row, kept, extra, hidden, weight, target, bias, softcap, scale,
                       need_bias);
}

Tensor backward_to_sums_op(
    const Tensor& grad, const Tensor& row, const Tensor& kept, const Tensor& extra, const Tensor& hidden,
    const Tensor& weight, const Tensor& target, const OptionalTensor& bias, std::optional<double> softcap,
    std::optional<double> scale, const Tensor& sums, bool add, bool need_bias) {
  const Tensor no_dw = at::empty({0, weight.size(1)}, weight.options());
  return backward_into(no_dw, sums, add, grad, row, kept, extra, hidden, weight, target, bias, softcap, scale,
                       need_bias);
}

TORCH_LIBRARY(stepdpo_kernels, m) {
  m.def(
      "linear_logprob_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float? softcap, "
      "float? logit_scale, bool need_hidden, bool need_weight, int extra_rows, bool overwrite) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(  // keeps E in memory that is there already
      "linear_logprob_forward_(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float? softcap, "
      "float? logit_scale, bool need_hidden, Tensor(a!) kept, Tensor(b!) extra) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprob_backward(Tensor grad, Tensor row, Tensor kept, Tensor extra, Tensor hidden, Tensor weight, "
      "Tensor target, Tensor? bias, float? softcap, float? logit_scale, bool need_weight, bool need_bias) "
      "-> (Tensor, Tensor)");
  m.def(  // leaves dW, with sums added to it, in `kept`
      "linear_logprob_backward_(Tensor grad, Tensor row, Tensor(a!) kept, Tensor extra, Tensor hidden, Tensor weight, "
      "Tensor target, Tensor? bias, float? softcap, float? logit_scale, Tensor? sums, bool need_bias) -> Tensor");
  m.def(  // writes dW into `sums`, or adds it to them
      "linear_logprob_backward_to_sums_(Tensor grad, Tensor row, Tensor kept, Tensor extra, Tensor hidden, "
      "Tensor weight, Tensor target, Tensor? bias, float? softcap, float? logit_scale, Tensor(a!) sums, bool add, "
      "bool need_bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(stepdpo_kernels, CPU, m) {
  m.impl("linear_logprob_forward", &forward_op);
  m.impl("linear_logprob_forward_", &forward_into);
  m.impl("linear_logprob_backward", &backward_op);
  m.impl("linear_logprob_backward_", &backward_in_place_op);
  m.impl("linear_logprob_backward_to_sums_", &backward_to_sums_op);
}

}  // namespace

// `import stepdpo_kernels._C` registers the operators; the module itself says only what torch it was built against.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module) PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION);
  return module;
}
