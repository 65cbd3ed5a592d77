// Runs stored cases (tests/csrc/emulate_decode.py writes them) and judges the results: the program that the sanitizers
// watch and that every mutation must make fail. Usage: cases FILE SCHEDULES; exit status 1 when a case failed.
#include "decode.h"

namespace {

using namespace memvp;
using namespace memvp::emulation;

class Reader {
 public:
  explicit Reader(const char* path) : file_(fopen(path, "rb")) {
    if (file_ == nullptr) throw std::runtime_error(std::string("cannot open ") + path);
  }
  ~Reader() { fclose(file_); }
  Reader(const Reader&) = delete;
  void read(void* to, size_t bytes) {
    if (bytes > 0 && fread(to, bytes, 1, file_) != 1) throw std::runtime_error("the file of cases is short");
  }
  template <class V>
  V read() {
    V v;
    read(&v, sizeof(v));
    return v;
  }

 private:
  FILE* file_;
};

struct StoredTensor {
  Buffer buffer;
  size_t offset;  // of the first element, to keep its alignment
  void* data() const { return static_cast<char*>(buffer.data()) + offset; }
};

struct StoredCase {
  std::vector<StoredTensor> tensors;
  FfnDecodeParams params;
  double norm = 0, largest = 0;  // allowed errors
  std::vector<double> exact;
};

template <class V>
void place(const V*& pointer, const StoredCase& stored) {
  const size_t number = reinterpret_cast<uintptr_t>(pointer);
  pointer = number == 0 ? nullptr : static_cast<const V*>(stored.tensors[number - 1].data());
}

StoredCase read_case(Reader& reader) {
  StoredCase stored;
  const auto count = reader.read<uint64_t>();
  for (uint64_t i = 0; i < count; ++i) {
    const auto bytes = reader.read<uint64_t>();
    const auto offset = reader.read<uint64_t>();
    stored.tensors.push_back({Buffer(bytes + offset), offset});
    reader.read(stored.tensors.back().data(), bytes);
  }
  FfnDecodeParams& p = stored.params;
  reader.read(static_cast<void*>(&p), sizeof(p));
  for (DecodeTensor* t : {&p.x, &p.key, &p.value, &p.gate, &p.key_bias, &p.gate_bias, &p.value_bias, &p.visual_key,
                          &p.visual_value, &p.visual_basis, &p.key_position, &p.value_position, &p.residual})
    place(t->data, stored);
  place(p.cu_seqlens, stored);
  place(p.visual_index, stored);
  place(p.visual_lengths, stored);
  stored.norm = reader.read<double>();
  stored.largest = reader.read<double>();
  stored.exact.resize(static_cast<size_t>(p.tokens) * p.width);
  reader.read(stored.exact.data(), stored.exact.size() * sizeof(double));
  return stored;
}

// Empty, or what is wrong with y.
std::string judge(const StoredCase& stored, const uint16_t* y) {
  double squares = 0, largest = 0;
  for (size_t i = 0; i < stored.exact.size(); ++i) {
    const float value = stored.params.type == DType::kBFloat16 ? float_of_bfloat(y[i]) : float_of_half(y[i]);
    const double error = std::fabs(value - stored.exact[i]);
    if (!(error <= largest)) largest = error;  // NaN stays
    squares += error * error;
  }
  if (std::sqrt(squares) <= stored.norm && largest <= stored.largest) return "";
  return text("error %g (allowed %g), largest %g (allowed %g)", std::sqrt(squares), stored.norm, largest,
              stored.largest);
}

std::string run_case(const StoredCase& stored, uint64_t schedules) {
  FfnDecodeParams params = stored.params;
  params.y_stride = params.width;
  std::vector<Range> inputs;
  for (const StoredTensor& tensor : stored.tensors)
    inputs.push_back({tensor.data(), tensor.buffer.bytes() - tensor.offset});
  Config config;
  config.inputs = {inputs.data(), inputs.size()};
  std::vector<uint16_t> first[2];  // of each form: they split the sums differently
  for (uint64_t seed = 1; seed <= schedules; ++seed) {
    const Buffer y(2 * stored.exact.size());
    params.y = y.data();
    config.seed = seed;
    config.order = seed % 4 == 3 ? Order::kReverse : seed % 4 == 2 ? Order::kForward : Order::kRandom;
    config.resident = 1 + seed * 3 % 7;
    params.form = seed % 2 == 0 ? DecodeForm::kCooperative : DecodeForm::kPdl;
    run_decode(params, config);
    const auto* bits = static_cast<const uint16_t*>(y.data());
    const std::string wrong = judge(stored, bits);
    if (!wrong.empty()) return text("schedule %d: ", static_cast<int>(seed)) + wrong;
    std::vector<uint16_t>& before = first[seed % 2];
    if (before.empty()) before.assign(bits, bits + stored.exact.size());
    if (memcmp(before.data(), bits, 2 * before.size()) != 0)
      return text("schedule %d: other bits than schedule %d", static_cast<int>(seed), seed % 2 == 0 ? 2 : 1);
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: %s FILE SCHEDULES\n", argv[0]);
    return 2;
  }
  Reader reader(argv[1]);
  const uint64_t schedules = std::strtoull(argv[2], nullptr, 10);
  if (reader.read<uint64_t>() != sizeof(FfnDecodeParams)) {
    fprintf(stderr, "the file was written for another FfnDecodeParams\n");
    return 2;
  }
  const auto count = reader.read<uint64_t>();
  for (uint64_t i = 0; i < count; ++i) {
    const StoredCase stored = read_case(reader);
    std::string wrong;
    try {
      wrong = run_case(stored, schedules);
    } catch (const std::exception& error) {
      wrong = error.what();
    }
    if (wrong.empty()) continue;
    printf("case %d: %s\n", static_cast<int>(i), wrong.c_str());
    return 1;
  }
  printf("%d cases passed\n", static_cast<int>(count));
  return 0;
}
