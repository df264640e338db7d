// What is done to a tile of logits between two products: exp, sums and maxima per row, rounding, packing; and a product
// for CPUs without a library's. Written with the compiler's vector extension and compiled once per instruction set,
// chosen when the library loads.
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

// exp(x) to 1 ulp for -87 < x < 88, and what it is at those ends beyond them; NaN stays NaN. 2^n times the Taylor
// polynomial of degree 7 on |r| <= ln(2)/2.
STEPDPO_INLINE Floats exp16(Floats x) {
  const Floats top = Floats{} + 88.f, bottom = Floats{} - 87.f;
  x = x > top ? top : x;
  x = x < bottom ? bottom : x;
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
  return fetch<Floats>(&bits);
}

// tanh(x) to 3 ulp: its Taylor polynomial of degree 13 near 0, where 1 - 2 / (e^2x + 1) would cancel.
STEPDPO_INLINE Floats tanh16(Floats x) {
  const Floats far = 1.f - 2.f / (exp16(2.f * x) + 1.f);
  const Floats y = x * x;
  Floats p = y * (21844.f / 6081075) - 1382.f / 155925;
  p = p * y + 62.f / 2835;
  p = p * y - 17.f / 315;
  p = p * y + 2.f / 15;
  p = p * y - 1.f / 3;
  p = p * y + 1.f;
  return y < 0.2f ? x * p : far;
}

STEPDPO_INLINE void store_rounded(float* to, const Floats& v) { store(to, v); }

STEPDPO_INLINE void store_rounded(c10::BFloat16* to, const Floats& v) {
  const Words bits = fetch<Words>(&v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  store(to, __builtin_convertvector(rounded, Halves));
}

template <typename T>
struct Tile {
  const float* z;  // (tokens, rows) products; rows is a multiple of kLanes
  int64_t tokens, rows;
  int64_t first_token;
  const float* bias;  // (tokens,) or null
  float scale, softcap;  // softcap 0: none
  const float* ref;  // (rows,)
  const int32_t* target;  // (rows,)
  float* sum;  // (rows,) out: sum of e over the tile's tokens, the target left out
  float* top;  // (rows,) out: maximum of z - ref
  T* e;  // (tokens, rows) out: e times the slope of z
  T* by_row;  // (rows, stride) out: the same, transposed, with a zero after an odd number of tokens; or null
  int64_t stride;
};

template <typename T, bool kSoftcap>
STEPDPO_INLINE void row_pass_of(const Tile<T>& t) {
  for (int64_t r = 0; r < t.rows; r += kLanes) {
    const Floats ref = fetch<Floats>(t.ref + r);
    // Relative to the tile and as float, which is exact where it can be equal to an index of the tile.
    const Floats target =
        __builtin_convertvector(fetch<Ints>(t.target + r) - static_cast<int32_t>(t.first_token), Floats);
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
      const Floats e = target == static_cast<float>(v) ? Floats{} : exp16(d);
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

// Two rows of 16-bit elements side by side, as products of pairs want them: to[2n] = even[n], to[2n + 1] = odd[n].
STEPDPO_PER_ISA static void interleave(const void* even, const void* odd, int64_t n, void* to) {
  const auto *low = static_cast<const uint16_t*>(even), *high = static_cast<const uint16_t*>(odd);
  auto* out = static_cast<uint16_t*>(to);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Words pair = __builtin_convertvector(fetch<Halves>(low + i), Words) |
                       (__builtin_convertvector(fetch<Halves>(high + i), Words) << 16);
    store(out + 2 * i, pair);
  }
  for (; i < n; i++) out[2 * i] = low[i], out[2 * i + 1] = high[i];
}

template <typename T>
STEPDPO_INLINE void round_to_of(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats v = fetch<Floats>(from + i);
    store_rounded(to + i, v == v ? v : Floats{} + __builtin_nanf(""));  // some NaN would be rounded to 0
  }
  for (; i < n; i++) to[i] = from[i];
}

// to[i] = from[i], rounded to nearest.
STEPDPO_PER_ISA static void round_to(const float* from, int64_t n, float* to) { round_to_of(from, n, to); }
STEPDPO_PER_ISA static void round_to(const float* from, int64_t n, c10::BFloat16* to) { round_to_of(from, n, to); }

// to[i] += from[i]
STEPDPO_PER_ISA static void add_to(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

STEPDPO_INLINE Floats widen(const float* from) { return fetch<Floats>(from); }

STEPDPO_INLINE Floats widen(const c10::BFloat16* from) {
  const Words bits = __builtin_convertvector(fetch<Halves>(from), Words) << 16;
  return fetch<Floats>(&bits);
}

// C (m, n) = A (m, k) B (k, n), or +=, with float32 sums, for CPUs where no library does it: kM rows by kLanes columns
// of C at a time in registers.
template <int kM, typename T>
STEPDPO_INLINE void product_rows(int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
                                 int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    Floats sum[kM];
    for (int i = 0; i < kM; i++) sum[i] = add ? fetch<Floats>(c + i * ldc + j) : Floats{};
    for (int64_t p = 0; p < k; p++) {
      const Floats right = widen(b + p * ldb + j);
      for (int i = 0; i < kM; i++) sum[i] = sum[i] + static_cast<float>(a[i * lda + p]) * right;
    }
    for (int i = 0; i < kM; i++) store(c + i * ldc + j, sum[i]);
  }
  for (; j < n; j++)
    for (int i = 0; i < kM; i++) {
      float sum = add ? c[i * ldc + j] : 0.f;
      for (int64_t p = 0; p < k; p++) sum += static_cast<float>(a[i * lda + p]) * static_cast<float>(b[p * ldb + j]);
      c[i * ldc + j] = sum;
    }
}

#define STEPDPO_PRODUCT(T)                                                                                  \
  STEPDPO_PER_ISA static void plain_product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, \
                                      int64_t ldb, float* c, int64_t ldc, bool add) {                       \
    int64_t i = 0;                                                                                          \
    for (; i + 6 <= m; i += 6) product_rows<6>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);      \
    for (; i < m; i++) product_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);              \
  }
STEPDPO_PRODUCT(float)
STEPDPO_PRODUCT(c10::BFloat16)
#undef STEPDPO_PRODUCT

}  // namespace stepdpo
