// The problem of linear_logprob.cpp cut into tiles, and the products on them.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "tile.h"

namespace stepdpo {

using at::BFloat16;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kVocab = 128;  // tokens of a tile
constexpr int64_t kRows = 128;  // rows of a tile; ROW_BLOCK in cpu_kernel.py
constexpr int64_t kColumns = 256;  // of D, in one product, at most; multiples of 64 suit its registers
constexpr int64_t kDepth = 256;  // of D, that product 1 sums at a time: partial sums are more accurate
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <typename T>
constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;

template <typename T>
Tensor buffer(int64_t size) {
  return at::empty({size}, c10::CppTypeToScalarType<T>::value);
}

// Whether ATen's brgemm (oneDNN: AMX, AVX-512, AVX2) takes T on this CPU. It raises where it does not.
template <typename T>
bool brgemm_works() {
  static const bool works = [] {
    const std::vector<T> ones(32, T(1.f));
    float c[16];
    try {
      at::native::cpublas::brgemm(1, 16, 2, 2, 16, 16, false, ones.data(), ones.data(), c, kIsBFloat16<T>);
      at::native::cpublas::brgemm_release(kIsBFloat16<T>);
    } catch (const std::exception&) {
      return false;
    }
    return std::all_of(c, c + 16, [](float sum) { return sum == 2.f; });
  }();
  return works && at::globalContext().userEnabledMkldnn();
}

// The problem, its tiles, and the products on them.
template <typename T>
struct Head {
  const Tensor hidden, weight, bias_or_none;
  const T *x, *w;  // (R, D), (V, D)
  const float* bias;  // (V,) or null
  const int64_t R, D, V;
  const float scale, softcap;  // softcap 0: none

  const bool brgemm = brgemm_works<T>();
  const int64_t pair = brgemm && kIsBFloat16<T> ? 2 : 1;  // so many k lie side by side in a right operand
  const int64_t tiles = ceil_div(V, kVocab);
  const int64_t row_blocks = ceil_div(R, kRows), padded_rows = round_up(R, kLanes);
  const int64_t column_blocks = ceil_div(D, kColumns), columns = round_up(ceil_div(D, column_blocks), 64);
  const int64_t all_columns = column_blocks * columns;
  const int64_t padded_d = round_up(D, pair);
  const int64_t ld = round_up(D, 16) + 16;  // of float32 sums (rows, D): not a power of two, which caches dislike
  const int64_t scratch = kVocab * (kRows + padded_d);  // floats that `tile` needs

  // E of the first rows is kept in the rows of dW, of the next ones in `extra`.
  const int64_t rows_in_dw = padded_rows <= D ? padded_rows : D / kRows * kRows;

  std::vector<float> ref = std::vector<float>(padded_rows, kInfinity);  // so that e is 0 where padded
  std::vector<int32_t> target = std::vector<int32_t>(padded_rows, -1);
  Tensor x_packed = buffer<T>(padded_rows * padded_d);  // X^T: for each row block a right operand (D, rows)

