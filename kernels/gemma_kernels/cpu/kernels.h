// What every instruction set offers: kernels.cc is compiled for each of them and gives one of these.
#ifndef GEMMA_KERNELS_KERNELS_H_
#define GEMMA_KERNELS_KERNELS_H_

#include <stdint.h>

struct Matrix {  // [rows, num_inputs], encoded
  const uint8_t* data;
  int64_t num_inputs, row_bytes;
  int32_t encoding;  // ggml's number of the type
};

struct Kernels {
  // y[m * y_stride + row] = x[m] . decoded row, for rows begin .. end - 1 and m < num_x; x is [num_x, num_inputs].
  // `scratch` is for the caller to keep: scratch_floats of it. A result does not depend on num_x, begin and end.
  void (*product)(const Matrix&, int64_t begin, int64_t end, const float* x, int64_t num_x, float* y, int64_t y_stride,
                  float* scratch);
  // Rows begin .. end - 1, each num_inputs floats.
  void (*decode)(const Matrix&, int64_t begin, int64_t end, float* out);
};

// Rows decoded at a time, so that they stay in a cache while all rows of x pass: L1 for a few x, else L2.
inline int64_t tile_rows(int64_t num_inputs, int64_t num_x) {
  int64_t rows = ((num_x <= 8 ? 4096 : 32768) / num_inputs) & ~int64_t{3};
  return rows < 4 ? 4 : rows > 32 ? 32 : rows;
}

extern const Kernels kernels_base, kernels_avx2, kernels_avx512;

#endif  // GEMMA_KERNELS_KERNELS_H_
