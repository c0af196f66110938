// The torch side of every operator: tensors in, plain pointers out. Arguments were checked in Python with the user's
// names; what is checked here again is what would make a kernel read outside its memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../kernels/params.h"

// Resolves in CUDA builds of torch only; weak, so that the module also loads in a CPU build.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

template <typename... Args>
void check(bool condition, const Args&... message) {
  if (!condition) {
    std::ostringstream text;
    text << "moe_kernels: ";
    (text << ... << message);
    throw std::runtime_error(text.str());
  }
}

// Makes the tensor's device current while it lives and knows that device's current stream. One that is made while
// another of the thread lives has what that one has: an operator of several stages asks torch once.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : device_(tensor.get_device_index()), outer_(innermost()) {
    check(tensor.is_cuda(), "the operators' tensors must be CUDA tensors");
    if (outer_ != nullptr && outer_->device_ == device_) {
      stream_ = outer_->stream_;
    } else {
      check(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
      guard_.emplace(device_);
      void* stream = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
      stream_ = static_cast<cudaStream_t>(stream);
    }
    innermost() = this;
  }
  ~Launch() { innermost() = outer_; }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  cudaStream_t stream() const { return stream_; }

 private:
  static const Launch*& innermost() {
    static thread_local const Launch* launch = nullptr;
    return launch;
  }
  const int32_t device_;
  const Launch* const outer_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      check(false, name, " must be float32, bfloat16 or float16");
  }
  return DType::kFloat32;
}

// The dtypes that the kernels store.
inline DType half_dtype_of(const Tensor& tensor, const char* name) {
  const DType dtype = dtype_of(tensor, name);
  check(dtype != DType::kFloat32, name, " must be bfloat16 or float16");
  return dtype;
}

// What torch's C interface calls the dtype.
inline int32_t code_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// The tensor's memory, after checking dtype, shape, contiguity and alignment (in bytes).
inline void* checked_data(const Tensor& tensor, const char* name, ScalarType dtype, Shape shape,
                          uintptr_t alignment = 16) {
  check(tensor.is_cuda(), name, " must be a CUDA tensor");
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  check(code == code_of(dtype), name, " has the wrong dtype");
  const auto sizes = tensor.sizes();
  if (!std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end())) {
    std::ostringstream want, got;
    for (int64_t size : shape) want << ' ' << size;
    for (int64_t size : sizes) got << ' ' << size;
    check(false, name, " must have shape [", want.str(), " ], got [", got.str(), " ]");
  }
  check(tensor.is_contiguous(), name, " must be contiguous");
  void* data = tensor.data_ptr();
  check(reinterpret_cast<uintptr_t>(data) % alignment == 0, name, " must be aligned to ", alignment, " bytes");
  return data;
}

// Routing tensors are read element by element, so that slices such as topk_ids[1:] need no copy.
inline int32_t* int_data(const Tensor& tensor, const char* name, Shape shape) {
  return static_cast<int32_t*>(checked_data(tensor, name, ScalarType::Int, shape, sizeof(int32_t)));
}

inline float* float_data(const Tensor& tensor, const char* name, Shape shape) {
  return static_cast<float*>(checked_data(tensor, name, ScalarType::Float, shape, sizeof(float)));
}

inline int32_t* int_data(const OptionalTensor& tensor, const char* name, Shape shape) {
  return tensor.has_value() ? int_data(*tensor, name, shape) : nullptr;
}

inline float* float_data(const OptionalTensor& tensor, const char* name, Shape shape) {
  return tensor.has_value() ? float_data(*tensor, name, shape) : nullptr;
}

inline void* checked_data(const OptionalTensor& tensor, const char* name, ScalarType dtype, Shape shape) {
  return tensor.has_value() ? checked_data(*tensor, name, dtype, shape) : nullptr;
}

// An uninitialised contiguous tensor on the device of `like`, by the C interface: torch::stable::new_empty goes through
// the dispatcher with every argument boxed, and takes twice as long.
inline Tensor new_empty(const Tensor& like, Shape shape, ScalarType dtype) {
  constexpr size_t kMostDims = 3;
  check(shape.size() <= kMostDims, "new_empty wants at most ", kMostDims, " dimensions, got ", shape.size());
  int64_t strides[kMostDims], stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(shape.begin()[i], 1);
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(), strides,
                                                        code_of(dtype), device_type, like.get_device_index(), &handle);
  // The interface gives no reason; with these arguments memory is the one there is. Callers look for the words.
  check(error == AOTI_TORCH_SUCCESS, "CUDA out of memory. Tried to allocate a tensor of ", stride, " elements");
  return Tensor(handle);
}

// The tensor, or a copy where its memory does not begin on 16 bytes, as a view into a flat buffer may.
inline Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

inline OptionalTensor aligned(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(aligned(*tensor)) : tensor;
}

inline ScoreFn score_fn_of(const std::string& name) {
  if (name == "softmax") return ScoreFn::kSoftmax;
  if (name == "sigmoid") return ScoreFn::kSigmoid;
  if (name == "sqrtsoftplus") return ScoreFn::kSqrtSoftplus;
  check(false, "score_fn must be softmax, sigmoid or sqrtsoftplus, got ", name);
  return ScoreFn::kSoftmax;
}

inline Activation activation_of(const std::string& name) {
  if (name == "swiglu") return Activation::kSwiGLU;
  if (name == "swiglu_oai") return Activation::kSwiGLUOai;
  if (name == "geglu") return Activation::kGeGLU;
  if (name == "geglu_tanh") return Activation::kGeGLUTanh;
  if (name == "reglu") return Activation::kReGLU;
  if (name == "silu") return Activation::kSiLU;
  if (name == "gelu") return Activation::kGELU;
  if (name == "relu") return Activation::kReLU;
  if (name == "relu2") return Activation::kReLU2;
  check(false, "unknown activation ", name);
  return Activation::kSwiGLU;
}

inline float limit_of(std::optional<double> swiglu_limit) {
  return swiglu_limit.has_value() ? static_cast<float>(*swiglu_limit) : std::numeric_limits<float>::infinity();
}

// Sizes that the kernels count in 32 bits, moved 16 bytes at a time.
inline int checked_width(int64_t size, const char* name) {
  check(size > 0 && size % 8 == 0 && size <= (1 << 30), name, " must be a positive multiple of 8, got ", size);
  return static_cast<int>(size);
}

inline int checked_int(int64_t size, const char* name) {
  check(size >= 0 && size <= std::numeric_limits<int32_t>::max(), name, " must fit in 32 bits, got ", size);
  return static_cast<int>(size);
}

inline void check_dim(const Tensor& tensor, const char* name, int64_t dim) {
  check(tensor.dim() == dim, name, " must have ", dim, " dimensions, got ", tensor.dim());
}

inline bool is_gated(Activation activation) { return activation <= Activation::kReGLU; }

// The layouts that there are kernels for.
inline void check_layout(Activation activation, bool is_transposed, bool is_concatenated) {
  check(!is_transposed || activation <= Activation::kSwiGLUOai, "is_transposed wants swiglu or swiglu_oai");
  check(is_transposed || is_concatenated, "is_concatenated must be true where is_transposed is false");
}

}  // namespace moe
