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
// forward: by chunks of tokens, all tiles of a chunk in parallel: product 1, row pass; then blocks of dX / g in parallel.
// backward: all token tiles in parallel, E kept by forward or recomputed; each slice of dW is written once. Every sum
// has one order, so results do not depend on the number of threads.
//
// Memory: X packed, float32 dX / g (R, D); E and W of a chunk, kChunkBytes; the E that is kept, (kept_tiles * kVocab, R);
// a thread's float32 dW of a tile. Bytes moved: W once a product; E once a product. FLOPs: 2RDV a product, of which a
// full backward takes 3 with E kept and 4 without, a frozen head 2, log-probs alone 1.
#include <Python.h>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "tile.h"

namespace {

namespace cpublas = at::native::cpublas;
using at::BFloat16;
using at::Tensor;

constexpr int64_t kVocab = 128;    // tokens of a tile; VOCAB_TILE in cpu_kernel.py
constexpr int64_t kRows = 128;     // rows of a tile
constexpr int64_t kColumns = 256;  // of D, in a block of W or X that is the right operand of a product, at most
constexpr int64_t kDepth = 256;    // of D, that product 1 sums at a time: partial sums for accuracy, and cache
constexpr int64_t kChunkBytes = 16 << 20;
constexpr float kHeadroom = 40.f;  // e^40 times a vocabulary, squared, is inside float32
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <typename T>
constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;

// Whether ATen's brgemm (oneDNN: AMX, AVX-512, AVX2) works for T here: a product with a known result is tried once.
template <typename T>
bool brgemm_works() {
  static const bool works = [] {
    constexpr int64_t m = 3, n = 16, k = 4;
    std::vector<T> a(m * k), b(k * n);
    std::vector<float> c(m * n);
    for (int64_t i = 0; i < m * k; i++) a[i] = static_cast<float>(i - 5);
    for (int64_t p = 0; p < k; p++)
      for (int64_t j = 0; j < n; j++) b[kIsBFloat16<T> ? (p / 2 * n + j) * 2 + p % 2 : p * n + j] = static_cast<float>(3 * p - j);
    try {
      cpublas::brgemm(m, n, k, k, n, n, false, a.data(), b.data(), c.data(), kIsBFloat16<T>);
      cpublas::brgemm_release(kIsBFloat16<T>);
    } catch (const std::exception&) {
      return false;
    }
    for (int64_t i = 0; i < m; i++)
      for (int64_t j = 0; j < n; j++) {
        int64_t sum = 0;
        for (int64_t p = 0; p < k; p++) sum += (i * k + p - 5) * (3 * p - j);
        if (c[i * n + j] != static_cast<float>(sum)) return false;
      }
    return true;
  }();
  return works && at::globalContext().userEnabledMkldnn();
}

template <typename T>
Tensor buffer(int64_t size) {
  return at::empty({size}, c10::CppTypeToScalarType<T>::value);
}

// The problem, its tiles, and the products on them.
template <typename T>
struct Head {
  const T *x, *w;  // (R, D), (V, D)
  const int64_t R, D, V;
  const Tensor bias;  // (V,) float32, or undefined
  const float scale, softcap;  // softcap 0: none

  const bool brgemm = brgemm_works<T>();
  const int64_t pair = brgemm && kIsBFloat16<T> ? 2 : 1;  // so many k lie side by side in a right operand
  const int64_t tiles = ceil_div(V, kVocab);
  const int64_t row_blocks = ceil_div(R, kRows), padded_rows = round_up(R, stepdpo::kLanes);
  const int64_t column_blocks = ceil_div(D, kColumns), columns = round_up(ceil_div(D, column_blocks), 16);
  const int64_t padded_d = round_up(D, pair);

  std::vector<float> ref = std::vector<float>(padded_rows, kInfinity);  // where padded, so that e is 0 there
  std::vector<int32_t> target = std::vector<int32_t>(padded_rows, -1);
  Tensor x_packed = buffer<T>(padded_rows * padded_d);  // X^T: a right operand (D, rows) for each block of rows

