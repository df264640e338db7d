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
// forward: a group of row blocks sweeps the vocabulary by chunks; in parallel the tiles of a chunk (product 1, row
// pass), then the blocks of dX / g (product 2). It keeps E in the memory that will be dW, whose rows hold D rows of E,
// and in `extra`. backward: in parallel the tiles of tokens, product 3 with E as kept or recomputed; a slice of dW is
// written once, over the E that it came from. Every sum has one order, so results do not depend on the number of
// threads.
//
// Memory: dW (V, D); extra (V, extra_rows); X packed; dX / g (R, D) in float32; a chunk of E and W in cache. Bytes
// moved: W once a product and group, E once. FLOPs: 2RDV a product: 3 for a full backward and 1 for each row of E that
// was not kept, 2 for a frozen head, 1 for log-probs alone.
#include <Python.h>

#include <ATen/Parallel.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "head.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using namespace stepdpo;

constexpr int64_t kGroup = 4;  // row blocks that are worked on together, or two for each thread
constexpr int64_t kChunkBytes = 1 << 20;  // of E and W, for each thread: what its L2 cache holds
constexpr int64_t kChunkTiles = 4;  // at least: dX / g is read and written once a chunk
constexpr float kHeadroom = 40.f;  // e^40, its sum over a vocabulary and the inverse are far inside float32

// Asks for large pages: the page faults of a fresh dW cost a tenth of a product.
void advise_large_pages(const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const auto start = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t begin = (start + page - 1) / page * page, end = (start + t.nbytes()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// The vocabulary for the row blocks [first_block, end_block): sums and maxima of the row pass, (padded_rows,); E where
// it is kept; E^T W into `acc`, (rows, ld), unless null.
template <typename T>
void sweep(const Head<T>& h, int64_t first_block, int64_t end_block, double* sum, float* top, T* dw, T* extra,
           int64_t extra_rows, float* acc) {
  const int64_t blocks = end_block - first_block, first_row = first_block * kRows, threads = at::get_num_threads();
  const int64_t rows = std::min(end_block * kRows, h.padded_rows) - first_row;
  const int64_t e_size = rows * kVocab, w_size = h.all_columns * kVocab;
  const int64_t fitting = threads * kChunkBytes / (sizeof(T) * (e_size + w_size));
  const int64_t chunk = std::min(h.tiles, std::max({fitting, kChunkTiles, ceil_div(threads, blocks)}));
  const Tensor scratch = buffer<float>(threads * h.scratch), parts = buffer<float>(2 * chunk * rows);
  const Tensor e_scratch = buffer<T>(threads * kVocab * kRows);
  const Tensor e_chunk = buffer<T>(acc ? chunk * e_size : 0), w_chunk = buffer<T>(acc ? chunk * w_size : 0);
  float *z = scratch.data_ptr<float>(), *sums = parts.data_ptr<float>(), *tops = sums + chunk * rows;
  T *e = e_scratch.data_ptr<T>(), *by_row = e_chunk.data_ptr<T>(), *w = w_chunk.data_ptr<T>();
  std::fill_n(sum + first_row, rows, 0.);
  std::fill_n(top + first_row, rows, -kInfinity);
  for (int64_t first = 0; first < h.tiles; first += chunk) {
    const int64_t n = std::min(chunk, h.tiles - first);
    at::parallel_for(0, n * blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t thread = at::get_thread_num();
      for (int64_t id = begin; id < end; id++) {
        const int64_t i = id / blocks, block = first_block + id % blocks, row = id % blocks * kRows;
        T* keep = h.kept(dw, extra, extra_rows, first + i, block);
        h.tile(first + i, block, z + thread * h.scratch, sums + i * rows + row, tops + i * rows + row,
               keep ? keep : e + thread * kVocab * kRows, acc ? by_row + i * e_size + row * kVocab : nullptr);
        if (acc && row == 0) h.pack_weight(first + i, w + i * w_size);
      }
      h.products_done();
    });
    for (int64_t i = 0; i < n; i++)
      for (int64_t r = 0; r < rows; r++) {
        sum[first_row + r] += sums[i * rows + r];
        top[first_row + r] = std::max(top[first_row + r], tops[i * rows + r]);
      }
    if (!acc) continue;
    at::parallel_for(0, blocks * h.column_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t id = begin; id < end; id++) {
        const int64_t row = id % blocks * kRows, b = id / blocks, column = b * h.columns;
        for (int64_t i = 0; i < n; i++) {
          h.product(std::min(kRows, rows - row), h.columns_of(b), round_up(h.tokens_of(first + i), h.pair),
                    by_row + i * e_size + row * kVocab, kVocab, w + i * w_size + column * kVocab, h.columns,
                    acc + row * h.ld + column, h.ld, first + i > 0);
        }
      }
      h.products_done();
    });
  }
}

