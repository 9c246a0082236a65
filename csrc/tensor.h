// A tensor as the extension sees it, and the checks that stand between a caller's mistake and a pointer.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "cpu/scalar.h"
#include "dlpack.h"

namespace icon2 {

namespace py = pybind11;

// How tensors are lent; set once, when the package imports the extension.
inline const DLExchange* exchange = nullptr;

inline void use_exchange(const py::capsule& capsule) {
  const auto* found = static_cast<const DLExchange*>(capsule.get_pointer());
  if (found->major != 1 || found->view == nullptr)
    throw py::import_error("this torch lends its tensors by DLPack " + std::to_string(found->major) + ", 1 is needed");
  exchange = found;
}

// Where every tensor that this thread looks at is kept while it captures a step; null otherwise.
inline thread_local std::vector<py::object>* kept = nullptr;

enum class Kind { floating, f32, i32, i64, boolean };

class Tensor {
 public:
  Tensor() = default;  // none

  Tensor(const char* name, py::handle object, Kind kind, int32_t device_type = kDLCPU) : name_(name) {
    if (exchange == nullptr) throw py::import_error("icon2_rt._native is used through icon2_rt.ops.native");
    if (exchange->view(object.ptr(), &view_) != 0) {
      PyErr_Clear();
      throw py::type_error(name_ + " must be a torch.Tensor with memory, not " +
                           std::string(py::str(py::type::handle_of(object).attr("__name__"))));
    }
    if (view_.device_type != device_type)
      throw py::value_error(name_ + (device_type == kDLCPU ? " must be on the CPU" : " must be on a CUDA device"));
    if (!is(kind)) throw py::type_error(name_ + " must be " + wanted(kind) + ", not " + dtype_name());
    if (size() > 0 && data() == nullptr) throw py::value_error(name_ + " has no memory");
    if (kept != nullptr) kept->push_back(py::reinterpret_borrow<py::object>(object));
  }

  explicit operator bool() const { return view_.shape != nullptr || view_.data != nullptr; }
  int64_t dim(int i) const { return view_.shape[i]; }
  int64_t stride(int i) const { return view_.strides[i]; }
  int ndim() const { return view_.ndim; }
  int device() const { return view_.device_id; }
  void* data() const { return static_cast<char*>(view_.data) + view_.byte_offset; }
  template <class T>
  T* as() const {
    return *this ? static_cast<T*>(data()) : nullptr;
  }

  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < ndim(); ++i) n *= dim(i);
    return n;
  }

  DType dtype() const { return view_.bits == 32 ? DType::f32 : view_.code == kDLBfloat ? DType::bf16 : DType::f16; }

  std::string dtype_name() const {
    const char* code = view_.code == kDLInt      ? "int"
                       : view_.code == kDLFloat  ? "float"
                       : view_.code == kDLBfloat ? "bfloat"
                       : view_.code == kDLBool   ? "bool"
                                                 : "dtype ";
    return view_.code == kDLBool ? code : code + std::to_string(view_.bits);
  }

  // One size for each dimension; -1 for any.
  const Tensor& shaped(std::initializer_list<int64_t> sizes) const {
    bool same = ndim() == static_cast<int>(sizes.size());
    int i = 0;
    for (int64_t size : sizes) {
      if (!same) break;
      same = size == -1 || dim(i) == size;
      ++i;
    }
    if (!same) throw py::value_error(name_ + " must be " + show(sizes.begin(), sizes.size()) + ", not " + shape());
    return *this;
  }

  // Every dimension but the first `free` without gaps; the free one (rows) without overlap.
  const Tensor& dense(int free = 0) const {
    int64_t expected = 1;
    for (int i = ndim() - 1; i >= 0; --i) {
      if (dim(i) != 1 && size() > 0 && (i < free ? stride(i) < expected : stride(i) != expected))
        throw py::value_error(name_ + " " + shape() + " must " + (free ? "have dense rows" : "be contiguous") +
                              ", its strides are " + show(view_.strides, static_cast<size_t>(ndim())) +
                              ": pass a .contiguous() copy");
      expected *= dim(i);
    }
    return *this;
  }

  const Tensor& like(const Tensor& other) const {
    if (view_.code != other.view_.code || view_.bits != other.view_.bits)
      throw py::type_error(name_ + " is " + dtype_name() + " and " + other.name_ + " is " + other.dtype_name() +
                           ": they must agree");
    return *this;
  }

  // Written here: may share no byte with any of the others.
  void apart(std::initializer_list<const Tensor*> others) const {
    if (!*this || size() == 0) return;
    for (const Tensor* other : others) {
      if (other == this || !*other || other->size() == 0) continue;
      if (begin() < other->end() && other->begin() < end())
        throw py::value_error(name_ + " is written and overlaps " + other->name_ + ": they must be apart in memory");
    }
  }

  const std::string& name() const { return name_; }

 private:
  bool is(Kind kind) const {
    switch (kind) {
      case Kind::floating:
        return (view_.code == kDLFloat && (view_.bits == 32 || view_.bits == 16)) ||
               (view_.code == kDLBfloat && view_.bits == 16);
      case Kind::f32:
        return view_.code == kDLFloat && view_.bits == 32;
      case Kind::i32:
        return view_.code == kDLInt && view_.bits == 32;
      case Kind::i64:
        return view_.code == kDLInt && view_.bits == 64;
      case Kind::boolean:
        return view_.code == kDLBool && view_.bits == 8;
    }
    return false;
  }

  static const char* wanted(Kind kind) {
    switch (kind) {
      case Kind::floating:
        return "float32, bfloat16 or float16";
      case Kind::f32:
        return "float32";
      case Kind::i32:
        return "int32";
      case Kind::i64:
        return "int64";
      case Kind::boolean:
        return "bool";
    }
    return "";
  }

  const char* begin() const { return static_cast<const char*>(data()); }
  const char* end() const {
    int64_t last = 0;
    for (int i = 0; i < ndim(); ++i) last += (dim(i) - 1) * stride(i);
    return begin() + (last + 1) * (view_.bits / 8);
  }

  static std::string show(const int64_t* values, size_t n) {
    std::string text = "[";
    for (size_t i = 0; i < n; ++i)
      text += (i ? ", " : "") + (values[i] == -1 ? std::string("any") : std::to_string(values[i]));
    return text + "]";
  }
  std::string shape() const { return show(view_.shape, static_cast<size_t>(ndim())); }

  std::string name_;
  DLTensor view_{};
};

inline Tensor optional(const char* name, py::handle object, Kind kind, int32_t device_type = kDLCPU) {
  return object.is_none() ? Tensor() : Tensor(name, object, kind, device_type);
}

// Every index in the first `n` rows of a tensor of one or two dimensions in [low, high): what keeps a wrong index from
// becoming a wrong address.
template <class T>
void within(const Tensor& tensor, int64_t n, int64_t low, int64_t high) {
  const int64_t width = tensor.ndim() == 2 ? tensor.dim(1) : 1;
  for (int64_t i = 0; i < n; ++i) {
    const T* values = tensor.as<T>() + i * tensor.stride(0);
    for (int64_t j = 0; j < width; ++j)
      if (values[j] < low || values[j] >= high)
        throw py::index_error(tensor.name() + " has " + std::to_string(values[j]) + " at place " + std::to_string(i) +
                              ", which is outside [" + std::to_string(low) + ", " + std::to_string(high) + ")");
  }
}

}  // namespace icon2