  Head(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& bias_,
       std::optional<double> softcap_, std::optional<double> scale_)
      : x(hidden.const_data_ptr<T>()), w(weight.const_data_ptr<T>()), R(hidden.size(0)), D(hidden.size(1)), V(weight.size(0)),
        bias(bias_ ? bias_->to(at::kFloat).contiguous() : Tensor()), scale(scale_.value_or(1.)), softcap(softcap_.value_or(0.)) {
    std::copy_n(targets.const_data_ptr<int64_t>(), R, target.begin());
    T* packed = x_packed.data_ptr<T>();
    at::parallel_for(0, row_blocks, 1, [&](int64_t begin, int64_t end) {
      std::fill_n(packed + begin * kRows * padded_d, (std::min(end * kRows, padded_rows) - begin * kRows) * padded_d, T(0.f));
      for (int64_t r = begin * kRows; r < std::min(end * kRows, R); r++) {
        T* block = packed + r / kRows * kRows * padded_d;
        for (int64_t d = 0; d < D; d++) block[in_right(d, r % kRows, rows_of(r / kRows))] = x[r * D + d];
      }
    });
  }

  int64_t tokens_of(int64_t tile) const { return std::min(kVocab, V - tile * kVocab); }
  int64_t rows_of(int64_t block) const { return std::min(kRows, padded_rows - block * kRows); }
  int64_t columns_of(int64_t block) const { return std::min(columns, D - block * columns); }
  const float* bias_of(int64_t token) const { return bias.defined() ? bias.const_data_ptr<float>() + token : nullptr; }
  // Where (k, n) of a packed right operand with n of `width` is.
  int64_t in_right(int64_t k, int64_t n, int64_t width) const { return (k / pair * width + n) * pair + k % pair; }

  // C (m, n) = A (m, k) B (k, n), or +=; B packed, k a multiple of `pair`.
  void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, float* c, int64_t ldc, bool add) const {
    if (brgemm) {
      cpublas::brgemm(m, n, k, lda, n, ldc, add, a, b, c, kIsBFloat16<T>);
    } else {
      stepdpo::product(m, n, k, a, lda, b, c, ldc, add);
    }
  }
  // For every thread that called product, before it leaves.
  void products_done() const {
    if (brgemm) cpublas::brgemm_release(kIsBFloat16<T>);
  }

  // W of a tile as right operands (tokens, columns), one for each block of columns, kVocab * columns apart.
  void pack_weight(int64_t tile, T* to) const {
    const std::vector<T> zeros(columns);
    for (int64_t b = 0; b < column_blocks; b++, to += kVocab * columns) {
      const int64_t n = columns_of(b);
      for (int64_t v = 0; v < tokens_of(tile); v += pair) {
        const T* row = w + (tile * kVocab + v) * D + b * columns;
        if constexpr (kIsBFloat16<T>) {
          if (pair == 2) {
            stepdpo::interleave(row, v + 1 < tokens_of(tile) ? row + D : zeros.data(), n, to + v * n);
            continue;
          }
        }
        std::memcpy(to + v * n, row, n * sizeof(T));
      }
    }
  }

  // Product 1 and row pass of one tile. z: scratch (kVocab, kRows + padded_d). e: (tokens, rows). by_row: (rows, kVocab) or null.
  void tile(int64_t tile, int64_t block, float* z, float* sum, float* top, T* e, T* by_row) const {
    const int64_t tokens = tokens_of(tile), rows = rows_of(block);
    const T* a = w + tile * kVocab * D;
    if (padded_d != D) {  // an odd D: rows of W get a zero
      T* padded = reinterpret_cast<T*>(z + kVocab * kRows);
      for (int64_t v = 0; v < tokens; v++) {
        std::memcpy(padded + v * padded_d, a + v * D, D * sizeof(T));
        padded[v * padded_d + D] = T(0.f);
      }
      a = padded;
    }
    const T* b = x_packed.const_data_ptr<T>() + block * kRows * padded_d;
    for (int64_t d = 0; d < padded_d; d += kDepth) {
      product(tokens, rows, std::min(kDepth, padded_d - d), a + d, padded_d, b + d * rows, z, rows, d > 0);
    }
    const int64_t r = block * kRows, v = tile * kVocab;
    stepdpo::row_pass({z, tokens, rows, v, bias_of(v), scale, softcap, ref.data() + r, target.data() + r,
                       sum, top, e, by_row, kVocab});
  }
  int64_t scratch() const { return kVocab * (kRows + padded_d); }

