// Products with encoded matrices. Compiled once per instruction set, with KERNELS the name of the result.
//
// A result is the sum over lanes of one vector, to which W products are added at a time from the first input to the
// last: the same for one or two rows of x, where weights go from the decoder into the sum, and for more, where they
// are decoded into a cache and used from there (for three or more that is faster).
#include "kernels.h"

#include "decoders.h"

namespace {

// Rows of weights and of x that share registers: a sum for each pair, the values of x, and those of one weight row.
constexpr int WEIGHT_ROWS = 4;
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int X_ROWS = 4;  // of 32 registers
#else
constexpr int X_ROWS = 3;  // of 16
#endif

template <int COUNT>
struct Sums {  // of one row of weights and COUNT rows of x, `stride` apart
  const float* x;
  int64_t stride;
  F totals[COUNT];
  INLINE_MEMBER void operator()(int i, F values) {
#pragma GCC unroll 4
    for (int m = 0; m < COUNT; m++) totals[m] = fma(values, load(x + m * stride + i), totals[m]);
  }
};

struct Store {
  float* out;
  INLINE_MEMBER void operator()(int i, F values) { store(out + i, values); }
};

// Asks memory for what comes later: without, blocks ran at half the speed. How far and for which cache was measured;
// plain numbers wait for nothing but memory.
template <class E>
INLINE void ask_ahead(const uint8_t* data) {
  constexpr bool IS_PLAIN = E::SIZE == 2 * E::VALUES;
#pragma GCC unroll 4
  for (int byte = 0; byte < E::SIZE; byte += 64) {
    __builtin_prefetch(data + (IS_PLAIN ? 4096 : 2048) + byte, 0, IS_PLAIN ? 2 : 3);
  }
}

template <class E, int ROWS, int COUNT>
INLINE void row_products(const Matrix& w, const uint8_t* data, const float* x, float* y, int64_t y_stride) {
  Sums<COUNT> sums[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) sums[r] = {x, w.num_inputs, {}};
  for (int64_t i = 0; i < w.num_inputs; i += E::VALUES) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      sums[r].x = x + i;
      ask_ahead<E>(data + r * w.row_bytes);
      E::decode(data + r * w.row_bytes, sums[r]);
    }
    data += E::SIZE;
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int m = 0; m < COUNT; m++) y[m * y_stride + r] = sum(sums[r].totals[m]);
}

// Rows begin .. end - 1 times COUNT rows of x, from registers alone.
template <class E, int COUNT>
void few_products(const Matrix& w, int64_t begin, int64_t end, const float* x, float* y, int64_t y_stride) {
  constexpr int ROWS = COUNT == 1 ? E::ROWS : 1;
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS) {
    row_products<E, ROWS, COUNT>(w, w.data + row * w.row_bytes, x, y + row, y_stride);
  }
  for (; row < end; row++) row_products<E, 1, COUNT>(w, w.data + row * w.row_bytes, x, y + row, y_stride);
}

template <class E>
INLINE void decode_row(const Matrix& w, int64_t row, float* out) {
  const uint8_t* data = w.data + row * w.row_bytes;
  for (int64_t i = 0; i < w.num_inputs; i += E::VALUES, data += E::SIZE) {
    Store store_here = {out + i};
    E::decode(data, store_here);
  }
}

// ROWS x COUNT sums over decoded weights [ROWS, n] and x [COUNT, n].
template <int ROWS, int COUNT>
INLINE void tile(const float* w, const float* x, int64_t n, float* y, int64_t y_stride) {
  F sums[ROWS][COUNT] = {};
  for (int64_t i = 0; i < n; i += W) {
    F values[COUNT];
#pragma GCC unroll 4
    for (int m = 0; m < COUNT; m++) values[m] = load(x + m * n + i);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
      F weights = load(w + r * n + i);
#pragma GCC unroll 4
      for (int m = 0; m < COUNT; m++) sums[r][m] = fma(weights, values[m], sums[r][m]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < COUNT; m++)
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) y[m * y_stride + r] = sum(sums[r][m]);
}

// All rows of a decoded tile [num_rows, n] times COUNT rows of x.
template <int COUNT>
void tiles(const float* w, int64_t num_rows, const float* x, int64_t n, float* y, int64_t y_stride) {
  int64_t r = 0;
  for (; r + WEIGHT_ROWS <= num_rows; r += WEIGHT_ROWS) tile<WEIGHT_ROWS, COUNT>(w + r * n, x, n, y + r, y_stride);
  for (; r < num_rows; r++) tile<1, COUNT>(w + r * n, x, n, y + r, y_stride);
}

void decoded_product(const float* w, int64_t num_rows, const float* x, int64_t num_x, int64_t n, float* y,
                     int64_t y_stride) {
  for (; num_x >= X_ROWS; num_x -= X_ROWS, x += X_ROWS * n, y += X_ROWS * y_stride) {
    tiles<X_ROWS>(w, num_rows, x, n, y, y_stride);
  }
  if (num_x == 3) tiles<3>(w, num_rows, x, n, y, y_stride);
  if (num_x == 2) tiles<2>(w, num_rows, x, n, y, y_stride);
  if (num_x == 1) tiles<1>(w, num_rows, x, n, y, y_stride);
}

template <class E>
void product_of(const Matrix& w, int64_t begin, int64_t end, const float* x, int64_t num_x, float* y, int64_t y_stride,
                float* scratch) {
  if (num_x == 1) return few_products<E, 1>(w, begin, end, x, y, y_stride);
  if (num_x == 2) return few_products<E, 2>(w, begin, end, x, y, y_stride);
  int64_t step = tile_rows(w.num_inputs, num_x);
  for (int64_t row = begin; row < end; row += step) {
    int64_t count = end - row < step ? end - row : step;
    for (int64_t r = 0; r < count; r++) decode_row<E>(w, row + r, scratch + r * w.num_inputs);
    decoded_product(scratch, count, x, num_x, w.num_inputs, y + row, y_stride);
  }
}

template <class E>
void decode_of(const Matrix& w, int64_t begin, int64_t end, float* out) {
  for (int64_t row = begin; row < end; row++) decode_row<E>(w, row, out + (row - begin) * w.num_inputs);
}

#define FOR_EACH_ENCODING(CASE) \
  CASE(BF16) CASE(F16) CASE(Q4_0) CASE(Q4_1) CASE(Q5_0) CASE(Q5_1) CASE(Q8_0) \
  CASE(Q2_K) CASE(Q3_K) CASE(Q4_K) CASE(Q5_K) CASE(Q6_K)

void product(const Matrix& w, int64_t begin, int64_t end, const float* x, int64_t num_x, float* y, int64_t y_stride,
             float* scratch) {
#define CASE(E) \
  case E::NUMBER: return product_of<E>(w, begin, end, x, num_x, y, y_stride, scratch);
  switch (w.encoding) { FOR_EACH_ENCODING(CASE) }
#undef CASE
}

void decode(const Matrix& w, int64_t begin, int64_t end, float* out) {
#define CASE(E) \
  case E::NUMBER: return decode_of<E>(w, begin, end, out);
  switch (w.encoding) { FOR_EACH_ENCODING(CASE) }
#undef CASE
}

}  // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {product, decode};
