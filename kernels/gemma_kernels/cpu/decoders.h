// How each encoding becomes floats: `decode(block, use)` calls `use(i, values)` for W consecutive values from the i-th
// on, in order. Products are rounded before a minimum is subtracted, as the gguf library does, so bits agree.
// Layouts: ggml-common.h and ggml-quants.c of github.com/ggml-org/llama.cpp.
#ifndef GEMMA_KERNELS_DECODERS_H_
#define GEMMA_KERNELS_DECODERS_H_

#include "simd.h"

namespace {

// ROWS rows are decoded at the same time, so that one need not wait for the sum of another. They should be few: memory
// is read fastest from front to back. Short vectors are more sums in a row, and want more rows.
constexpr int together(int rows) { return rows * 16 / W < 4 ? rows * 16 / W : 4; }

struct BF16 {
  static constexpr int NUMBER = 30, VALUES = 32, SIZE = 64, ROWS = together(1);
  template <class Use>
  INLINE void decode(const uint8_t* block, Use& use) {
    for (int i = 0; i < 32; i += W) use(i, bf16s(block + 2 * i));
  }
};

struct F16 {
  static constexpr int NUMBER = 1, VALUES = 32, SIZE = 64, ROWS = together(1);
  template <class Use>
  INLINE void decode(const uint8_t* block, Use& use) {
    for (int i = 0; i < 32; i += W) use(i, f16s(block + 2 * i));
  }
};

struct Q8_0 {
  static constexpr int NUMBER = 8, VALUES = 32, SIZE = 34, ROWS = together(1);
  template <class Use>
  INLINE void decode(const uint8_t* block, Use& use) {
    F scale = half(block);
    for (int i = 0; i < 32; i += W) use(i, scale * floats(signed_bytes(block + 2 + i)));
  }
};

// Four bits: byte i has value i and, above it, value i + 16.
template <int NUMBER_, int OFFSET, bool HAS_LEAST>
struct Four {
  static constexpr int NUMBER = NUMBER_, VALUES = 32, HEAD = HAS_LEAST ? 4 : 2, SIZE = HEAD + 16, ROWS = together(2);
  template <class Use>
  INLINE void decode(const uint8_t* block, Use& use) {
    auto meaning = Nibbles<OFFSET, HAS_LEAST>::of(half(block), HAS_LEAST ? -half(block + 2) : F{});
    I q[16 / W];
    for (int i = 0; i < 16; i += W) q[i / W] = bytes(block + HEAD + i);
    for (int i = 0; i < 16; i += W) use(i, meaning.low(q[i / W]));
    for (int i = 0; i < 16; i += W) use(i + 16, meaning.high(q[i / W]));
  }
};
using Q4_0 = Four<2, 8, false>;
using Q4_1 = Four<3, 0, true>;

// The same, and a word with a fifth bit of each value.
template <int NUMBER_, int OFFSET, bool HAS_LEAST>
struct Five {
  static constexpr int NUMBER = NUMBER_, VALUES = 32, HEAD = HAS_LEAST ? 8 : 6, SIZE = HEAD + 16, ROWS = together(1);
  template <class Use>
  INLINE void decode(const uint8_t* block, Use& use) {
    auto meaning = Fives<OFFSET, HAS_LEAST>::of(half(block), HAS_LEAST ? -half(block + 2) : F{});
    uint32_t fifths;
    memcpy(&fifths, block + HEAD - 4, 4);
    I q[16 / W];
    for (int i = 0; i < 16; i += W) q[i / W] = bytes(block + HEAD + i);
    for (int i = 0; i < 16; i += W) use(i, meaning.low(q[i / W], fifth_of_word(fifths, i)));
    for (int i = 0; i < 16; i += W) use(i + 16, meaning.high(q[i / W], fifth_of_word(fifths, i + 16)));
  }
};
using Q5_0 = Five<6, 16, false>;
using Q5_1 = Five<7, 0, true>;

// 8 scales, then 8 minima, of 6 bits each in 12 bytes, times the block's two numbers.
INLINE void scales_and_minima(const uint8_t* block, float* out) {
  uint32_t words[3], fields[4];
  memcpy(words, block + 4, 12);
  fields[0] = words[0] & 0x3F3F3F3Fu;
  fields[1] = (words[2] & 0x0F0F0F0Fu) | ((words[0] >> 6 & 0x03030303u) << 4);
  fields[2] = words[1] & 0x3F3F3F3Fu;
  fields[3] = (words[2] >> 4 & 0x0F0F0F0Fu) | ((words[1] >> 6 & 0x03030303u) << 4);
  for (int i = 0; i < 16; i += W) store(out + i, floats(bytes(reinterpret_cast<const uint8_t*>(fields) + i)));
  float scale = half_number(block), least = half_number(block + 2);
  for (int i = 0; i < 8; i++) out[i] *= scale;
  for (int i = 8; i < 16; i++) out[i] *= least;
}

struct Q4_K {
  static constexpr int NUMBER = 12, VALUES = 256, SIZE = 144, ROWS = together(2);
  template <class Use>
  INLINE void decode(const uint8_t* block, Use& use) {
    float scales[16];
    scales_and_minima(block, scales);
    for (int j = 0; j < 4; j++) {
      auto low = Nibbles<0, true>::of(set(scales[2 * j]), set(scales[2 * j + 8]));
      auto high = Nibbles<0, true>::of(set(scales[2 * j + 1]), set(scales[2 * j + 9]));
      I q[32 / W];
      for (int i = 0; i < 32; i += W) q[i / W] = bytes(block + 16 + 32 * j + i);
      for (int i = 0; i < 32; i += W) use(64 * j + i, low.low(q[i / W]));
      for (int i = 0; i < 32; i += W) use(64 * j + 32 + i, high.high(q[i / W]));
    }
  }
};

struct Q5_K {
  static constexpr int NUMBER = 13, VALUES = 256, SIZE = 176, ROWS = together(2);
  template <class Use>
  INLINE void decode(const uint8_t* block, Use& use) {
    float scales[16];
    scales_and_minima(block, scales);
    for (int j = 0; j < 4; j++) {
      auto low = Fives<0, true>::of(set(scales[2 * j]), set(scales[2 * j + 8]));
      auto high = Fives<0, true>::of(set(scales[2 * j + 1]), set(scales[2 * j + 9]));
      I q[32 / W], high_bits[32 / W];
      for (int i = 0; i < 32; i += W) q[i / W] = bytes(block + 48 + 32 * j + i);
      for (int i = 0; i < 32; i += W) high_bits[i / W] = bytes(block + 16 + i);
      for (int i = 0; i < 32; i += W) use(64 * j + i, low.low(q[i / W], fifth_of_bytes(high_bits[i / W], 2 * j)));
      for (int i = 0; i < 32; i += W) {
        use(64 * j + 32 + i, high.high(q[i / W], fifth_of_bytes(high_bits[i / W], 2 * j + 1)));
      }
    }
  }
};

struct Q6_K {
  static constexpr int NUMBER = 14, VALUES = 256, SIZE = 210, ROWS = together(2);
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  typedef Bytes Loose __attribute__((aligned(1), may_alias));
  template <class Use>
  INLINE void decode(const uint8_t* block, Use& use) {
    float scales[16];
    for (int i = 0; i < 16; i += W) store(scales + i, half(block + 208) * floats(signed_bytes(block + 192 + i)));
    for (int j = 0; j < 2; j++) {
      const Loose* packed = reinterpret_cast<const Loose*>(block + 64 * j);
      Bytes first = packed[0], second = packed[1];
      Bytes high = *reinterpret_cast<const Loose*>(block + 128 + 32 * j);
      Bytes q[4];
      q[0] = ((first & 15) | (high << 4 & 48)) - 32;
      q[1] = ((second & 15) | (high << 2 & 48)) - 32;
      q[2] = (first >> 4 | (high & 48)) - 32;
      q[3] = (second >> 4 | (high >> 2 & 48)) - 32;
      for (int i = 0; i < 128; i += W) {
        F scale = set(scales[8 * j + i / 16]);
        use(128 * j + i, scale * floats(signed_bytes(reinterpret_cast<const uint8_t*>(q) + i)));
      }
    }
  }
};

struct Q2_K {
  static constexpr int NUMBER = 10, VALUES = 256, SIZE = 84, ROWS = together(1);
  template <class Use>
  INLINE void decode(const uint8_t* block, Use& use) {
    float scales[16], minima[16];
    for (int i = 0; i < 16; i += W) {
      I packed = bytes(block + i);
      store(scales + i, half(block + 80) * floats(packed & 15));
      store(minima + i, half(block + 82) * floats(packed >> 4));
    }
    for (int i = 0; i < 256; i += W) {
      I q = (bytes(block + 16 + i / 128 * 32 + i % 32) >> i % 128 / 32 * 2) & 3;
      use(i, set(scales[i / 16]) * floats(q) - set(minima[i / 16]));
    }
  }
};

struct Q3_K {
  static constexpr int NUMBER = 11, VALUES = 256, SIZE = 110, ROWS = together(1);
  template <class Use>
  INLINE void decode(const uint8_t* block, Use& use) {
    float scale = half_number(block + 108), scales[16];
    const uint8_t* packed = block + 96;
    for (int i = 0; i < 16; i++) {
      int low = packed[i % 8] >> i / 8 * 4 & 15, high = packed[8 + i % 4] >> i / 4 * 2 & 3;
      scales[i] = scale * static_cast<float>((low | high << 4) - 32);
    }
    for (int i = 0; i < 256; i += W) {
      I low = (bytes(block + 32 + i / 128 * 32 + i % 32) >> i % 128 / 32 * 2) & 3;
      I high = (bytes(block + i % 32) >> i / 32) & 1;
      use(i, set(scales[i / 16]) * floats((low | high << 2) - 4));
    }
  }
};

}  // namespace

#endif  // GEMMA_KERNELS_DECODERS_H_