  // The target's logit of row r, and its slope.
  std::pair<double, double> target_logit(int64_t r) const {
    const T *a = x + r * D, *b = w + target[r] * D;
    double z = bias.defined() ? *bias_of(target[r]) : 0.;
    for (int64_t d = 0; d < D; d++) z += static_cast<double>(a[d]) * static_cast<double>(b[d]);
    z *= scale;
    if (softcap == 0.f) return {z, scale};
    const double h = std::tanh(z / softcap);
    return {h * softcap, scale * (1. - h * h)};
  }
};


// Every tile once: sums and maxima (R,) of the row pass; the first tiles' E into `kept`; E^T W (R, D) into `product` or null.
template <typename T>
void sweep(const Head<T>& h, double* sum, float* top, T* kept, int64_t kept_tiles, float* product) {
  const int64_t rows = h.padded_rows, e_size = rows * kVocab, w_size = h.column_blocks * h.columns * kVocab;
  const int64_t chunk = std::clamp<int64_t>(kChunkBytes / (sizeof(T) * (e_size + w_size)), 1, h.tiles);
  const int64_t threads = at::get_num_threads();
  const Tensor scratch = buffer<float>(threads * h.scratch()), parts = buffer<float>(2 * chunk * rows);
  const Tensor e_scratch = buffer<T>(threads * kVocab * kRows);
  const Tensor e_chunk = buffer<T>(product ? chunk * e_size : 0), w_chunk = buffer<T>(product ? chunk * w_size : 0);
  float *z = scratch.data_ptr<float>(), *sums = parts.data_ptr<float>(), *tops = sums + chunk * rows;
  T *e = e_scratch.data_ptr<T>(), *by_row = e_chunk.data_ptr<T>(), *w = w_chunk.data_ptr<T>();
  std::fill_n(sum, rows, 0.);
  std::fill_n(top, rows, -kInfinity);
  for (int64_t first = 0; first < h.tiles; first += chunk) {
    const int64_t n = std::min(chunk, h.tiles - first);
    at::parallel_for(0, n * h.row_blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t thread = at::get_thread_num();
      for (int64_t id = begin; id < end; id++) {
        const int64_t i = id / h.row_blocks, block = id % h.row_blocks, row = block * kRows, tile = first + i;
        h.tile(tile, block, z + thread * h.scratch(), sums + i * rows + row, tops + i * rows + row,
               tile < kept_tiles ? kept + tile * e_size + row * kVocab : e + thread * kVocab * kRows,
               product ? by_row + i * e_size + row * kVocab : nullptr);
        if (product && block == 0) h.pack_weight(tile, w + i * w_size);
      }
      h.products_done();
    });
    for (int64_t i = 0; i < n; i++)
      for (int64_t r = 0; r < rows; r++) {
        sum[r] += sums[i * rows + r];
        top[r] = std::max(top[r], tops[i * rows + r]);
      }
    if (!product) continue;
    at::parallel_for(0, h.row_blocks * h.column_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t id = begin; id < end; id++) {
        const int64_t row = id % h.row_blocks * kRows, b = id / h.row_blocks;
        for (int64_t i = 0; i < n; i++) {
          h.product(std::min(kRows, h.R - row), h.columns_of(b), round_up(h.tokens_of(first + i), h.pair),
                    by_row + i * e_size + row * kVocab, kVocab, w + i * w_size + b * h.columns * kVocab,
                    product + row * h.D + b * h.columns, h.D, first + i > 0);
        }
      }
      h.products_done();
    });
  }
}

// -> logp (R,), row (3, R): ref, f and q, dX / g (R, D) or empty, kept E or empty.
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Head<T> h, bool need_hidden, int64_t kept_tiles) {
  const auto options = at::TensorOptions(at::kFloat);
  Tensor logp = at::empty({h.R}, options), row = at::empty({3, h.R}, options);
  Tensor d_hidden = at::empty({need_hidden ? h.R : 0, need_hidden ? h.D : 0}, options);
  Tensor kept = buffer<T>(kept_tiles * kVocab * h.padded_rows);
  std::vector<std::pair<double, double>> hit(h.R);
  at::parallel_for(0, h.R, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      hit[r] = h.target_logit(r);
      h.ref[r] = std::isfinite(hit[r].first) ? hit[r].first : 0.;
    }
  });
  std::vector<double> sum(h.padded_rows);
  std::vector<float> top(h.padded_rows);
  float* dx = need_hidden ? d_hidden.data_ptr<float>() : nullptr;
  for (bool again = true, first = true; again; first = false) {
    sweep(h, sum.data(), top.data(), kept.data_ptr<T>(), kept_tiles, dx);
    again = false;
    for (int64_t r = 0; first && r < h.R; r++)
      if (top[r] > kHeadroom) {
        h.ref[r] += top[r];
        again = true;
      }
  }
  float *p = logp.data_ptr<float>(), *ref = row.data_ptr<float>(), *f = ref + h.R, *q = f + h.R;
  at::parallel_for(0, h.R, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const double z = hit[r].first - h.ref[r];
      const double total = std::exp(z) + sum[r];
      p[r] = z > -500. ? -std::log1p(sum[r] * std::exp(-z)) : z - std::log(sum[r]);
      ref[r] = h.ref[r];
      f[r] = 1. / total;
      q[r] = sum[r] / total * hit[r].second;
      if (!dx) continue;
      const T* w = h.w + h.target[r] * h.D;
      for (int64_t d = 0; d < h.D; d++) dx[r * h.D + d] = q[r] * static_cast<float>(w[d]) - f[r] * dx[r * h.D + d];
    }
  });
  return {logp, row, d_hidden, kept};
}

