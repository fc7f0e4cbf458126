// What the plugin interfaces of TensorRT 8.6 and 10 share, but for the width of a dim: the header that includes this says what
// nvinfer1::DimValue is.
#pragma once

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBF16 = 7, kINT64 = 8 };
enum class TensorFormat : int32_t { kLINEAR = 0 };
enum class DimensionOperation : int32_t { kPROD = 1, kFLOOR_DIV = 7 };
enum class PluginFieldType : int32_t { kFLOAT32 = 1, kINT32 = 5, kUNKNOWN = 8, kINT64 = 10 };
struct Dims {
  static constexpr int32_t MAX_DIMS = 8;
  int32_t nbDims;
  DimValue d[MAX_DIMS];
};

struct PluginTensorDesc {
  Dims dims;
  DataType type;
  TensorFormat format;
  float scale;
};

struct PluginField {
  char const* name;
  void const* data;
  PluginFieldType type;
  int32_t length;
};

struct PluginFieldCollection {
  int32_t nbFields;
  PluginField const* fields;
};

// TensorRT makes objects of the next two; each holds a pointer to an implementation that does the work.
class IDimensionExpr {
 public:
  bool isConstant() const noexcept { return implementation_->isConstant(); }
  DimValue getConstantValue() const noexcept { return implementation_->getConstantValue(); }

 protected:
  virtual ~IDimensionExpr() noexcept = default;

 private:
  struct Implementation {
    virtual ~Implementation() noexcept = default;
    virtual bool isConstant() const = 0;
    virtual DimValue getConstantValue() const = 0;
  };
  Implementation* implementation_;
};

class IExprBuilder {
 public:
  IDimensionExpr const* constant(DimValue value) noexcept { return implementation_->constant(value); }
  IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& a, IDimensionExpr const& b) noexcept {
    return implementation_->operation(op, a, b);
  }

 protected:
  virtual ~IExprBuilder() noexcept = default;

 private:
  struct Implementation {
    virtual ~Implementation() noexcept = default;
    virtual IDimensionExpr const* constant(DimValue value) = 0;
    virtual IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& a, IDimensionExpr const& b) = 0;
  };
  Implementation* implementation_;
};

struct DimsExprs {
  int32_t nbDims;
  IDimensionExpr const* d[Dims::MAX_DIMS];
};

}  // namespace nvinfer1
