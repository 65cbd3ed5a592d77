// memvp_kernels._C: the launchers as Python calls them. Pointers and strides arrive as integers, so no torch header is
// needed and one build serves every torch. The caller keeps every tensor alive until launch() has returned.
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "decode/ffn_decode.h"
#include "hopper/ffn_gemm.h"

namespace py = pybind11;

namespace {

using memvp::Activation;
using memvp::DecodeForm;
using memvp::DecodeTensor;
using memvp::DType;
using memvp::FfnDecodeParams;
using memvp::FfnGemmParams;
using memvp::GemmKind;
using memvp::GemmMatrix;
using memvp::GemmVector;

struct TensorField {
  const char* name;
  DecodeTensor FfnDecodeParams::* member;
};

// In the order in which Python passes them; the names are those of memvp_kernels.problem.Problem.
constexpr TensorField kTensors[] = {
    {"x", &FfnDecodeParams::x},
    {"key", &FfnDecodeParams::key},
    {"value", &FfnDecodeParams::value},
    {"gate", &FfnDecodeParams::gate},
    {"key_bias", &FfnDecodeParams::key_bias},
    {"gate_bias", &FfnDecodeParams::gate_bias},
    {"value_bias", &FfnDecodeParams::value_bias},
    {"visual_key", &FfnDecodeParams::visual_key},
    {"visual_value", &FfnDecodeParams::visual_value},
    {"visual_basis", &FfnDecodeParams::visual_basis},
    {"key_position", &FfnDecodeParams::key_position},
    {"value_position", &FfnDecodeParams::value_position},
    {"residual", &FfnDecodeParams::residual},
};
constexpr size_t kTensorCount = sizeof(kTensors) / sizeof(kTensors[0]);

template <class T>
T* as_pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, type, strides...) of up to three dimensions, or None for an absent tensor.
DecodeTensor as_tensor(const char* name, py::handle description) {
  DecodeTensor tensor;
  if (description.is_none()) return tensor;
  const auto fields = py::reinterpret_borrow<py::tuple>(description);
  if (!py::isinstance<py::tuple>(description) || fields.size() < 3 || fields.size() > 5) {
    throw py::type_error(std::string(name) + ": wanted None or (address, type, one to three strides)");
  }
  tensor.data = as_pointer<const void>(fields[0].cast<uintptr_t>());
  tensor.type = static_cast<DType>(fields[1].cast<int32_t>());
  for (size_t i = 2; i < fields.size(); ++i) tensor.strides[i - 2] = fields[i].cast<int64_t>();
  return tensor;
}

FfnDecodeParams make_params(const py::tuple& tensors, int32_t type, uintptr_t cu_seqlens, uintptr_t visual_index,
                            uintptr_t visual_lengths, int32_t tokens, int32_t width, int32_t pairs, int32_t slots,
                            int32_t rank, int32_t memories, int32_t sequences, int32_t length, bool shared_memory,
                            int32_t activation, int32_t visual_activation, float visual_scale, int32_t form,
                            int32_t multiprocessors, int32_t shared_bytes, int32_t device) {
  if (tensors.size() != kTensorCount) {
    throw py::type_error("tensors: wanted " + std::to_string(kTensorCount) + ", got " + std::to_string(tensors.size()));
  }
  FfnDecodeParams params;
  for (size_t i = 0; i < kTensorCount; ++i) params.*kTensors[i].member = as_tensor(kTensors[i].name, tensors[i]);
  params.type = static_cast<DType>(type);
  params.cu_seqlens = as_pointer<const int32_t>(cu_seqlens);
  params.visual_index = as_pointer<const int32_t>(visual_index);
  params.visual_lengths = as_pointer<const int32_t>(visual_lengths);
  params.tokens = tokens;
  params.width = width;
  params.pairs = pairs;
  params.slots = slots;
  params.rank = rank;
  params.memories = memories;
  params.sequences = sequences;
  params.length = length;
  params.shared_memory = shared_memory;
  params.activation = static_cast<Activation>(activation);
  params.visual_activation = static_cast<Activation>(visual_activation);
  params.visual_scale = visual_scale;
  params.form = static_cast<DecodeForm>(form);
  params.multiprocessors = multiprocessors;
  params.shared_bytes = shared_bytes;
  params.device = device;
  return params;
}

void launch(FfnDecodeParams& params, uintptr_t y, int64_t y_stride, uintptr_t workspace, uintptr_t stream) {
  params.y = as_pointer<void>(y);
  params.y_stride = y_stride;
  params.workspace = as_pointer<void>(workspace);
  const int code = memvp::ffn_decode_launch(params, as_pointer<void>(stream));
  if (code == 0) return;
  const char* limit = code == memvp::kDecodeUnsupported ? memvp::ffn_decode_unsupported(params) : nullptr;
  throw std::runtime_error(std::string("ffn_decode: ") + (limit ? limit : memvp::ffn_decode_error_text(code)));
}

// (address, row stride), or None for an absent matrix.
GemmMatrix as_matrix(py::handle description) {
  if (description.is_none()) return {};
  const auto [address, stride] = description.cast<std::pair<uintptr_t, int64_t>>();
  return {as_pointer<const void>(address), stride};
}

// (address, whether float32), or None for an absent vector.
GemmVector as_vector(py::handle description) {
  if (description.is_none()) return {};
  const auto [address, wide] = description.cast<std::pair<uintptr_t, bool>>();
  return {as_pointer<const void>(address), wide};
}