// grad (R,) -> dW (V, D) and dbias (V,) float32; empty where not needed.
template <typename T>
std::tuple<Tensor, Tensor> backward(Head<T> h, const float* grad, const float* row, const Tensor& kept, bool need_weight, bool need_bias) {
  const float *ref = row, *f = ref + h.R, *q = f + h.R;
  std::copy_n(ref, h.R, h.ref.begin());
  Tensor d_weight = at::empty({need_weight ? h.V : 0, need_weight ? h.D : 0}, c10::CppTypeToScalarType<T>::value);
  Tensor d_bias = at::empty({need_bias ? h.V : 0}, at::kFloat);
  std::vector<float> factor(h.padded_rows, 0.f);  // of E
  for (int64_t r = 0; r < h.R; r++) factor[r] = -grad[r] * f[r];
  std::vector<int64_t> by_target(h.R);
  std::iota(by_target.begin(), by_target.end(), 0);
  std::stable_sort(by_target.begin(), by_target.end(), [&](int64_t a, int64_t b) { return h.target[a] < h.target[b]; });
  // factor * X: for each block of rows and block of columns a right operand (rows, columns).
  const Tensor scaled_buffer = buffer<T>(need_weight ? h.padded_rows * h.D : 0);
  T* scaled = scaled_buffer.data_ptr<T>();
  at::parallel_for(0, need_weight ? h.padded_rows : 0, kRows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t first = r / kRows * kRows, rows = h.rows_of(r / kRows);
      for (int64_t b = 0; b < h.column_blocks; b++) {
        const int64_t d = b * h.columns;
        for (int64_t i = 0; i < h.columns_of(b); i++) {
          scaled[first * h.D + rows * d + h.in_right(r - first, i, h.columns_of(b))] = r < h.R ? factor[r] * h.x[r * h.D + d + i] : 0.f;
        }
      }
    }
  });
  const int64_t kept_tiles = kept.numel() / (h.padded_rows * kVocab), threads = at::get_num_threads();
  const int64_t per_thread = h.scratch() + kVocab * (h.D + 1) + 2 * kRows;
  const Tensor scratch = buffer<float>(threads * per_thread), e_scratch = buffer<T>(threads * kVocab * kRows);
  at::parallel_for(0, h.tiles, 1, [&](int64_t begin, int64_t end) {
    float* z = scratch.data_ptr<float>() + at::get_thread_num() * per_thread;
    float *dw = z + h.scratch(), *db = dw + kVocab * h.D, *ignored = db + kVocab;
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t tokens = h.tokens_of(tile), first = tile * kVocab;
      std::fill_n(db, tokens, 0.f);
      for (int64_t block = 0; block < h.row_blocks; block++) {
        const int64_t r = block * kRows, rows = h.rows_of(block);
        T* e = e_scratch.data_ptr<T>() + at::get_thread_num() * kVocab * kRows;
        if (tile < kept_tiles) {
          e = kept.data_ptr<T>() + tile * kVocab * h.padded_rows + r * kVocab;
        } else {
          h.tile(tile, block, z, ignored, ignored + kRows, e, nullptr);
        }
        for (int64_t b = 0; need_weight && b < h.column_blocks; b++) {
          const int64_t d = b * h.columns;
          h.product(tokens, h.columns_of(b), rows, e, rows, scaled + r * h.D + rows * d, dw + d, h.D, block > 0);
        }
        for (int64_t v = 0; need_bias && v < tokens; v++)
          for (int64_t i = 0; i < rows; i++) db[v] += factor[r + i] * static_cast<float>(e[v * rows + i]);
      }
      auto at = std::lower_bound(by_target.begin(), by_target.end(), first, [&](int64_t r, int64_t v) { return h.target[r] < v; });
      for (; at != by_target.end() && h.target[*at] < first + tokens; at++) {
        const float own = grad[*at] * q[*at];
        const int64_t v = h.target[*at] - first;
        db[v] += own;
        for (int64_t d = 0; need_weight && d < h.D; d++) dw[v * h.D + d] += own * static_cast<float>(h.x[*at * h.D + d]);
      }
      if (need_weight) std::copy_n(dw, tokens * h.D, d_weight.data_ptr<T>() + first * h.D);
      if (need_bias) std::copy_n(db, tokens, d_bias.data_ptr<float>() + first);
    }
    h.products_done();
  });
  return {d_weight, d_bias};
}

