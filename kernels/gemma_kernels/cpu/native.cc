// The library that XLA calls: products with encoded matrices, and their decoding, by the threads of XLA's own pool.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
};

// What this machine can run, the fastest first.
std::vector<Level> levels() {
  std::vector<Level> found;
#if defined(__x86_64__)
  __builtin_cpu_init();  // this may run before the compiler's own start-up code
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2 && has_avx512) found.push_back({"avx512", &kernels_avx512});
  if (has_avx2) found.push_back({"avx2", &kernels_avx2});
  found.push_back({"sse2", &kernels_base});
#elif defined(__aarch64__)
  found.push_back({"neon", &kernels_base});
#else
  found.push_back({"scalar", &kernels_base});
#endif
  return found;
}

std::atomic<const Kernels*> chosen{levels()[0].kernels};

constexpr int64_t GRAIN = 1 << 17;  // products of two numbers that are worth waking a thread for: about 10 us
constexpr int64_t PIECES = 4;       // per thread, so that a late one does not hold up the others

// Work in numbered pieces, which threads take one after the other. Tasks of the pool that come when none is left find
// that out from here and touch nothing else, so nobody waits for a task that has not begun: no deadlock.
template <class Piece>
struct Work {
  Work(const Piece& piece, int64_t count) : piece(piece), count(count) {}

  void run() {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      piece(i);
      done.fetch_add(1, std::memory_order_release);
    }
  }

  void wait() const {
    for (int spins = 0; done.load(std::memory_order_acquire) < count; spins++) {
      if (spins > 1000) std::this_thread::yield();
    }
  }

  const Piece piece;
  const int64_t count;
  std::atomic<int64_t> next{0}, done{0};
};

template <class Piece>
void run_pieces(ffi::ThreadPool& pool, int64_t count, int64_t num_threads, const Piece& piece) {
  if (count == 1) return piece(0);
  auto work = std::make_shared<Work<Piece>>(piece, count);
  for (int64_t i = 1; i < std::min(count, num_threads); i++) pool.Schedule([work] { work->run(); });
  work->run();
  work->wait();
}

float* scratch(int64_t size) {
  thread_local std::vector<float> buffer;
  if (buffer.size() < static_cast<size_t>(size)) buffer.resize(size);
  return buffer.data();
}

struct Piece {
  int64_t part, begin, end;
};

// Consecutive rows of one matrix each, of about equal work; multiples of 4 rows, which share registers.
void cut(int64_t part, int64_t rows, int64_t work_per_row, int64_t num_threads, int64_t total_work,
         std::vector<Piece>& pieces) {
  int64_t size = std::max(GRAIN, total_work / (num_threads * PIECES)) / std::max<int64_t>(1, work_per_row);
  int64_t step = std::max<int64_t>(4, (size + 3) & ~int64_t{3});
  for (int64_t row = 0; row < rows; row += step) pieces.push_back({part, row, std::min(rows, row + step)});
}

Matrix matrix(const ffi::AnyBuffer& data, int64_t num_inputs, int32_t encoding) {
  int64_t rows = data.dimensions()[0];
  auto* bytes = static_cast<const uint8_t*>(data.untyped_data());
  return {bytes, num_inputs, rows ? static_cast<int64_t>(data.size_bytes()) / rows : 0, encoding};
}

// x [M, I] times each of the matrices, transposed: [M, sum of their rows].
ffi::Error Product(ffi::ThreadPool pool, ffi::Span<const int32_t> encodings, ffi::Buffer<ffi::F32> x,
                   ffi::RemainingArgs parts, ffi::ResultBuffer<ffi::F32> y) {
  int64_t num_x = x.dimensions()[0], num_inputs = x.dimensions()[1], num_outputs = y->dimensions()[1];
  int64_t num_threads = std::max<int64_t>(1, pool.num_threads());
  if (num_x == 0) return ffi::Error::Success();
  std::vector<Matrix> matrices;
  std::vector<int64_t> starts;
  std::vector<Piece> pieces;
  int64_t start = 0;
  for (size_t i = 0; i < parts.size(); i++) {
    auto data = parts.get<ffi::AnyBuffer>(i);
    if (!data) return data.error();
    matrices.push_back(matrix(*data, num_inputs, encodings[i]));
    starts.push_back(start);
    int64_t rows = data->dimensions()[0];
    cut(i, rows, num_inputs * num_x, num_threads, num_outputs * num_inputs * num_x, pieces);
    start += rows;
  }
  const Kernels* kernels = chosen.load();
  const float* in = x.typed_data();
  float* out = y->typed_data();
  run_pieces(pool, pieces.size(), num_threads, [&](int64_t i) {
    const Piece& piece = pieces[i];
    float* buffer = num_x > 1 ? scratch(tile_rows(num_inputs, num_x) * num_inputs) : nullptr;
    kernels->product(matrices[piece.part], piece.begin, piece.end, in, num_x, out + starts[piece.part], num_outputs,
                     buffer);
  });
  return ffi::Error::Success();
}

// All rows of a matrix as floats.
ffi::Error Decode(ffi::ThreadPool pool, int32_t encoding, ffi::AnyBuffer data, ffi::ResultBuffer<ffi::F32> out) {
  int64_t rows = out->dimensions()[0], num_inputs = out->dimensions()[1];
  int64_t num_threads = std::max<int64_t>(1, pool.num_threads());
  if (rows == 0) return ffi::Error::Success();
  Matrix weights = matrix(data, num_inputs, encoding);
  std::vector<Piece> pieces;
  cut(0, rows, num_inputs, num_threads, rows * num_inputs, pieces);
  const Kernels* kernels = chosen.load();
  float* to = out->typed_data();
  run_pieces(pool, pieces.size(), num_threads, [&](int64_t i) {
    kernels->decode(weights, pieces[i].begin, pieces[i].end, to + pieces[i].begin * num_inputs);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GemmaKernelsProduct, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<ffi::Span<const int32_t>>("encodings")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(GemmaKernelsDecode, Decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int32_t>("encoding")
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

// Must equal native.py's VERSION: changed with every change of what the two say to each other.
extern "C" int GemmaKernelsVersion() { return 1; }

// The version of XLA's interface that this was built for.
extern "C" int GemmaKernelsFfiMajor() { return XLA_FFI_API_MAJOR; }
extern "C" int GemmaKernelsFfiMinor() { return XLA_FFI_API_MINOR; }

// The name of the i-th level that this machine can run, or null.
extern "C" const char* GemmaKernelsLevel(int i) {
  auto found = levels();
  return i >= 0 && i < static_cast<int>(found.size()) ? found[i].name : nullptr;
}

extern "C" void GemmaKernelsUseLevel(int i) { chosen.store(levels()[i].kernels); }