// Launches one product; the arguments are those of FfnGemmParams, each term as (left, right, depth, across).
void gemm(int32_t kind, int32_t type, int32_t activation, int32_t rows, int32_t columns, const py::tuple& products,
          const py::object& gate, const py::object& bias, const py::object& gate_bias, const py::object& residual,
          const py::object& result, uintptr_t pre, uintptr_t dpre, bool gated, const py::object& shared,
          const py::object& shared_result, int32_t shared_columns, int32_t multiprocessors, int32_t device,
          uintptr_t stream) {
  if (products.size() > memvp::kMaxProducts) throw py::type_error("products: wanted three at most");
  FfnGemmParams params;
  for (const py::handle description : products) {
    const auto fields = py::cast<py::tuple>(description);
    if (fields.size() != 4) throw py::type_error("products: wanted (left, right, depth, across) of each");
    params.products[params.product_count++] = {as_matrix(fields[0]), as_matrix(fields[1]), fields[2].cast<int32_t>(),
                                               fields[3].cast<bool>()};
  }
  params.kind = static_cast<GemmKind>(kind);
  params.type = static_cast<DType>(type);
  params.activation = static_cast<Activation>(activation);
  params.rows = rows;
  params.columns = columns;
  params.gate = as_matrix(gate);
  params.bias = as_vector(bias);
  params.gate_bias = as_vector(gate_bias);
  params.residual = as_matrix(residual);
  params.result = as_matrix(result);
  params.pre = as_pointer<void>(pre);
  params.dpre = as_pointer<void>(dpre);
  params.gated = gated;
  params.shared = as_matrix(shared);
  params.shared_result = as_matrix(shared_result);
  params.shared_columns = shared_columns;
  params.multiprocessors = multiprocessors;
  params.device = device;
  int code = 0;
  {
    const py::gil_scoped_release released;
    code = memvp::ffn_gemm_launch(params, as_pointer<void>(stream));
  }
  if (code == 0) return;
  const char* limit = code == memvp::kGemmUnsupported ? memvp::ffn_gemm_unsupported(params) : nullptr;
  throw std::runtime_error(std::string("ffn_gemm: ") + (limit ? limit : memvp::ffn_gemm_error_text(code)));
}

py::tuple tensor_names() {
  py::tuple names(kTensorCount);
  for (size_t i = 0; i < kTensorCount; ++i) names[i] = kTensors[i].name;
  return names;
}

template <class Enum>
py::dict codes(std::initializer_list<std::pair<const char*, Enum>> values) {
  py::dict found;
  for (const auto& [name, value] : values) found[name] = static_cast<int32_t>(value);
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("cuda") = MEMVP_CUDA_VERSION;
  module.attr("archs") = MEMVP_CUDA_ARCHS;
  module.attr("max_tokens") = memvp::kDecodeMaxTokens;
  module.attr("tensor_names") = tensor_names();
  module.attr("type_codes") =
      codes<DType>({{"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}, {"float32", DType::kFloat32}});
  module.attr("activation_codes") = codes<Activation>({{"relu", Activation::kRelu},
                                                       {"gelu", Activation::kGelu},
                                                       {"gelu_tanh", Activation::kGeluTanh},
                                                       {"silu", Activation::kSilu}});
  module.attr("form_codes") = codes<DecodeForm>(
      {{"auto", DecodeForm::kAuto}, {"pdl", DecodeForm::kPdl}, {"cooperative", DecodeForm::kCooperative}});
  module.attr("gemm_codes") =
      codes<GemmKind>({{"hidden", GemmKind::kHidden}, {"output", GemmKind::kOutput}, {"dhidden", GemmKind::kDHidden}});

  py::class_<FfnDecodeParams>(module, "FfnDecodeParams", py::module_local())
      .def(py::init(&make_params), py::arg("tensors"), py::kw_only(), py::arg("type"), py::arg("cu_seqlens"),
           py::arg("visual_index"), py::arg("visual_lengths"), py::arg("tokens"), py::arg("width"), py::arg("pairs"),
           py::arg("slots"), py::arg("rank"), py::arg("memories"), py::arg("sequences"), py::arg("length"),
           py::arg("shared_memory"), py::arg("activation"), py::arg("visual_activation"), py::arg("visual_scale"),
           py::arg("form"), py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("device"))
      .def("unsupported", &memvp::ffn_decode_unsupported)
      .def("is_fast", &memvp::ffn_decode_is_fast)
      .def("workspace_bytes", &memvp::ffn_decode_workspace_bytes)
      .def("launch", &launch, py::arg("y"), py::arg("y_stride"), py::arg("workspace"), py::arg("stream"),
           py::call_guard<py::gil_scoped_release>());

  module.def("gemm", &gemm, py::kw_only(), py::arg("kind"), py::arg("type"), py::arg("activation"), py::arg("rows"),
             py::arg("columns"), py::arg("products"), py::arg("gate") = py::none(), py::arg("bias") = py::none(),
             py::arg("gate_bias") = py::none(), py::arg("residual") = py::none(), py::arg("result") = py::none(),
             py::arg("pre") = 0, py::arg("dpre") = 0, py::arg("gated") = false, py::arg("shared") = py::none(),
             py::arg("shared_result") = py::none(), py::arg("shared_columns") = 0, py::arg("multiprocessors"),
             py::arg("device"), py::arg("stream"));
}