// -> logp (R,), row (3, R): ref, f and q, dX / g (R, D), E in the memory of dW (V, D), more of E (V * extra_rows,).
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Head<T> h, bool need_hidden, bool keep, int64_t extra_rows) {
  const auto options = h.hidden.options().dtype(at::kFloat);
  const Tensor logp = at::empty({h.R}, options), row = at::empty({3, h.R}, options);
  const Tensor d_hidden = at::empty({need_hidden ? h.R : 0, h.D}, options);
  const Tensor kept = at::empty({keep ? h.V : 0, h.D}, h.weight.options()), extra = buffer<T>(h.V * extra_rows);
  advise_large_pages(kept);
  advise_large_pages(extra);
  std::vector<std::pair<double, double>> hit(h.R);
  at::parallel_for(0, h.R, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      hit[r] = h.target_logit(r);
      h.ref[r] = std::isfinite(hit[r].first) ? hit[r].first : 0.;
    }
  });
  std::vector<double> sum(h.padded_rows);
  std::vector<float> top(h.padded_rows);
  float *p = logp.data_ptr<float>(), *ref = row.data_ptr<float>(), *f = ref + h.R, *q = f + h.R,
        *dx = d_hidden.data_ptr<float>();
  const int64_t group = std::min(h.row_blocks, std::max<int64_t>(kGroup, 2 * at::get_num_threads()));
  const Tensor acc = buffer<float>(need_hidden ? group * kRows * h.ld : 0);
  for (int64_t block = 0; block < h.row_blocks; block += group) {
    const int64_t end_block = std::min(block + group, h.row_blocks), first_row = block * kRows,
                  end_row = std::min(end_block * kRows, h.R);
    const auto run = [&] {
      sweep(h, block, end_block, sum.data(), top.data(), keep ? kept.data_ptr<T>() : nullptr, extra.data_ptr<T>(),
            extra_rows, need_hidden ? acc.data_ptr<float>() : nullptr);
    };
    run();
    bool again = false;
    for (int64_t r = first_row; r < end_row; r++)
      if (top[r] > kHeadroom) {
        h.ref[r] += top[r];
        again = true;
      }
    if (again) run();
    at::parallel_for(first_row, end_row, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r++) {
        const double z = hit[r].first - h.ref[r], total = std::exp(z) + sum[r];
        p[r] = z > -500. ? -std::log1p(sum[r] * std::exp(-z)) : z - std::log(sum[r]);
        ref[r] = h.ref[r];
        f[r] = 1. / total;
        q[r] = sum[r] / total * hit[r].second;
        const T* own = h.w + h.target[r] * h.D;
        const float* others = acc.const_data_ptr<float>() + (r - first_row) * h.ld;
        for (int64_t d = 0; need_hidden && d < h.D; d++)
          dx[r * h.D + d] = q[r] * static_cast<float>(own[d]) - f[r] * others[d];
      }
    });
  }
  return {logp, row, d_hidden, kept, extra};
}