void check(const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias) {
  const auto type = hidden.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "hidden must be float32 or bfloat16, got ", type);
  TORCH_CHECK(weight.scalar_type() == type, "weight is ", weight.scalar_type(), " and hidden is ", type);
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && hidden.size(1) > 0,
              "hidden must be (R, D) and weight (V, D), got ", hidden.sizes(), " and ", weight.sizes());
  TORCH_CHECK(weight.size(0) <= std::numeric_limits<int32_t>::max(), "the vocabulary has more than 2^31 - 1 tokens");
  TORCH_CHECK(target.dim() == 1 && target.size(0) == hidden.size(0) && target.scalar_type() == at::kLong,
              "target must be (", hidden.size(0), ",) int64, got ", target.sizes(), " ", target.scalar_type());
  TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)), "bias must be (", weight.size(0), ",)");
  if (!target.numel()) return;
  const auto [low, high] = target.aminmax();
  TORCH_CHECK(low.item<int64_t>() >= 0 && high.item<int64_t>() < weight.size(0), "target holds ", low.item<int64_t>(), "..",
              high.item<int64_t>(), ", outside the vocabulary 0..", weight.size(0) - 1);
}

template <typename Function>
auto with_head(const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
               std::optional<double> softcap, std::optional<double> scale, const Function& function) {
  check(hidden, weight, target, bias);
  const Tensor x = hidden.contiguous(), w = weight.contiguous(), t = target.contiguous();
  if (x.scalar_type() == at::kFloat) return function(Head<float>(x, w, t, bias, softcap, scale));
  return function(Head<BFloat16>(x, w, t, bias, softcap, scale));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_op(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
    std::optional<double> softcap, std::optional<double> scale, bool need_hidden, int64_t kept_tiles) {
  TORCH_CHECK(kept_tiles >= 0 && kept_tiles <= ceil_div(weight.size(0), kVocab), "kept_tiles out of range: ", kept_tiles);
  return with_head(hidden, weight, target, bias, softcap, scale,
                   [&](auto&& head) { return forward(std::move(head), need_hidden, kept_tiles); });
}

std::tuple<Tensor, Tensor> backward_op(
    const Tensor& grad, const Tensor& row, const Tensor& kept, const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, std::optional<double> softcap, std::optional<double> scale, bool need_weight, bool need_bias) {
  TORCH_CHECK(grad.dim() == 1 && grad.size(0) == hidden.size(0) && grad.scalar_type() == at::kFloat, "grad must be (R,) float32");
  const Tensor g = grad.contiguous();
  return with_head(hidden, weight, target, bias, softcap, scale, [&](auto&& head) {
    return backward(std::move(head), g.const_data_ptr<float>(), row.const_data_ptr<float>(), kept, need_weight, need_bias);
  });
}

TORCH_LIBRARY(stepdpo_kernels, m) {
  m.def(
      "linear_logprob_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float? softcap, float? logit_scale, "
      "bool need_hidden, int kept_tiles) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprob_backward(Tensor grad, Tensor row, Tensor kept, Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
      "float? softcap, float? logit_scale, bool need_weight, bool need_bias) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(stepdpo_kernels, CPU, m) {
  m.impl("linear_logprob_forward", &forward_op);
  m.impl("linear_logprob_backward", &backward_op);
}

}  // namespace

// `import stepdpo_kernels._C` registers the operators; the module itself is empty.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
