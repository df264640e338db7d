// What is done to a tile of logits between two products: exp, sums and maxima per row, rounding, packing; and a product
// for CPUs without a library's. Written with the compiler's vector extension and compiled once per instruction set, chosen when the library loads.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__)
#define STEPDPO_PER_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STEPDPO_PER_ISA
#endif
#define STEPDPO_INLINE inline __attribute__((always_inline))

namespace stepdpo {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <typename Vector>
STEPDPO_INLINE Vector fetch(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename Vector>
STEPDPO_INLINE void store(void* to, const Vector& v) {
  std::memcpy(to, &v, sizeof(v));
}

// exp(x) to 2 ulp for x < 88, 0 below -87; NaN stays NaN. 2^n times the Taylor polynomial of degree 7 on |r| <= ln(2)/2.
STEPDPO_INLINE Floats exp16(Floats x) {
  const Floats top = Floats{} + 88.f;
  x = x > top ? top : x;
  constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const Floats n = (x * 1.44269504088896341f + round) - round;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const Ints bits = fetch<Ints>(&p) + (__builtin_convertvector(n, Ints) << 23);
  return x < Floats{} - 87.f ? Floats{} : fetch<Floats>(&bits);
}

// tanh(x): its Taylor polynomial of degree 9 near 0, where 1 - 2 / (e^2x + 1) would cancel.
STEPDPO_INLINE Floats tanh16(Floats x) {
  const Floats far = 1.f - 2.f / (exp16(2.f * x) + 1.f);
  const Floats y = x * x;
  Floats p = y * (62.f / 2835) - 17.f / 315;
  p = p * y + 2.f / 15;
  p = p * y - 1.f / 3;
  p = p * y + 1.f;
  return y < 0.04f ? x * p : far;
}

STEPDPO_INLINE void store_rounded(float* to, const Floats& v) { store(to, v); }

STEPDPO_INLINE void store_rounded(c10::BFloat16* to, const Floats& v) {
  const Words bits = fetch<Words>(&v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  store(to, __builtin_convertvector(rounded, Halves));
}

template <typename T>
struct Tile {
  const float* z;         // (tokens, rows) products; rows is a multiple of kLanes
  int64_t tokens, rows;
  int64_t first_token;
  const float* bias;      // (tokens,) or null
  float scale, softcap;   // softcap 0: none
  const float* ref;       // (rows,)
  const int32_t* target;  // (rows,)
  float* sum;             // (rows,) out: sum of e over the tile's tokens, the target left out
  float* top;             // (rows,) out: maximum of z - ref
  T* e;                   // (tokens, rows) out: e times the slope of z
  T* by_row;              // (rows, stride) out: the same, transposed, with a zero after an odd number of tokens; or null
  int64_t stride;
};

template <typename T, bool kSoftcap>
STEPDPO_INLINE void row_pass_of(const Tile<T>& t) {
  for (int64_t r = 0; r < t.rows; r += kLanes) {
    const Floats ref = fetch<Floats>(t.ref + r);
    const Ints target = fetch<Ints>(t.target + r);
    Floats sum{}, top = Floats{} - __builtin_inff();
    for (int64_t v = 0; v < t.tokens; v++) {
      Floats z = fetch<Floats>(t.z + v * t.rows + r);
      if (t.bias) z = z + t.bias[v];
      z = z * t.scale;
      Floats slope = Floats{} + t.scale;
      if (kSoftcap) {
        const Floats h = tanh16(z * (1.f / t.softcap));
        z = h * t.softcap;
        slope = slope * (1.f - h * h);
      }
      const Floats d = z - ref;
      top = d > top ? d : top;
      const Floats e = target == static_cast<int32_t>(t.first_token + v) ? Floats{} : exp16(d);
      sum = sum + e;
      store_rounded(t.e + v * t.rows + r, e * slope);
    }
    store(t.sum + r, sum);
    store(t.top + r, top);
    if (!t.by_row) continue;
    for (int64_t i = r; i < r + kLanes; i++) {
      T* row = t.by_row + i * t.stride;
      for (int64_t v = 0; v < t.tokens; v++) row[v] = t.e[v * t.rows + i];
      if (t.tokens % 2) row[t.tokens] = T(0.f);
    }
  }
}

STEPDPO_PER_ISA static void row_pass(const Tile<float>& t) {
  t.softcap ? row_pass_of<float, true>(t) : row_pass_of<float, false>(t);
}

STEPDPO_PER_ISA static void row_pass(const Tile<c10::BFloat16>& t) {
  t.softcap ? row_pass_of<c10::BFloat16, true>(t) : row_pass_of<c10::BFloat16, false>(t);
}

// Two rows of B side by side, as products of bfloat16 pairs want them: to[2n] = even[n], to[2n + 1] = odd[n].
STEPDPO_PER_ISA static void interleave(const c10::BFloat16* even, const c10::BFloat16* odd, int64_t n, c10::BFloat16* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Words low = __builtin_convertvector(fetch<Halves>(even + i), Words);
    const Words high = __builtin_convertvector(fetch<Halves>(odd + i), Words);
    store(to + 2 * i, low | (high << 16));
  }
  for (; i < n; i++) to[2 * i] = even[i], to[2 * i + 1] = odd[i];
}

STEPDPO_INLINE Floats widen(const float* from) { return fetch<Floats>(from); }

STEPDPO_INLINE Floats widen(const c10::BFloat16* from) {
  const Words bits = __builtin_convertvector(fetch<Halves>(from), Words) << 16;
  return fetch<Floats>(&bits);
}

// C (m, n) = A (m, k) B (k, n), or +=, float32 sums: kM rows by kLanes columns at a time in registers.
template <int kM, typename T>
STEPDPO_INLINE void product_rows(int64_t n, int64_t k, const T* a, int64_t lda, const T* b, float* c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Floats sum[kM];
    for (int i = 0; i < kM; i++) sum[i] = add ? fetch<Floats>(c + i * ldc + j) : Floats{};
    for (int64_t p = 0; p < k; p++) {
      const Floats right = widen(b + p * n + j);
      for (int i = 0; i < kM; i++) sum[i] = sum[i] + static_cast<float>(a[i * lda + p]) * right;
    }
    for (int i = 0; i < kM; i++) store(c + i * ldc + j, sum[i]);
  }
  for (; j < n; j++)
    for (int i = 0; i < kM; i++) {
      float sum = add ? c[i * ldc + j] : 0.f;
      for (int64_t p = 0; p < k; p++) sum += static_cast<float>(a[i * lda + p]) * static_cast<float>(b[p * n + j]);
      c[i * ldc + j] = sum;
    }
}

template <typename T>
STEPDPO_INLINE void product_of(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, float* c, int64_t ldc, bool add) {
  constexpr int kM = 6;
  int64_t i = 0;
  for (; i + kM <= m; i += kM) product_rows<kM>(n, k, a + i * lda, lda, b, c + i * ldc, ldc, add);
  for (; i < m; i++) product_rows<1>(n, k, a + i * lda, lda, b, c + i * ldc, ldc, add);
}

STEPDPO_PER_ISA static void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, float* c, int64_t ldc, bool add) {
  product_of(m, n, k, a, lda, b, c, ldc, add);
}

STEPDPO_PER_ISA static void product(
    int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda, const c10::BFloat16* b, float* c, int64_t ldc, bool add) {
  product_of(m, n, k, a, lda, b, c, ldc, add);
}

}  // namespace stepdpo
