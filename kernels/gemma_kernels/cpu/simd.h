// Vectors of W floats for one instruction set, which the compiler's flags choose: AVX-512, AVX2, NEON, or anything.
// Arithmetic is by the operators of GCC's and clang's vector types; here is only what they cannot say, or say badly.
// This and kernels.cc are compiled once per instruction set, so they include nothing that another file shares.
#ifndef GEMMA_KERNELS_SIMD_H_
#define GEMMA_KERNELS_SIMD_H_

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));

INLINE F load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
INLINE void store(float* to, F values) { *reinterpret_cast<Unaligned*>(to) = values; }
INLINE F set(float value) { return value - F{}; }  // not F{} + value, which makes a zero positive

// A float16 number; every one of them is also a float32.
INLINE float half_number(const uint8_t* from) {
  uint16_t bits;
  memcpy(&bits, from, 2);
#if defined(__AVX2__)
  return _cvtsh_ss(bits);
#elif defined(__ARM_NEON)
  __fp16 value;
  memcpy(&value, &bits, 2);
  return value;
#else
  uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7FFFu, wide = (rest << 13) + (112u << 23);
  if (rest >= 0x7C00u) wide += 112u << 23;  // infinity and NaN
  if (rest < 0x0400u) {                     // zero and subnormal numbers
    float tiny = static_cast<float>(rest) * 0x1p-24f;
    memcpy(&wide, &tiny, 4);
  }
  wide |= sign;
  float value;
  memcpy(&value, &wide, 4);
  return value;
#endif
}

#if defined(__AVX512F__)

INLINE F half(const uint8_t* from) {  // in every lane
  int16_t bits;
  memcpy(&bits, from, 2);
  return (F)_mm512_cvtph_ps(_mm256_set1_epi16(bits));
}
INLINE I bytes(const uint8_t* from) { return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)); }
INLINE I signed_bytes(const uint8_t* from) { return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)); }
INLINE F floats(I values) { return (F)_mm512_cvtepi32_ps((__m512i)values); }
INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE F bf16s(const uint8_t* from) {
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}
INLINE F f16s(const uint8_t* from) { return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }
INLINE I lanes() { return I{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

#elif defined(__AVX2__)

INLINE F half(const uint8_t* from) { return set(half_number(from)); }
INLINE I bytes(const uint8_t* from) { return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
INLINE I signed_bytes(const uint8_t* from) { return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)); }
INLINE F floats(I values) { return (F)_mm256_cvtepi32_ps((__m256i)values); }
INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE F bf16s(const uint8_t* from) {
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
}
INLINE F f16s(const uint8_t* from) { return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
INLINE I lanes() { return I{0, 1, 2, 3, 4, 5, 6, 7}; }

#elif defined(__ARM_NEON)

INLINE F half(const uint8_t* from) { return set(half_number(from)); }
INLINE uint8x8_t four_bytes(const uint8_t* from) {
  uint32_t word;
  memcpy(&word, from, 4);
  return vreinterpret_u8_u32(vdup_n_u32(word));
}
INLINE I bytes(const uint8_t* from) { return (I)vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(from)))); }
INLINE I signed_bytes(const uint8_t* from) {
  return (I)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four_bytes(from)))));
}
INLINE F floats(I values) { return (F)vcvtq_f32_s32((int32x4_t)values); }
INLINE F fma(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE F bf16s(const uint8_t* from) { return (F)vshll_n_u16(vreinterpret_u16_u8(vld1_u8(from)), 16); }
INLINE F f16s(const uint8_t* from) { return (F)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from))); }
INLINE I lanes() { return I{0, 1, 2, 3}; }

#else

