// The part of TensorRT 8.6's plugin interface that qpass implements, as ../10/NvInferRuntime.h is for 10 and later: plugins are
// IPluginV2DynamicExt, whose virtual table holds what IPluginV2 and IPluginV2Ext had before it. Order and types are the contract.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#define NV_TENSORRT_VERSION 8601

namespace nvinfer1 {
using DimValue = int32_t;
}  // namespace nvinfer1

#include "../shared.h"

struct cudnnContext;
struct cublasContext;

namespace nvinfer1 {

struct DynamicPluginTensorDesc {
  PluginTensorDesc desc;
  Dims min, max;
};

class IGpuAllocator;

class IPluginV2 {
 public:
  virtual int32_t getTensorRTVersion() const noexcept { return NV_TENSORRT_VERSION; }
  virtual char const* getPluginType() const noexcept = 0;
  virtual char const* getPluginVersion() const noexcept = 0;
  virtual int32_t getNbOutputs() const noexcept = 0;
  virtual Dims getOutputDimensions(int32_t, Dims const*, int32_t) noexcept = 0;
  virtual bool supportsFormat(DataType, TensorFormat) const noexcept = 0;
  virtual void configureWithFormat(
      Dims const*, int32_t, Dims const*, int32_t, DataType, TensorFormat, int32_t) noexcept = 0;
  virtual int32_t initialize() noexcept = 0;
  virtual void terminate() noexcept = 0;
  virtual size_t getWorkspaceSize(int32_t) const noexcept = 0;
  virtual int32_t enqueue(int32_t, void const* const*, void* const*, void*, cudaStream_t) noexcept = 0;
  virtual size_t getSerializationSize() const noexcept = 0;
  virtual void serialize(void* buffer) const noexcept = 0;
  virtual void destroy() noexcept = 0;
  virtual IPluginV2* clone() const noexcept = 0;
  virtual void setPluginNamespace(char const* name) noexcept = 0;
  virtual char const* getPluginNamespace() const noexcept = 0;
  virtual ~IPluginV2() noexcept = default;
};

class IPluginV2Ext : public IPluginV2 {
 public:
  virtual DataType getOutputDataType(int32_t index, DataType const* in, int32_t inputs) const noexcept = 0;
  virtual bool isOutputBroadcastAcrossBatch(int32_t, bool const*, int32_t) const noexcept = 0;
  virtual bool canBroadcastInputAcrossBatch(int32_t) const noexcept = 0;
  virtual void configurePlugin(Dims const*, int32_t, Dims const*, int32_t, DataType const*, DataType const*, bool const*,
      bool const*, TensorFormat, int32_t) noexcept = 0;
  virtual void attachToContext(cudnnContext*, cublasContext*, IGpuAllocator*) noexcept {}
  virtual void detachFromContext() noexcept {}
  IPluginV2Ext* clone() const noexcept override = 0;

 protected:
  void configureWithFormat(Dims const*, int32_t, Dims const*, int32_t, DataType, TensorFormat, int32_t) noexcept override {}
};

class IPluginV2DynamicExt : public IPluginV2Ext {
 public:
  IPluginV2DynamicExt* clone() const noexcept override = 0;
  virtual DimsExprs getOutputDimensions(
      int32_t index, DimsExprs const* in, int32_t inputs, IExprBuilder& builder) noexcept = 0;
  virtual bool supportsFormatCombination(
      int32_t position, PluginTensorDesc const* all, int32_t inputs, int32_t outputs) noexcept = 0;
  virtual void configurePlugin(
      DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const* out, int32_t outputs) noexcept = 0;
  virtual size_t getWorkspaceSize(
      PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const* out, int32_t outputs) const noexcept = 0;
  virtual int32_t enqueue(PluginTensorDesc const* inDesc, PluginTensorDesc const* outDesc, void const* const* in,
      void* const* out, void* workspace, cudaStream_t stream) noexcept = 0;

 protected:
  int32_t getTensorRTVersion() const noexcept override {
    return 3 << 24 | (NV_TENSORRT_VERSION & 0xFFFFFF);  // 3: PluginVersion::kV2_DYNAMICEXT
  }

 private:  // what it replaces
  void configurePlugin(Dims const*, int32_t, Dims const*, int32_t, DataType const*, DataType const*, bool const*, bool const*,
      TensorFormat, int32_t) noexcept final {}
  bool supportsFormat(DataType, TensorFormat) const noexcept final { return false; }
  Dims getOutputDimensions(int32_t, Dims const*, int32_t) noexcept final { return {-1, {}}; }
  bool isOutputBroadcastAcrossBatch(int32_t, bool const*, int32_t) const noexcept final { return false; }
  bool canBroadcastInputAcrossBatch(int32_t) const noexcept final { return true; }
  size_t getWorkspaceSize(int32_t) const noexcept final { return 0; }
  int32_t enqueue(int32_t, void const* const*, void* const*, void*, cudaStream_t) noexcept final { return 1; }
};

class IPluginCreator {
 public:
  virtual int32_t getTensorRTVersion() const noexcept { return NV_TENSORRT_VERSION; }
  virtual char const* getPluginName() const noexcept = 0;
  virtual char const* getPluginVersion() const noexcept = 0;
  virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
  virtual IPluginV2* createPlugin(char const* name, PluginFieldCollection const* fields) noexcept = 0;
  virtual IPluginV2* deserializePlugin(char const* name, void const* data, size_t size) noexcept = 0;
  virtual void setPluginNamespace(char const* name) noexcept = 0;
  virtual char const* getPluginNamespace() const noexcept = 0;
  virtual ~IPluginCreator() = default;
};

}  // namespace nvinfer1