// dW (V, D), unless null, which may lie over `kept`, null too if nothing was; -> dbias (V,) or empty.
template <typename T>
Tensor backward(Head<T> h, const float* grad, const float* row, T* dw, T* kept, T* extra, int64_t extra_rows,
                bool need_bias) {
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
  const int64_t threads = at::get_num_threads(), per_thread = h.scratch + kVocab * h.ld + 2 * kRows;
  const Tensor scratch = buffer<float>(threads * per_thread), e_scratch = buffer<T>(threads * kGroup * kVocab * kRows);
  at::parallel_for(0, h.tiles, 1, [&](int64_t begin, int64_t end) {
    float* z = scratch.data_ptr<float>() + at::get_thread_num() * per_thread;
    float *acc = z + h.scratch, *ignored = acc + kVocab * h.ld;  // acc: dW of the tile, (kVocab, ld)
    std::vector<double> db(kVocab);
    T *e_own = e_scratch.data_ptr<T>() + at::get_thread_num() * kGroup * kVocab * kRows, *e[kGroup];
    for (int64_t tile = begin; tile < end; tile++) {
      const int64_t tokens = h.tokens_of(tile), first = tile * kVocab;
      std::fill(db.begin(), db.end(), 0.);
      if (!h.R) std::fill_n(acc, kVocab * h.ld, 0.f);
      for (int64_t block = 0; block < h.row_blocks; block += kGroup) {
        const int64_t blocks = std::min(kGroup, h.row_blocks - block);
        for (int64_t i = 0; i < blocks; i++) {
          e[i] = h.kept(kept, extra, extra_rows, tile, block + i);
          if (!e[i]) h.tile(tile, block + i, z, ignored, ignored + kRows, e[i] = e_own + i * kVocab * kRows, nullptr);
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
      for (int64_t v = 0; dw && v < tokens; v++) std::copy_n(acc + v * h.ld, h.D, dw + (first + v) * h.D);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward_op(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
    std::optional<double> softcap, std::optional<double> scale, bool need_hidden, bool need_weight, int64_t extra_rows,
    bool /*overwrite: for the backward of autograd*/) {
  check(hidden, weight, target, bias, extra_rows);
  if (hidden.scalar_type() == at::kFloat) {
    return forward(Head<float>(hidden, weight, target, bias, softcap, scale), need_hidden, need_weight, extra_rows);
  }
  return forward(Head<BFloat16>(hidden, weight, target, bias, softcap, scale), need_hidden, need_weight, extra_rows);
}

Tensor backward_into(const Tensor& dw, const Tensor& grad, const Tensor& row, const Tensor& kept, const Tensor& extra,
                     const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
                     std::optional<double> softcap, std::optional<double> scale, bool need_bias) {
  const int64_t rows = hidden.size(0), extra_rows = weight.size(0) ? extra.numel() / weight.size(0) : 0;
  check(hidden, weight, target, bias, extra_rows);
  TORCH_CHECK(grad.dim() == 1 && grad.size(0) == rows && grad.scalar_type() == at::kFloat, "grad must be (", rows,
              ",) float32");
  TORCH_CHECK(row.numel() == 3 * rows && row.is_contiguous() && row.scalar_type() == at::kFloat, "row must be (3, ",
              rows, ") float32");
  for (const Tensor& t : {kept, extra, dw}) {
    TORCH_CHECK(t.scalar_type() == hidden.scalar_type() && t.is_contiguous() &&
                    (t.dim() == 1 || !t.numel() || t.sizes() == weight.sizes()),
                "kept and extra must be what forward returned");
  }
  const Tensor g = grad.contiguous();
  const auto run = [&]<typename T>(const Head<T>& head) {
    return backward(head, g.const_data_ptr<float>(), row.const_data_ptr<float>(),
                    dw.numel() ? dw.data_ptr<T>() : nullptr, kept.numel() ? kept.data_ptr<T>() : nullptr,
                    extra.data_ptr<T>(), extra_rows, need_bias);
  };
  if (hidden.scalar_type() == at::kFloat) return run(Head<float>(hidden, weight, target, bias, softcap, scale));
  return run(Head<BFloat16>(hidden, weight, target, bias, softcap, scale));
}

std::tuple<Tensor, Tensor> backward_op(
    const Tensor& grad, const Tensor& row, const Tensor& kept, const Tensor& extra, const Tensor& hidden,
    const Tensor& weight, const Tensor& target, const OptionalTensor& bias, std::optional<double> softcap,
    std::optional<double> scale, bool need_weight, bool need_bias) {
  const Tensor dw = at::empty({need_weight ? weight.size(0) : 0, weight.size(1)}, weight.options());
  const Tensor db = backward_into(dw, grad, row, kept, extra, hidden, weight, target, bias, softcap, scale, need_bias);
  return {dw, db};
}

Tensor backward_in_place_op(
    const Tensor& grad, const Tensor& row, const Tensor& kept, const Tensor& extra, const Tensor& hidden,
    const Tensor& weight, const Tensor& target, const OptionalTensor& bias, std::optional<double> softcap,
    std::optional<double> scale, bool need_bias) {
  return backward_into(kept, grad, row, kept, extra, hidden, weight, target, bias, softcap, scale, need_bias);
}

TORCH_LIBRARY(stepdpo_kernels, m) {
  m.def(
      "linear_logprob_forward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float? softcap, "
      "float? logit_scale, bool need_hidden, bool need_weight, int extra_rows, bool overwrite) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logprob_backward(Tensor grad, Tensor row, Tensor kept, Tensor extra, Tensor hidden, Tensor weight, "
      "Tensor target, Tensor? bias, float? softcap, float? logit_scale, bool need_weight, bool need_bias) "
      "-> (Tensor, Tensor)");
  m.def(  // leaves dW in `kept`
      "linear_logprob_backward_(Tensor grad, Tensor row, Tensor(a!) kept, Tensor extra, Tensor hidden, Tensor weight, "
      "Tensor target, Tensor? bias, float? softcap, float? logit_scale, bool need_bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(stepdpo_kernels, CPU, m) {
  m.impl("linear_logprob_forward", &forward_op);
  m.impl("linear_logprob_backward", &backward_op);
  m.impl("linear_logprob_backward_", &backward_in_place_op);
}

}  // namespace

// `import stepdpo_kernels._C` registers the operators; the module itself says only what torch it was built against.
extern "C" PyObject* PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module) PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION);
  return module;
}