  Head(const Tensor& hidden_, const Tensor& weight_, const Tensor& target_, const OptionalTensor& bias_,
       std::optional<double> softcap_, std::optional<double> scale_)
      : hidden(hidden_.contiguous()), weight(weight_.contiguous()),
        bias_or_none(bias_ ? bias_->to(at::kFloat).contiguous() : Tensor()), x(hidden.const_data_ptr<T>()),
        w(weight.const_data_ptr<T>()), bias(bias_ ? bias_or_none.const_data_ptr<float>() : nullptr), R(hidden.size(0)),
        D(hidden.size(1)), V(weight.size(0)), scale(scale_.value_or(1.)), softcap(softcap_.value_or(0.)) {
    std::copy_n(target_.contiguous().const_data_ptr<int64_t>(), R, target.begin());
    at::parallel_for(0, row_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * kRows, rows = rows_of(block);
        T* packed = x_packed.data_ptr<T>() + first * padded_d;
        std::fill_n(packed, rows * padded_d, T(0.f));
        for (int64_t r = 0; r < std::min(rows, R - first); r++)
          for (int64_t d = 0; d < D; d++) packed[at_right(d, r, rows)] = x[(first + r) * D + d];
      }
    });
  }

  int64_t tokens_of(int64_t tile) const { return std::min(kVocab, V - tile * kVocab); }
  int64_t rows_of(int64_t block) const { return std::min(kRows, padded_rows - block * kRows); }
  int64_t columns_of(int64_t block) const { return std::min(columns, D - block * columns); }

  // Where a right operand with rows of `width` has (k, n).
  int64_t at_right(int64_t k, int64_t n, int64_t width) const { return (k / pair * width + n) * pair + k % pair; }

  // Where E of a tile is kept, (tokens, rows); null if it is not.
  T* kept(T* in_dw, T* extra, int64_t extra_rows, int64_t tile, int64_t block) const {
    const int64_t row = block * kRows, beyond = row - rows_in_dw;
    if (beyond < 0) return in_dw ? in_dw + tile * kVocab * D + row * tokens_of(tile) : nullptr;
    return beyond + rows_of(block) <= extra_rows ? extra + tile * kVocab * extra_rows + beyond * tokens_of(tile)
                                                 : nullptr;
  }

  // C (m, n) = A (m, k) B (k, n), or +=; k a multiple of `pair`, B a right operand.
  void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc,
               bool add) const {
    if (brgemm) {
      at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, kIsBFloat16<T>);
    } else {
      plain_product(m, n, k, a, lda, b, ldb, c, ldc, add);
    }
  }
  // For every thread that called product, before it leaves.
  void products_done() const {
    if (brgemm) at::native::cpublas::brgemm_release(kIsBFloat16<T>);
  }

  // W of a tile: for each block of columns a right operand (tokens, columns).
  void pack_weight(int64_t tile, T* to) const {
    const std::vector<T> zeros(columns);
    const int64_t tokens = tokens_of(tile);
    for (int64_t b = 0; b < column_blocks; b++, to += kVocab * columns) {
      for (int64_t v = 0; v < tokens; v += pair) {
        const T* row = w + (tile * kVocab + v) * D + b * columns;
        if (pair == 2) {
          interleave(row, v + 1 < tokens ? row + D : zeros.data(), columns_of(b), to + v * columns);
        } else {
          std::memcpy(to + v * columns, row, columns_of(b) * sizeof(T));
        }
      }
    }
  }

  // Product 1 and row pass of a tile. z: scratch. sum, top: (rows,). e: (tokens, rows). by_row: (rows, kVocab) or null.
  void tile(int64_t tile, int64_t block, float* z, float* sum, float* top, T* e, T* by_row) const {
    const int64_t tokens = tokens_of(tile), rows = rows_of(block), v = tile * kVocab, r = block * kRows;
    const T *a = w + v * D, *b = x_packed.const_data_ptr<T>() + r * padded_d;
    if (padded_d != D) {  // an odd D: rows of W get a zero
      T* padded = reinterpret_cast<T*>(z + kVocab * kRows);
      for (int64_t i = 0; i < tokens; i++) {
        std::memcpy(padded + i * padded_d, a + i * D, D * sizeof(T));
        padded[i * padded_d + D] = T(0.f);
      }
      a = padded;
    }
    for (int64_t d = 0; d < padded_d; d += kDepth) {
      product(tokens, rows, std::min(kDepth, padded_d - d), a + d, padded_d, b + d * rows, rows, z, rows, d > 0);
    }
    row_pass({z, tokens, rows, v, bias ? bias + v : nullptr, scale, softcap, ref.data() + r, target.data() + r, sum,
              top, e, by_row, kVocab});
  }

  // The target's logit of a row, and its slope.
  std::pair<double, double> target_logit(int64_t r) const {
    const T *a = x + r * D, *b = w + target[r] * D;
    double z = bias ? bias[target[r]] : 0.;
    for (int64_t d = 0; d < D; d++) z += static_cast<double>(a[d]) * static_cast<double>(b[d]);
    z *= scale;
    if (softcap == 0.f) return {z, scale};
    const double h = std::tanh(z / softcap);
    return {h * softcap, scale * (1. - h * h)};
  }
};

}  // namespace stepdpo
