// Plays TensorRT 8.6 for one plugin: makes it, asks what TensorRT asks when it builds, and serializes, reads back and asks again.
//   host(library, op, fields "name=value other=1,2,3 …", inputs "INT32:128 …", outputs) prints a line a question.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <list>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

// The layouts of IDimensionExpr and IExprBuilder: a virtual table, and an implementation with one of its own.
struct Expr {
  struct Implementation {
    explicit Implementation(int32_t value) : value(value) {}
    virtual ~Implementation() = default;
    virtual bool isConstant() const { return value >= 0; }
    virtual int32_t getConstantValue() const { return value; }
    int32_t value;
  };
  explicit Expr(int32_t value) : implementation(new Implementation(value)) {}
  virtual ~Expr() = default;
  Implementation* implementation;
};

std::list<Expr> made;

const Expr* make(int32_t value) {
  made.emplace_back(value);
  return &made.back();
}

struct Builder {
  struct Implementation {
    virtual ~Implementation() = default;
    virtual const Expr* constant(int32_t value) { return make(value); }
    virtual const Expr* operation(DimensionOperation op, const Expr& a, const Expr& b) {
      int32_t x = a.implementation->value, y = b.implementation->value;
      return make(x < 0 || y < 0 ? -1 : op == DimensionOperation::kPROD ? x * y : x / y);
    }
  };
  virtual ~Builder() = default;
  Implementation* implementation = new Implementation;
};

DataType type_named(const std::string& name) {
  return name == "FLOAT" ? DataType::kFLOAT : name == "HALF" ? DataType::kHALF : name == "INT8" ? DataType::kINT8 : DataType::kINT32;
}

std::vector<PluginTensorDesc> tensors(const std::string& text) {
  std::vector<PluginTensorDesc> found;
  std::istringstream words(text);
  for (std::string word; words >> word;) {
    PluginTensorDesc desc{};
    size_t colon = word.find(':');
    desc.type = type_named(word.substr(0, colon));
    std::istringstream dims(word.substr(colon + 1));
    for (std::string dim; std::getline(dims, dim, 'x');) desc.dims.d[desc.dims.nbDims++] = std::atoi(dim.c_str());
    found.push_back(desc);
  }
  return found;
}

void ask(IPluginV2DynamicExt* plugin, std::vector<PluginTensorDesc> all, int inputs) {
  int outputs = int(all.size()) - inputs;
  std::vector<DimsExprs> shapes(inputs);
  std::vector<DataType> types(inputs);
  for (int i = 0; i < inputs; ++i) {
    types[i] = all[i].type;
    shapes[i].nbDims = all[i].dims.nbDims;
    for (int d = 0; d < all[i].dims.nbDims; ++d) {
      shapes[i].d[d] = reinterpret_cast<const IDimensionExpr*>(make(all[i].dims.d[d]));
    }
  }
  std::printf("outputs %d\n", plugin->getNbOutputs());
  Builder builder;
  for (int i = 0; i < plugin->getNbOutputs(); ++i) {
    std::printf("output %d type %d dims", i, int(plugin->getOutputDataType(i, types.data(), inputs)));
    DimsExprs dims = plugin->getOutputDimensions(i, shapes.data(), inputs, reinterpret_cast<IExprBuilder&>(builder));
    for (int d = 0; d < dims.nbDims; ++d) std::printf(" %d", dims.d[d]->isConstant() ? dims.d[d]->getConstantValue() : -1);
    std::printf(dims.nbDims < 0 ? " none\n" : "\n");
  }
  std::printf("takes");
  for (int i = 0; i < int(all.size()); ++i) std::printf(" %d", plugin->supportsFormatCombination(i, all.data(), inputs, outputs));
  std::printf("\n");
  std::vector<DynamicPluginTensorDesc> wide;
  for (const PluginTensorDesc& desc : all) wide.push_back({desc, desc.dims, desc.dims});
  plugin->configurePlugin(wide.data(), inputs, wide.data() + inputs, outputs);
  plugin->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs);
  std::vector<void*> memory(all.size(), &made);
  std::printf("enqueue %d\n", plugin->enqueue(all.data(), all.data() + inputs, memory.data(), memory.data() + inputs, nullptr, nullptr));
}

}  // namespace

extern "C" int host(const char* path, const char* op, const char* fields, const char* in, const char* out) {
  void* library = dlopen(path, RTLD_NOW);
  if (!library) return 1;
  int32_t count = 0;
  auto creators = reinterpret_cast<IPluginCreator* const* (*)(int32_t&)>(dlsym(library, "getPluginCreators"))(count);
  IPluginCreator* creator = nullptr;
  for (int i = 0; i < count; ++i) {
    if (std::string(creators[i]->getPluginName()) == op) creator = creators[i];
  }
  if (!creator) return 2;
  std::printf("%s %s %s\n", creator->getPluginNamespace(), creator->getPluginName(), creator->getPluginVersion());
  std::list<std::string> names;
  std::list<std::vector<int32_t>> values;
  std::vector<PluginField> given;
  std::istringstream words(fields);
  for (std::string word; words >> word;) {
    size_t equals = word.find('=');
    names.push_back(word.substr(0, equals));
    values.emplace_back();
    std::istringstream numbers(word.substr(equals + 1));
    for (std::string number; std::getline(numbers, number, ',');) values.back().push_back(std::atoi(number.c_str()));
    given.push_back({names.back().c_str(), values.back().data(), PluginFieldType::kINT32, int32_t(values.back().size())});
  }
  PluginFieldCollection collection{int32_t(given.size()), given.data()};
  auto plugin = static_cast<IPluginV2DynamicExt*>(creator->createPlugin("node", &collection));
  std::fflush(stdout);
  if (!plugin) return 3;
  std::vector<PluginTensorDesc> all = tensors(in);
  int inputs = int(all.size());
  for (const PluginTensorDesc& desc : tensors(out)) all.push_back(desc);
  ask(plugin, all, inputs);
  std::vector<char> bytes(plugin->getSerializationSize());
  plugin->serialize(bytes.data());
  auto again = static_cast<IPluginV2DynamicExt*>(creator->deserializePlugin("node", bytes.data(), bytes.size()));
  std::printf("again\n");
  ask(static_cast<IPluginV2DynamicExt*>(again->clone()), all, inputs);
  std::printf("short %d\n", creator->deserializePlugin("node", bytes.data(), bytes.size() - 1) != nullptr);
  std::fflush(stdout);
  return 0;
}