INLINE F half(const uint8_t* from) { return set(half_number(from)); }
INLINE I bytes(const uint8_t* from) { return I{from[0], from[1], from[2], from[3]}; }
INLINE I signed_bytes(const uint8_t* from) {
  return I{(int8_t)from[0], (int8_t)from[1], (int8_t)from[2], (int8_t)from[3]};
}
INLINE F floats(I values) { return __builtin_convertvector(values, F); }
INLINE F fma(F a, F b, F c) { return a * b + c; }
INLINE F bf16s(const uint8_t* from) {
  uint16_t bits[4];
  memcpy(bits, from, 8);
  return (F)(I{bits[0], bits[1], bits[2], bits[3]} << 16);
}
INLINE F f16s(const uint8_t* from) {
  return F{half_number(from), half_number(from + 2), half_number(from + 4), half_number(from + 6)};
}
INLINE I lanes() { return I{0, 1, 2, 3}; }

#endif

// The sum of all lanes, always in the same order: halves are added until one is left.
INLINE float sum(F values) {
#if defined(__AVX512F__)
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)values),
                               _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)values), 1)));
#elif defined(__AVX2__)
  __m256 eight = (__m256)values;
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
  typedef float F4 __attribute__((vector_size(16)));
  F4 four = (F4)_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
#else
  F four = values;
#endif
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// What 4 bits q mean: scale * (q - offset) - least. With AVX-512 the 16 meanings are a register.
template <int OFFSET, bool HAS_LEAST>
struct Nibbles {
#if defined(__AVX512F__)
  F meanings;
  INLINE Nibbles of(F scale, F least) {
    F meanings = scale * (floats(lanes()) - set(OFFSET));
    return {HAS_LEAST ? meanings - least : meanings};
  }
  INLINE_MEMBER F low(I q) const { return (F)_mm512_permutexvar_ps((__m512i)q, (__m512)meanings); }
  INLINE_MEMBER F high(I q) const { return low(q >> 4); }
#else
  F scale, least;
  INLINE Nibbles of(F scale, F least) { return {scale, least}; }
  INLINE_MEMBER F meaning(I q) const {
    F value = scale * floats(q - OFFSET);
    return HAS_LEAST ? value - least : value;
  }
  INLINE_MEMBER F low(I q) const { return meaning(q & 15); }
  INLINE_MEMBER F high(I q) const { return meaning(q >> 4); }
#endif
};

// A fifth bit for each lane, and what five bits mean.
#if defined(__AVX512F__)
typedef __mmask16 Fifth;
INLINE Fifth fifth_of_word(uint32_t word, int at) { return (Fifth)(word >> at); }
INLINE Fifth fifth_of_bytes(I high, int bit) {
  return _mm512_test_epi32_mask((__m512i)high, _mm512_set1_epi32(1 << bit));
}
#else
typedef I Fifth;
INLINE Fifth fifth_of_word(uint32_t word, int at) { return (((I{} + (int32_t)word) >> (lanes() + at)) & 1) << 4; }
INLINE Fifth fifth_of_bytes(I high, int bit) { return ((high >> bit) & 1) << 4; }
#endif

template <int OFFSET, bool HAS_LEAST>
struct Fives {
#if defined(__AVX512F__)
  Nibbles<OFFSET, HAS_LEAST> without;
  Nibbles<OFFSET - 16, HAS_LEAST> with;
  INLINE Fives of(F scale, F least) {
    return {Nibbles<OFFSET, HAS_LEAST>::of(scale, least), Nibbles<OFFSET - 16, HAS_LEAST>::of(scale, least)};
  }
  INLINE_MEMBER F low(I q, Fifth fifth) const {
    return (F)_mm512_mask_permutexvar_ps((__m512)without.low(q), fifth, (__m512i)q, (__m512)with.meanings);
  }
  INLINE_MEMBER F high(I q, Fifth fifth) const { return low(q >> 4, fifth); }
#else
  Nibbles<OFFSET, HAS_LEAST> five;
  INLINE Fives of(F scale, F least) { return {Nibbles<OFFSET, HAS_LEAST>::of(scale, least)}; }
  INLINE_MEMBER F low(I q, Fifth fifth) const { return five.meaning((q & 15) | fifth); }
  INLINE_MEMBER F high(I q, Fifth fifth) const { return five.meaning((q >> 4) | fifth); }
#endif
};

}  // namespace

#endif  // GEMMA_KERNELS_SIMD_H_
